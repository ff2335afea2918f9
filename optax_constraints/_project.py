"""The verbs that compute: `project`, `constrain`, `violations`."""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_constraints import _numerics
from optax_constraints._axes import Layout
from optax_constraints._constraint import Constraint
from optax_constraints._private import called_from_optax
from optax_constraints._rules import Binder, Bound, Rules, keyed, without_boxes
from optax_constraints._text import shown


class ProjectState(NamedTuple):
    """State of `project`: an ordinary pytree."""

    # Not `count`, so that `optax.tree.get(state, "count")` finds one in the chain: Adam's.
    updates_seen: jax.Array
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
        if isinstance(state, Mapping):  # restored without its type
            state = ProjectState(**state)
        leaves, treedef = jax.tree.flatten(params)
        given = treedef.flatten_up_to(updates)
        bound = bind(params)
        remembered = recall(state.memory, bound)
        # Their other branch has updates as they came in, and both must have one dtype.
        keep_dtype = called_from_optax(*_CONDITIONS)

        def projected(given: list[Any], memory: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
            new, kept, before = [], {}, None
            for (key, leaf_bound), p, u in zip(keyed(bound), leaves, given, strict=True):
                constraint = leaf_bound.at(state.updates_seen)
                if constraint is not None:
                    own = memory[key] if constraint.remembers else ()
                    if not is_absent(u):
                        p, u = jnp.asarray(p), jnp.asarray(u)
                        moved, own, before = constraint.update(p, u, own, before)
                        if keep_dtype and moved.dtype != u.dtype:
                            moved = constraint.keep_inside(p, moved.astype(u.dtype))
                        u = moved
                    if constraint.remembers:
                        kept[key] = own
                new.append(u)
            return new, kept

        def passed(given: list[Any], memory: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
            # In the dtypes that a projection would give.
            like, _ = jax.eval_shape(projected, given, memory)
            return jax.tree.map(lambda u, t: u.astype(t.dtype), given, like), memory

        due = True if every == 1 else (state.updates_seen + 1) % every == 0
        if isinstance(due, Tracer):
            new, kept = jax.lax.cond(due, projected, passed, given, remembered)
        else:  # a condition would be compiled in each step
            new, kept = (projected if due else passed)(given, remembered)
        seen = jnp.asarray(optax.safe_increment(state.updates_seen))
        memory = like_before(state.memory, kept)
        return treedef.unflatten(new), state._replace(updates_seen=seen, memory=memory)

    return optax.GradientTransformationExtraArgs(init, update)


# Of Optax, what chooses between the updates of a transformation and others.
_CONDITIONS = ("apply_if_finite", "conditionally_mask", "conditionally_transform")


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


def remember(params: Any, bind: Binder) -> Any:
    """Checks that rules fit a tree, and starts the memory of the constraints that need one."""
    bound, leaves = bind(params), jax.tree.leaves(params)
    if not bind.remembers:
        return ()
    if not leaves:
        # Optax looks for what is shaped like parameters with a tree without leaves. A leaf in
        # this place stands for any memory.
        return jnp.zeros(())
    pairs = zip(keyed(bound), leaves, strict=True)
    rememberers = {key: (own, leaf) for (key, own), leaf in pairs if own.remembers}
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in rememberers.values()):
        return {key: own.remember(leaf) for key, (own, leaf) in rememberers.items()}
    # As Adam does, arrays of the right shapes. What should be put in their place and is not,
    # must not pass for norms.
    return jax.tree.map(_unset, {key: own.memory for key, (own, _) in rememberers.items()})


def _unset(like: jax.ShapeDtypeStruct) -> jax.Array:
    value = np.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
    return jnp.asarray(np.full(like.shape, value, like.dtype))


def recall(memory: Any, bound: list[Bound]) -> dict[str, Any]:
    """What a state remembers, as the constraints left it.

    A state that was saved may come back with NumPy arrays, lists in place of tuples and other
    mappings; what belongs together has the same key.

    Args:
        memory: The memory of a state.
        bound: The rules, bound to the leaves.

    Returns:
        By key, what each constraint remembers, as JAX arrays.

    Raises:
        ValueError: If it is not the memory of these constraints and leaves.
    """
    want = {key: own.memory for key, own in keyed(bound) if own.remembers}
    have = without_boxes(dict(memory)) if isinstance(memory, Mapping) else {}
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
        try:
            have[path] = _rearranged(have[path], want[path])
            fits = jax.tree.map(_shape_and_dtype, have[path]) == jax.tree.map(
                _shape_and_dtype, want[path]
            )
        except _OtherStructureError:
            fits = False
        if not fits:
            old, new = (jax.tree.map(_shape_and_dtype, tree[path]) for tree in (have, want))
            raise ValueError(
                f"The state remembers {shown(old)} (shape, dtype) of {path!r}, and its "
                f"constraint needs {shown(new)}: it is the state of other rules or other "
                "parameters. Start with tx.init(params)."
            )
    return jax.tree.map(jnp.asarray, have)


def like_before(memory: Any, kept: dict[str, Any]) -> Any:
    """A new memory in the containers of the old one."""
    return _rearranged(kept, memory) if kept else memory


def _shape_and_dtype(x: Any) -> Any:
    return jnp.shape(x), jnp.result_type(x)


class _OtherStructureError(Exception):
    pass


def _rearranged(tree: Any, like: Any) -> Any:
    """The leaves of one tree in the containers of another, paired by key or by number."""
    if not jax.tree.leaves(like) and not jax.tree.leaves(tree):
        return like  # of nothing, containers may be lost
    own, other = (_children(t) for t in (tree, like))
    if own is None or other is None:
        if own is other:
            return tree
        raise _OtherStructureError
    if set(own[0]) != set(other[0]):
        raise _OtherStructureError
    return other[1].unflatten([_rearranged(own[0][key], child) for key, child in other[0].items()])


def _children(tree: Any) -> tuple[dict[Any, Any], Any] | None:
    """What stands below the root of a tree, by key or number, and the root; None for a leaf."""
    found, root = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if jax.tree_util.treedef_is_leaf(root):
        return None
    return {jax.tree_util.keystr(keys, simple=True): child for keys, child in found}, root


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
            it the weights given here are those at init.
        layout: As for `project`.
        strict: As for `project`.

    Returns:
        The tree with each constrained leaf inside its set: as `project` goes through a
        difference and this does not, without the rounding of that.

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
    if state is None:
        return _projected(params, bind(params), step, remember(params, bind) or {})[0]
    return constrain_bound(params, bind, step, memory_in(state))[0]


def constrain_bound(
    params: Any, bind: Binder, step: jax.typing.ArrayLike, memory: Any
) -> tuple[Any, Any]:
    """`constrain` with rules that may remember this tree, and with what constraints remember."""
    bound = bind(params)
    new, kept = _projected(params, bound, step, recall(memory, bound))
    return new, like_before(memory, kept)


def _projected(
    params: Any, bound: list[Bound], step: jax.typing.ArrayLike, remembered: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The projected parameters, and what the constraints now remember."""
    leaves, treedef = jax.tree.flatten(params)
    new, kept = [], {}
    for (key, leaf_bound), leaf in zip(keyed(bound), leaves, strict=True):
        constraint = leaf_bound.at(step)
        if constraint is not None:
            leaf, own = constraint.advance(jnp.asarray(leaf), remembered.get(key, ()))
            if constraint.remembers:
                kept[key] = own
        new.append(leaf)
    return treedef.unflatten(new), kept


def memory_in(state: Any) -> Any:
    """What constraints remember, out of an optimizer's state."""
    states = [s for s in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(s)]
    if not states:
        raise ValueError(
            f"There is no state of project in {shown(type(state))}; pass what tx.init(params) or "
            "tx.update returned, where project is in tx."
        )
    memory: dict[str, Any] = {}
    memories = [s["memory"] if isinstance(s, Mapping) else s.memory for s in states]
    found = {id(memory): memory for memory in memories}
    for own in (own for own in found.values() if isinstance(own, Mapping)):
        twice = sorted({*memory} & {*own})
        if twice:
            raise ValueError(
                f"There are several states of project here that remember {twice[0]!r}, such as "
                "those of two models, or of a chain with project in it twice; pass the one of "
                "these parameters alone, as in state=states['generator'] or state=state[-1]."
            )
        memory.update(own)
    return memory or ()


def _is_state(x: Any) -> bool:
    """Whether something has the memory of constraints, like a state of `project`.

    That may be restored without its type; train states and optimizers say it of themselves.
    """
    if isinstance(x, Mapping):
        return set(x) == set(ProjectState._fields)
    return isinstance(x, ProjectState) or getattr(type(x), "has_memory_of_constraints", False)


def recall_for(verb: str, state: Any, bound: list[Bound]) -> dict[str, Any]:
    """What an optimizer's state remembers, for a verb that cannot do without it.

    Raises:
        ValueError: If there is no state, and a constraint remembers weights at init.
    """
    if state is not None:
        return recall(memory_in(state), bound)
    for leaf_bound in bound:
        if leaf_bound.remembers:
            raise ValueError(
                f"{verb}: {leaf_bound.constraint} on {leaf_bound.path!r} is relative to what the "
                f"weights were at init, which only the state of project knows; write {verb}"
                "(params, rules, state=state) with the state of an optimizer that has project "
                "in it."
            )
    return {}


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
        state: The optimizer's state; needed if a bound is relative to init.
        layout: As for `project`.
        strict: As for `project`.

    Returns:
        For the path of each constrained leaf the Euclidean distance to its projection, a
        scalar in float32 or float64.

    Raises:
        TypeError: If a rule names a leaf that is not floating-point.
        ValueError: If a rule matches no leaf, a leaf does not have the axis asked for, or a
            bound is relative to init and there is no state.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.violations({"bias": jnp.array([-1.0, 2.0])}, {"bias": oc.non_neg()})
        {'bias': Array(1., dtype=float32)}
    """
    bound = Binder(rules, layout=layout, strict=strict)(params)
    leaves = jax.tree.leaves(params)
    remembered = recall_for("violations", state, bound)
    distances: dict[str, jax.Array] = {}
    for (key, leaf_bound), leaf in zip(keyed(bound), leaves, strict=True):
        if (constraint := leaf_bound.at(step)) is not None:
            found = distance(jnp.asarray(leaf), constraint, remembered.get(key, ()))
            # {"a": {"b": ...}, "a/b": ...} has two leaves of one path.
            other = distances.get(leaf_bound.path)
            distances[leaf_bound.path] = found if other is None else jnp.hypot(other, found)
    return distances


def distance(leaf: jax.Array, constraint: Constraint, memory: Any = ()) -> jax.Array:
    """Euclidean distance of a leaf to its projection, a scalar in float32 or float64."""
    dtype = _numerics.compute_dtype(leaf.dtype)
    projected, _ = constraint.advance(leaf, memory)
    difference = leaf.astype(dtype) - projected.astype(dtype)
    return _numerics.norm(difference, None).reshape(())
