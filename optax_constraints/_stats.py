"""Live statistics: how hard each constraint binds, computed inside the training step."""

import contextlib
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_constraints._constraint import Constraint, moved
from optax_constraints._numerics import (
    compute_dtype,
    in_three_ranges,
    norm_by_sums,
    stored,
    widest,
)
from optax_constraints._rules import Binder
from optax_constraints._text import shown
from optax_constraints._trees import OtherStructureError, rearranged, without_boxes, without_saved
from optax_constraints._walk import (
    Bindings,
    WithStats,
    by_path,
    is_absent,
    like_before,
    parted,
    states_in,
)


class LeafStats(NamedTuple):
    """What `stats` has of one constrained leaf, or of a group of leaves: four scalars."""

    update: jax.Array
    """Euclidean norm of the update that came in, in float32 or float64."""
    correction: jax.Array
    """Euclidean norm of what the projection took away: of ``(p + u) - P(p + u)``."""
    units: jax.Array
    """How many parts are constrained each by itself, int32; 0 if the set does not say."""
    at_bound: jax.Array
    """How many of them are at their bound after the step, int32; -1 if the set does not say."""


def stats(state: Any) -> dict[str, LeafStats]:
    """How hard each constraint binds, as of the last step. Runs under `jax.jit`.

    It reads what `project(rules, stats=True)` has put into its state, and computes nothing. All
    numbers are 0 before the first update, and stay so for a leaf that gets none. With
    ``every=k`` they are those of the last step that projected, whose correction is that of k
    updates.

    `update` and `correction` are of weights as they are stored: an update that rounding
    swallows is no correction. For SGD without momentum, `correction` over the learning rate
    comes to the norm of the constraint's Lagrange multipliers at the optimum. A `correction`
    near `update` says that the optimizer pushes into the bound and does little else.

    Args:
        state: The state of an optimizer with `project(rules, stats=True)` in it, or a
            `TrainState` or an `Optimizer` of `optax_constraints.flax` made with `stats=True`.

    Returns:
        For the path of each constrained leaf, or the name of a group, its numbers.

    Raises:
        ValueError: If there are no statistics in the state, or several of one path.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import optax_constraints as oc
        >>> params = {"bias": jnp.array([0.0, 1.0, 2.0])}
        >>> tx = optax.chain(optax.sgd(1.0), oc.project(oc.non_neg(), stats=True))
        >>> grads = {"bias": jnp.array([4.0, 4.0, 0.0])}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> leaf = oc.stats(state)["bias"]
        >>> [round(float(x), 3) for x in (leaf.update, leaf.correction)]  # 4, 3 of 4, 4
        [5.657, 5.0]
        >>> f"{leaf.at_bound} of {leaf.units} entries are at 0"
        '2 of 3 entries are at 0'
    """
    found = _found(state)
    if not found:
        raise ValueError(
            f"There are no statistics in {shown(type(state))}; write project(rules, stats=True), "
            "and pass what its tx.init(params) or tx.update returned. TrainState.create and "
            "Optimizer of optax_constraints.flax take stats=True, too."
        )
    merged = by_path(found, "have statistics of", "stats(states['generator']) or stats(state[-1])")
    return {key: rearranged(own, _FIELDS) for key, own in merged.items()}


# In its place any leaf will do.
_FIELDS = LeafStats(*LeafStats._fields)  # pyright: ignore[reportArgumentType]


def _found(state: Any) -> list[Mapping[str, Any]]:
    """The statistics of each state of `project`, and of each train state or optimizer."""
    found = {}
    for known in states_in(state):
        own = parted(known["memory"] if isinstance(known, Mapping) else known.memory)[1]
        if own is not None:
            found[id(own)] = _plain(own)
        for inner in _found(getattr(known, "opt_state", ())):
            found[id(inner)] = inner
    return list(found.values())


def _plain(own: Any) -> dict[str, Any]:
    return without_boxes(dict(own)) if isinstance(own, Mapping) else {}


# What `project` and the wrappers for Flax call.


def start(bind: Binder, params: Any) -> Any:
    """What `Binder.start` returns, with statistics that are zero."""
    memory = bind.start(params)
    # As there, a leaf stands for whatever it may be.
    return WithStats(memory, _zeros(bind(params))) if jax.tree.leaves(params) else jnp.zeros(())


def _zeros(bound: Bindings) -> dict[str, LeafStats]:
    zeros = {}
    for key, leaf in bound.keyed:
        if leaf.constraint is not None:
            dtype = compute_dtype(*(array.dtype for array in leaf.leaves if array is not None))
            # Each an array of its own: two of a state may not be one buffer if it is donated.
            kinds = (dtype, dtype, jnp.int32, jnp.int32)
            zeros[key] = LeafStats(*(jnp.zeros((), kind) for kind in kinds))
    return zeros


def recall(bound: Bindings, memory: Any) -> dict[str, LeafStats]:
    """The statistics beside a memory, however they were restored; zeros where there are none."""
    zeros = _zeros(bound)
    have = without_saved(_plain(parted(memory)[1]), zeros)
    for key in zeros:
        with contextlib.suppress(OtherStructureError, KeyError):
            known = rearranged(have[key], zeros[key])
            zeros[key] = jax.tree.map(lambda x, z: jnp.asarray(x, z.dtype), known, zeros[key])
    return zeros


def kept(old: Any, memory: dict[str, Any], own: dict[str, LeafStats]) -> Any:
    """A new memory with statistics, in the containers of the old one."""
    before, had = parted(old)
    if not own:
        return old
    new = WithStats(like_before(before, memory), own)
    if had is not None:
        with contextlib.suppress(OtherStructureError):  # that of other rules
            return rearranged(new, old)
    return new


def of_update(
    constraint: Constraint, params: Any, update: Any, projected: Any, memory: Any, prepared: Any
) -> LeafStats:
    """The statistics of one leaf or group, whose update was replaced by another.

    Args:
        constraint: The constraint with its numbers at this step.
        params: The weights before the step.
        update: The update that came in.
        projected: The update that goes out.
        memory: What is remembered of the leaf.
        prepared: What `prepare` returned.

    Returns:
        The statistics.
    """
    wide = all(p.dtype == compute_dtype(p.dtype) for p in jax.tree.leaves(params))
    if wide and (known := constraint.taken(params, prepared, memory)) is not None:
        return _measured(update, None, *known)
    without = jax.tree.map(moved, params, update)
    weights = jax.tree.map(moved, params, projected)
    return _of_step(constraint, update, without, weights)


def of_entries(constraint: Constraint, params: Any, update: Any, memory: Any) -> LeafStats:
    """`of_update` of an elementwise set, whose projection costs less than to wait for it."""
    without = jax.tree.map(moved, params, update)
    return _of_step(constraint, update, without, constraint.aim(without, memory)[0])


def renewed(
    before: dict[str, LeafStats],
    bound: Bindings,
    params: Any,
    updates: Any,
    measured: list[LeafStats],
) -> dict[str, LeafStats]:
    """Statistics with those of the leaves that moved, in the order of the tree."""
    came = jax.tree.structure(params).flatten_up_to(updates)
    moving = [
        key
        for key, leaf in bound.keyed
        if leaf.constraint is not None and not any(is_absent(came[place]) for place in leaf.places)
    ]
    new = zip(moving, measured, strict=True)
    return {**before, **{key: _like(before[key], own) for key, own in new}}


def of_weights(
    bound: Bindings,
    params: Any,
    moved: Any,
    projected: Any,
    memory: Any,
    *,
    step: jax.typing.ArrayLike,
    extra: Mapping[str, Any] | None,
) -> dict[str, LeafStats]:
    """The statistics of a step that moved weights and then projected them."""
    before, without = jax.tree.leaves(params), jax.tree.leaves(moved)
    new = recall(bound, memory)
    visits = bound.visits(projected, {}, step=step, extra=extra)
    for (key, leaf), visit in zip(bound.keyed, visits, strict=True):
        if visit.constraint is not None:
            were, are = leaf.of(before), leaf.of(without)
            update = jax.tree.map(_minus, are, were)
            own = _of_step(visit.constraint, update, are, visit.weights)
            new[key] = _like(new[key], own)
    return new


def _of_step(constraint: Constraint, update: Any, without: Any, weights: Any) -> LeafStats:
    """The statistics of one leaf or group, from the weights without the projection and with it."""
    without, weights = (jax.tree.map(stored, tree) for tree in (without, weights))
    # Not of the difference of updates, in which the rounding of each is left.
    correction = jax.tree.map(_minus, without, weights)
    return _measured(update, correction, None, constraint.on_bound(weights))


def _measured(
    update: Any, correction: Any, known: jax.Array | None, at_bound: jax.Array | None
) -> LeafStats:
    """The statistics, of a correction whose norm is known or not."""
    trees = (update,) if known is not None else (update, correction)
    norms, count = _in_one_pass(trees, at_bound)
    units = jnp.int32(0 if at_bound is None else at_bound.size)
    return LeafStats(norms[0], norms[-1] if known is None else known, units, count)


def _like(old: LeafStats, new: LeafStats) -> LeafStats:
    """The new statistics in the dtypes of the old."""
    return jax.tree.map(lambda x, z: x.astype(z.dtype), new, old)


def _minus(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = compute_dtype(a.dtype, b.dtype)
    return a.astype(dtype) - b.astype(dtype)


def _in_one_pass(
    trees: Sequence[Any], at_bound: jax.Array | None
) -> tuple[list[jax.Array], jax.Array]:
    """The norms of trees of arrays, and how many bools are true, or -1 without any.

    XLA's CPU backend would take one sum after the other, and keep copies of what all of them read.
    """
    count, sums = jnp.int32(-1), []
    for arrays in zip(*map(jax.tree.leaves, trees), strict=True):
        dtype = compute_dtype(*(x.dtype for x in arrays))
        terms = [jnp.square(x) for own in arrays for x in in_three_ranges(own.astype(dtype))]
        if at_bound is not None and at_bound.shape == arrays[0].shape:
            *own, count = _sums(*terms, at_bound.astype(jnp.int32))
            at_bound = None
        else:
            own = _sums(*terms)
        sums.append(own)
    if at_bound is not None:
        count = jnp.sum(at_bound, dtype=jnp.int32)
    total = [_total(*own) for own in zip(*sums, strict=True)]
    return [norm_by_sums(*total[i : i + 3]) for i in range(0, len(total), 3)], count


def _total(*own: jax.Array) -> jax.Array:
    dtype = widest(*(x.dtype for x in own))
    return functools.reduce(operator.add, (x.astype(dtype) for x in own))


def _sums(*terms: jax.Array) -> list[jax.Array]:
    """The sums over arrays of one shape."""

    def together(*terms: jax.Array) -> Any:
        zeros = tuple(jnp.zeros((), x.dtype) for x in terms)
        last = (terms[0].ndim - 1,)
        return lax.reduce(terms, zeros, lambda a, b: tuple(map(operator.add, a, b)), last)

    def apart(*terms: jax.Array) -> Any:
        return tuple(jnp.sum(x, axis=-1, dtype=x.dtype) for x in terms)

    rows = lax.stop_gradient(terms)
    if rows[0].ndim:
        rows = lax.platform_dependent(*rows, cpu=together, default=apart)
    return [jnp.sum(x, dtype=x.dtype) for x in rows]
