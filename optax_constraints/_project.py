"""The verbs that compute: `project`, `constrain`, `violations`."""

import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_constraints import _numerics
from optax_constraints._axes import Layout
from optax_constraints._constraint import Constraint
from optax_constraints._rules import Binder, Bound, Rules
from optax_constraints._text import shown


class ProjectState(NamedTuple):
    """State of `project`: an ordinary pytree."""

    # Optax' own name for it, though tuples have a method of that name.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """How many updates there have been, an int32 scalar; schedules see it."""
    memory: Any = ()
    """By path, what constraints remember of their leaves, such as norms at init."""


def project(
    rules: Rules, *, every: int = 1, layout: Layout | None = None, strict: bool = True
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation after which the parameters are in their sets.

    It goes last in a chain, and replaces each update `u` of a parameter `p` by
    ``P(p + u) - p``, where `P` is the projection that `rules` assign to `p`. Parameters
    without a constraint get their updates as they came. Start from `constrain(params, rules)`:
    beside weights that are larger than allowed by 1 / eps, the difference loses its target.

    Cost: one pass over each constrained leaf for an elementwise set, which fuses with the
    optimizer; two for a norm. An update has to be a difference, so a norm reads `p` once
    more than `constrain` after `optax.apply_updates` does: `make bench` shows what that is
    in a training step. The state is one integer, and what constraints remember.

    Args:
        rules: Which leaf is under which constraint: a constraint for every floating-point
            leaf, or a mapping (or pairs) from pattern to constraint or None. The first
            pattern that matches a leaf wins.
        every: Project on every so many steps only; the updates between pass through.
        layout: What `layout(model)` of `optax_constraints.flax` says of each leaf. With it,
            `axis="fan_in"` is exact for every layer.
        strict: Whether a rule that matches no leaf is an error. `False` is for trees seen
            in part.

    Returns:
        The transformation. Its `update` needs `params`.

    Raises:
        TypeError: If `rules` or `every` is of the wrong kind.
        ValueError: If a rule's value is no constraint; at init, if a rule matches no leaf or
            a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import optax_constraints as oc
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> tx = optax.chain(
        ...     optax.sgd(1.0), oc.project({"kernel": oc.max_norm(1.0), "bias": oc.non_neg()})
        ... )
        >>> grads = {"kernel": -jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["bias"]
        Array([0., 0., 0.], dtype=float32)
    """
    every = _check_every(every)
    bind = Binder(rules, layout=layout, strict=strict)

    def init(params: Any) -> ProjectState:
        return ProjectState(jnp.zeros((), jnp.int32), remember(params, bind))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ProjectState]:
        del extra_args
        if params is None:
            raise ValueError("project needs the parameters; write tx.update(grads, state, params).")
        leaves, treedef = jax.tree.flatten(params)
        given = treedef.flatten_up_to(updates)
        bound = bind(params)
        check_memory(state.memory, bound, leaves)

        def projected(given: list[Any], memory: Any) -> tuple[list[Any], Any]:
            new, kept, before = [], {}, None
            for (key, leaf_bound), p, u in zip(keyed(bound), leaves, given, strict=True):
                constraint = leaf_bound.at(state.count)
                if constraint is not None:
                    own = memory[key] if constraint.remembers else ()
                    if not is_absent(u):
                        p, u = jnp.asarray(p), jnp.asarray(u)
                        u, own, before = constraint.update(p, u, own, before)
                    if constraint.remembers:
                        kept[key] = own
                new.append(u)
            return new, _like(memory, kept)

        if every == 1:
            new, memory = projected(given, state.memory)
        else:
            # Both branches give the dtypes that a projection would.
            like, _ = jax.eval_shape(projected, given, state.memory)
            new, memory = jax.lax.cond(
                (state.count + 1) % every == 0,
                projected,
                lambda given, memory: (
                    jax.tree.map(lambda u, t: u.astype(t.dtype), given, like),
                    memory,
                ),
                given,
                state.memory,
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        return treedef.unflatten(new), ProjectState(count, memory)

    return optax.GradientTransformationExtraArgs(init, update)


def is_absent(update: Any) -> bool:
    """Whether a leaf gets no update: a frozen one, or one that `optax.masked` took out."""
    return update is None or isinstance(update, optax.MaskedNode)


def _check_every(every: int) -> int:
    try:
        if isinstance(every, bool):
            raise TypeError
        every = operator.index(every)
    except TypeError:
        raise TypeError(f"every={every!r} is not an int; write a number of steps.") from None
    if every < 1:
        raise ValueError(f"every={every} is not allowed; write 1 to project on every step.")
    return every


def keyed(bound: list[Bound]) -> Iterator[tuple[str, Bound]]:
    """Each leaf with the key of its memory: its path, numbered where it is not the first."""
    seen: dict[str, int] = {}
    for leaf_bound in bound:
        path = leaf_bound.path
        number = seen[path] = seen.get(path, 0) + 1
        yield path if number == 1 else f"{path}#{number}", leaf_bound


def remember(params: Any, bind: Binder) -> Any:
    """Checks that rules fit a tree, and starts the memory of the constraints that need one."""
    bound, leaves = bind(params), jax.tree.leaves(params)
    if not bind.remembers:
        return ()
    if not leaves:
        # Optax looks for what is shaped like parameters with a tree without leaves. A leaf in
        # this place stands for any memory.
        return jnp.zeros(())
    return _memory_of(bound, leaves)


def _memory_of(bound: list[Bound], leaves: list[Any]) -> dict[str, Any]:
    return {
        key: constraint.remember(jnp.asarray(leaf))
        for (key, leaf_bound), leaf in zip(keyed(bound), leaves, strict=True)
        if (constraint := leaf_bound.at(0)) is not None and constraint.remembers
    }


def _like(memory: Any, kept: dict[str, Any]) -> Any:
    """A new memory in the container of the old one: NNX has its own mappings."""
    if not kept:
        return memory
    return jax.tree.unflatten(jax.tree.structure(memory), jax.tree.leaves(kept))


def check_memory(memory: Any, bound: list[Bound], leaves: list[Any]) -> None:
    """Raises if a memory is not one of these constraints and leaves."""
    want: Any = ()
    if any(b.constraint is not None and b.constraint.remembers for b in bound):
        want = jax.eval_shape(lambda leaves: _memory_of(bound, leaves), leaves)
    have = dict(memory) if isinstance(memory, Mapping) else {}
    for path in sorted({*have, *want}):
        if path not in want:
            raise ValueError(
                f"The state remembers {path!r}, and no constraint of these rules does: it is the "
                "state of other rules or other parameters. Start with tx.init(params)."
            )
        if path not in have:
            raise ValueError(
                f"The state remembers nothing of {path!r}, which its constraint needs: it is the "
                "state of other rules or other parameters. Start with tx.init(params)."
            )
        old, new = (
            jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree[path])
            for tree in (have, want)
        )
        if old != new:
            raise ValueError(
                f"The state remembers {shown(old)} (shape, dtype) of {path!r}, and its "
                f"constraint needs {shown(new)}: it is the state of other rules or other "
                "parameters. Start with tx.init(params)."
            )


def constrain(
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    state: Any = None,
    layout: Layout | None = None,
    strict: bool = True,
) -> Any:
    """Projects parameters now: at init, after loading or averaging, or after each update.

    Args:
        params: Any tree of arrays.
        rules: As for `project`.
        step: What schedules see; the first update is step 0.
        state: The optimizer's state, for constraints that remember weights at init. Without
            it they take the weights given here for those.
        layout: As for `project`.
        strict: As for `project`.

    Returns:
        The tree with each constrained leaf inside its set, to the bit.

    Raises:
        TypeError: If a rule names a leaf that is not floating-point.
        ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.constrain({"bias": jnp.array([-1.0, 2.0])}, {"bias": oc.non_neg()})
        {'bias': Array([0., 2.], dtype=float32)}
    """
    bind = Binder(rules, layout=layout, strict=strict)
    return constrain_bound(params, bind, step, memory_in(state))[0]


def constrain_bound(
    params: Any, bind: Binder, step: jax.typing.ArrayLike, memory: Any
) -> tuple[Any, Any]:
    """`constrain` with rules that may remember this tree, and with what constraints remember."""
    leaves, treedef = jax.tree.flatten(params)
    bound = bind(params)
    if memory is not None:
        check_memory(memory, bound, leaves)
    new, kept = [], {}
    for (key, leaf_bound), leaf in zip(keyed(bound), leaves, strict=True):
        constraint = leaf_bound.at(step)
        if constraint is not None:
            leaf = jnp.asarray(leaf)
            if constraint.remembers and memory is not None:
                leaf, kept[key] = constraint.advance(leaf, memory[key])
            else:
                leaf = constraint(leaf)
        new.append(leaf)
    return treedef.unflatten(new), _like(memory, kept)


def memory_in(state: Any) -> Any:
    """What constraints remember, out of an optimizer's state; None without one."""
    if state is None:
        return None
    states = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, ProjectState))
    states = [s for s in states if isinstance(s, ProjectState)]
    if not states:
        raise ValueError(
            f"There is no state of project in {shown(type(state))}; pass what tx.init(params) or "
            "tx.update returned, where project is in tx."
        )
    memories = [s.memory for s in states if isinstance(s.memory, Mapping)]
    return {key: value for memory in memories for key, value in memory.items()} or ()


def violations(
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    state: Any = None,
    layout: Layout | None = None,
    strict: bool = True,
) -> dict[str, jax.Array]:
    """How far each constrained leaf is from its set. Runs under `jax.jit`.

    Args:
        params: Any tree of arrays.
        rules: As for `project`.
        step: What schedules see.
        state: As for `constrain`.
        layout: As for `project`.
        strict: As for `project`.

    Returns:
        For the path of each constrained leaf the Euclidean distance to its projection, a
        scalar in float32 or float64.

    Raises:
        TypeError: If a rule names a leaf that is not floating-point.
        ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.violations({"bias": jnp.array([-1.0, 2.0])}, {"bias": oc.non_neg()})
        {'bias': Array(1., dtype=float32)}
    """
    bound = Binder(rules, layout=layout, strict=strict)(params)
    leaves, memory = jax.tree.leaves(params), memory_in(state)
    if memory is not None:
        check_memory(memory, bound, leaves)
    distances: dict[str, jax.Array] = {}
    for (key, leaf_bound), leaf in zip(keyed(bound), leaves, strict=True):
        if (constraint := leaf_bound.at(step)) is not None:
            found = distance(jnp.asarray(leaf), constraint, (memory or {}).get(key))
            # {"a": {"b": ...}, "a/b": ...} has two leaves of one path.
            other = distances.get(leaf_bound.path)
            distances[leaf_bound.path] = found if other is None else jnp.hypot(other, found)
    return distances


def distance(leaf: jax.Array, constraint: Constraint, memory: Any = None) -> jax.Array:
    """Euclidean distance of a leaf to its projection, a scalar in float32 or float64."""
    dtype = _numerics.compute_dtype(leaf.dtype)
    projected = constraint(leaf) if memory is None else constraint.advance(leaf, memory)[0]
    difference = leaf.astype(dtype) - projected.astype(dtype)
    return _numerics.norm(difference, None).reshape(())
