"""The verbs that compute: `project`, `constrain`, `violations`."""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_constraints import _numerics, _stats
from optax_constraints._axes import Layout
from optax_constraints._constraint import Constraint
from optax_constraints._numerics import in_turn, is_readable
from optax_constraints._patterns import Rules
from optax_constraints._private import called_from_optax
from optax_constraints._rules import Binder
from optax_constraints._text import warn
from optax_constraints._trees import check_arrays
from optax_constraints._walk import Bindings, Visit, like_before, memory_in, parted


class ProjectState(NamedTuple):
    """State of `project`: an ordinary pytree."""

    # Not `count`, so that `optax.tree.get(state, "count")` finds one in the chain: Adam's.
    updates_seen: jax.Array
    """How many updates there have been, an int32 scalar; schedules see it."""
    memory: Any = ()
    """By path, what constraints remember of their leaves, such as norms at init; with
    ``stats=True`` that beside the statistics, which `stats` reads."""
    has_memory_of_constraints = True  # no field


def project(
    rules: Rules,
    *,
    every: int = 1,
    layout: Layout | None = None,
    strict: bool = True,
    stats: bool = False,
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
            parameter, or a mapping (or pairs) from pattern to constraint or None. The first
            pattern that matches a leaf wins.
        every: Project on every so many steps only; the updates between pass through.
        layout: What `layout(model)` of `optax_constraints.flax` says of each leaf. With it,
            `axis="fan_in"` is exact for every layer.
        strict: Whether a rule that matches no leaf is an error. `False` is for trees seen
            in part.
        stats: Whether the state has how hard each constraint binds, for `stats(state)`. That
            is one more pass over each constrained leaf.

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
        memory = _stats.start(bind, params) if stats else bind.start(params)
        warn_of_lost_steps(bind(params), every)
        return ProjectState(jnp.zeros((), jnp.int32), memory)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, ProjectState]:
        if params is None:
            raise ValueError("project needs the parameters; write tx.update(grads, state, params).")
        if isinstance(state, Mapping):  # restored without its type
            state = ProjectState(**state)
        bound = bind(params)
        # Their other branch has updates as they came in, and both must have one dtype.
        keep_dtype = called_from_optax(*_CONDITIONS)

        def projected(updates: Any, memory: dict[str, Any], shown: dict[str, Any]) -> Any:
            before = None

            def move(constraint: Constraint, p: Any, own: Any, u: Any) -> tuple[Any, Any]:
                nonlocal before
                if constraint.unitwise:
                    u = jax.tree.map(lambda u: in_turn(u, before), u)
                prepared = constraint.prepare(p, u, own)
                before = before if prepared is None else prepared
                moved, own = constraint.update(p, u, own, prepared)
                if keep_dtype:
                    moved = _narrowed(constraint, p, moved, u)
                return moved, own

            now: Any = {"step": state.updates_seen, "extra": extra}
            new, memory = bound.map(move, params, memory, updates=updates, **now)
            if stats:
                shown = _stats.of_updates(bound, params, updates, new, shown, **now)
            return new, memory, shown

        def passed(updates: Any, memory: dict[str, Any], shown: dict[str, Any]) -> Any:
            # In the dtypes that a projection would give.
            like, *_ = jax.eval_shape(projected, updates, memory, shown)
            return jax.tree.map(lambda u, t: u.astype(t.dtype), updates, like), memory, shown

        due = True if every == 1 else (state.updates_seen + 1) % every == 0
        old, _ = parted(state.memory)
        known = bound.recall(old), _stats.recall(bound, state.memory) if stats else {}
        if isinstance(due, Tracer):
            new, kept, shown = jax.lax.cond(due, projected, passed, updates, *known)
        else:  # a condition would be compiled in each step
            new, kept, shown = (projected if due else passed)(updates, *known)
        memory = _stats.kept(state.memory, kept, shown) if stats else like_before(old, kept)
        seen = jnp.asarray(optax.safe_increment(state.updates_seen))
        return new, state._replace(updates_seen=seen, memory=memory)

    return optax.GradientTransformationExtraArgs(init, update)


def warn_of_lost_steps(bound: Bindings, every: int = 1) -> None:
    """Warns of sets whose projection undoes small updates."""
    together = f"of {every} steps together that are " if every > 1 else ""
    found = ((leaf.path, leaf.constraint) for leaf in bound if leaf.constraint is not None)
    losing = [(path, constraint) for path, constraint in found if constraint.loses_steps]
    if losing:
        path, constraint = losing[0]
        more = f" and {len(losing) - 1} more" if len(losing) > 1 else ""
        warn(
            f"{_cut(constraint)} on {path!r}{more}: updates {together}shorter "
            "than half a gap between values are lost, since the projection leads back to where "
            "the weights were. Let the optimizer train these leaves free, take the loss at "
            "straight_through(params, rules), and write constrain(params, rules) for the weights "
            "to deploy."
        )


def _cut(constraint: Constraint) -> str:
    """How a warning names a set that may have many values."""
    text = str(constraint)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _narrowed(constraint: Constraint, params: Any, moved: Any, updates: Any) -> Any:
    """Updates in the dtypes that they came in, after which entries of entrywise sets hold."""
    narrow = jax.tree.map(lambda m, u: m.astype(u.dtype), moved, updates)
    same = jax.tree.map(lambda m, u: m.dtype == u.dtype, moved, updates)
    return moved if all(jax.tree.leaves(same)) else constraint.keep_inside(params, narrow)


# Of Optax, what chooses between the updates of a transformation and others.
_CONDITIONS = ("apply_if_finite", "conditionally_mask", "conditionally_transform")


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


def constrain(
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    state: Any = None,
    extra: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    strict: bool = True,
) -> Any:
    """Projects parameters now: at init, after loading or averaging, or after each update.

    Args:
        params: Any tree of arrays. It is not changed. A module of Equinox or Flax NNX is such a
            tree, too, and comes back as a new module; NNX variables that it shares come back
            as copies. To change an NNX module in place, and leave shared variables shared:
            ``nnx.update(model, constrain(nnx.state(model, nnx.Param), rules))``.
        rules: As for `project`.
        step: What schedules see; the first update is step 0.
        state: The optimizer's state, for constraints that remember weights at init. Without
            it the weights given here are those at init.
        extra: What `arg` reads, by name: the extra arguments of `tx.update`.
        layout: What `layout(model)` of `optax_constraints.flax` says of each leaf.
        strict: Whether a rule that matches no leaf is an error. `False` is for trees seen
            in part.

    Returns:
        The tree with each constrained leaf inside its set: as `project` goes through a
        difference and this does not, without the rounding of that.

    Raises:
        TypeError: If a rule names a leaf that is not floating-point, or there are no arrays, as
            in a Linen module.
        ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.constrain({"bias": jnp.array([-1.0, 2.0])}, {"bias": oc.non_neg()})
        {'bias': Array([0., 2.], dtype=float32)}
    """
    bind, memory = bound_now(params, rules, state, layout, strict)
    new, _ = constrain_bound(params, bind, memory, step=step, extra=extra)
    _warn_of_one_value(bind(params), params, new)
    return new


def bound_now(
    params: Any, rules: Rules, state: Any, layout: Layout | None, strict: bool
) -> tuple[Binder, Any]:
    """Rules for a verb that projects now, and what constraints remember."""
    check_arrays(params)
    bind = Binder(rules, layout=layout, strict=strict)
    return bind, bind.start(params) if state is None else memory_in(state)


def advance(constraint: Constraint, weights: Any, memory: Any) -> tuple[Any, Any]:
    """What `constrain` puts in the place of weights, and what to remember."""
    return constraint.advance(weights, memory)


def constrain_bound(
    params: Any,
    bind: Binder,
    memory: Any,
    *,
    step: jax.typing.ArrayLike,
    extra: Mapping[str, Any] | None,
    before: Any = None,
    function: Callable[..., tuple[Any, Any]] = advance,
) -> tuple[Any, Any]:
    """`constrain` with rules that may remember this tree, and with what constraints remember.

    Beside a memory that has statistics, `before` is the parameters before they moved.
    """
    bound, now = bind(params), {"step": step, "extra": extra}
    old, shown = parted(memory)
    new, kept = bound.map(function, params, bound.recall(old), **now)
    if shown is None:
        return new, like_before(memory, kept)
    shown = _stats.of_weights(bound, before, params, new, memory, **now)
    return new, _stats.kept(memory, kept, shown)


def _warn_of_one_value(bound: Bindings, params: Any, new: Any) -> None:
    """Warns, where numbers can be read, of weights that a grid makes all the same."""
    before, after = jax.tree.leaves(params), jax.tree.leaves(new)
    for leaf in bound:
        if leaf.constraint is None or not leaf.constraint.loses_steps:
            continue
        both = [[leaves[place] for place in leaf.places] for leaves in (before, after)]
        sizes = [np.size(part) for part in both[0]]
        if sum(sizes) < 2 or not all(sizes) or not all(map(is_readable, both[0] + both[1])):
            continue
        (low, high), (least, most) = jax.device_get(_ranges(both))
        if least == most and low != high:
            warn(
                f"constrain: {_cut(leaf.constraint)} makes every entry of {leaf.path!r} {least:g}, "
                f"and they were from {low:.3g} to {high:.3g}. Scale the values to the weights, "
                "such as grid([-s, 0, s]) with s of the size of most of them."
            )


@jax.jit
def _ranges(both: Any) -> Any:
    """The least and the greatest entry, in float32 or wider, of each list of arrays."""
    dtype = _numerics.compute_dtype(*(part.dtype for part in jax.tree.leaves(both)))

    def ends(parts: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        wide = [part.astype(dtype) for part in parts]
        least = functools.reduce(jnp.minimum, map(jnp.min, wide))
        return least, functools.reduce(jnp.maximum, map(jnp.max, wide))

    return [ends(parts) for parts in both]


def visits(
    verb: str,
    params: Any,
    rules: Rules,
    step: jax.typing.ArrayLike,
    state: Any,
    extra: Mapping[str, Any] | None,
    layout: Layout | None,
    strict: bool,
) -> Iterator[Visit]:
    """Each leaf with its constraint at one step, for a verb that changes nothing.

    Raises:
        ValueError: If there is no state, and a constraint remembers weights at init.
    """
    check_arrays(params)
    bound = Binder(rules, layout=layout, strict=strict)(params)
    for leaf in bound:
        if state is None and leaf.remembers:
            raise ValueError(
                f"{verb}: {leaf.constraint} on {leaf.path!r} is relative to what the "
                f"weights were at init, which only the state of project knows; write {verb}"
                "(params, rules, state=state) with the state of an optimizer that has project "
                "in it."
            )
    memory = {} if state is None else bound.recall(memory_in(state))
    return bound.visits(params, memory, step=step, extra=extra)


def violations(  # noqa: D417  # what verbs share is said once, in `constrain`
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    state: Any = None,
    extra: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    strict: bool = True,
) -> dict[str, jax.Array]:
    """How far each constrained leaf is from its set. Runs under `jax.jit`.

    After a projection that is zero, up to rounding. So it is a check of a training loop, and a
    penalty for weights that nothing projects. How hard constraints bind while they are held is
    in `stats`.

    Args:
        params: Any tree of arrays.
        rules: As for `project`.
        step, state, extra, layout, strict: As for `constrain`; a bound that is relative to init
            needs the state.

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
    distances: dict[str, jax.Array] = {}
    found = visits("violations", params, rules, step, state, extra, layout, strict)
    for bound, constraint, weights, memory in found:
        if constraint is None:
            continue
        away = jax.tree.leaves(distance(weights, constraint, memory))
        for path, own in zip(bound.paths, away, strict=True):
            # {"a": {"b": ...}, "a/b": ...} has two leaves of one path.
            other = distances.get(path)
            distances[path] = own if other is None else jnp.hypot(other, own)
    return distances


def distance(weights: Any, constraint: Constraint, memory: Any = ()) -> Any:
    """Euclidean distance of each array to its projection, scalars in float32 or float64."""
    projected, _ = constraint.advance(weights, memory)

    def away(w: jax.Array, target: jax.Array) -> jax.Array:
        dtype = _numerics.compute_dtype(w.dtype)
        difference = w.astype(dtype) - target.astype(dtype)
        return _numerics.norm(difference, None).reshape(())

    return jax.tree.map(away, weights, projected)
