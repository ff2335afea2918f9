"""Live statistics: how hard each constraint binds, computed inside the training step."""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_constraints._constraint import Constraint
from optax_constraints._numerics import compute_dtype, norm_of, row_sums, stored
from optax_constraints._rules import Binder
from optax_constraints._sharding import vary_like
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
    """Euclidean norm of the update that came in, in float32 or float64; up to the rounding of
    the weights where these are in such a dtype, too."""
    correction: jax.Array
    """Euclidean norm of what the projection took away: of ``(p + u) - P(p + u)``."""
    units: jax.Array
    """How many parts are constrained each by itself, int32; 0 if the set does not say."""
    at_bound: jax.Array
    """How many of them are at their bound after the step, int32; -1 if the set does not say."""


def stats(state: Any) -> dict[str, LeafStats]:
    """How hard each constraint binds, as of the last step. Runs under `jax.jit`.

    It reads what `project(rules, stats=True)` has put into its state, and computes nothing. All
    numbers are 0 before the first update, and stay 0 for a leaf that gets no update. With
    ``every=k`` they are those of the last step that projected: `update` is that of one step,
    `correction` that of k steps.

    A `correction` near `update` says that the optimizer pushes into the bound and does little else.
    For SGD without momentum, `correction` over the learning rate is, at an optimum, the norm of the
    constraint's Lagrange multipliers.

    `correction` is measured on weights as they are stored, so an update that is lost in rounding
    does not count. The same is true of `update` under norms and elementwise sets, for weights in
    float32 or float64.

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
    constraint: Constraint, params: Any, update: Any, memory: Any, prepared: Any
) -> LeafStats | None:
    """The statistics of one leaf or group that are known before the weights move.

    XLA's CPU backend writes down what two sums read, and keeps the weights of before for a sum
    that does not come before the step. So what an optimizer computes is read once, where it is
    added to the weights, and the update is what that has changed.

    Args:
        constraint: The constraint with its numbers at this step.
        params: The weights before the step.
        update: The update that came in.
        memory: What is remembered of the leaf.
        prepared: What `prepare` returned.

    Returns:
        The statistics; or None where they take the projection, for `of_step`.
    """
    if (
        not _are_wide(params)
        or (known := constraint.taken(params, update, prepared, memory)) is None
    ):
        return None
    total, correction, at_bound = known
    return LeafStats(norm_of(_minus, total, params), correction, *_counts(at_bound))


def of_entries(
    constraint: Constraint, params: Any, update: Any, total: Any, memory: Any
) -> LeafStats:
    """`of_update` of an elementwise set, of which the projection is part of each sum.

    Args:
        constraint: The constraint with its numbers at this step.
        params: The weights before the step.
        update: The update that came in.
        total: The weights after it.
        memory: What is remembered of the leaf.

    Returns:
        The statistics.
    """

    def allowed(total: Any) -> Any:
        return jax.tree.map(stored, constraint.aim(total, memory)[0])

    total = jax.tree.map(stored, total)
    length = norm_of(_minus, total, params) if _are_wide(params) else norm_of(_same, update)

    def away(total: Any) -> Any:
        return _minus(total, allowed(total))

    at_bound = constraint.on_bound(allowed(total))
    # Of a part, fewer entries count.
    if at_bound is not None and at_bound.shape == getattr(total, "shape", None):
        terms = jnp.square(away(total)), at_bound.astype(jnp.int32)
        # Which entries are held may be a constant, and the same on all devices.
        squares, count = row_sums(*vary_like(terms, total))
        correction = norm_of(away, total, squares=squares)
        return LeafStats(length, correction, jnp.int32(at_bound.size), count)
    return LeafStats(length, norm_of(away, total), *_counts(at_bound))


def of_step(constraint: Constraint, update: Any, without: Any, weights: Any) -> LeafStats:
    """The statistics of one leaf or group after the step.

    Args:
        constraint: The constraint with its numbers at this step.
        update: The update that came in.
        without: The weights after it.
        weights: The weights after the update that went out.

    Returns:
        The statistics.
    """
    without, weights = (jax.tree.map(stored, tree) for tree in (without, weights))
    # Not of the difference of updates, in which the rounding of each is left.
    correction = norm_of(_minus, without, weights)
    return LeafStats(norm_of(_same, update), correction, *_counts(constraint.on_bound(weights)))


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
            update = _minus(are, were)
            own = of_step(visit.constraint, update, are, visit.weights)
            new[key] = _like(new[key], own)
    return new


def _like(old: LeafStats, new: LeafStats) -> LeafStats:
    """The new statistics in the dtypes of the old."""
    return jax.tree.map(lambda x, z: x.astype(z.dtype), new, old)


def _counts(at_bound: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """How many units there are, and how many are at their bound."""
    if at_bound is None:
        return jnp.int32(0), jnp.int32(-1)
    return jnp.int32(at_bound.size), jnp.sum(at_bound, dtype=jnp.int32)


def _are_wide(tree: Any) -> bool:
    return all(x.dtype == compute_dtype(x.dtype) for x in jax.tree.leaves(tree))


def _same(x: Any) -> Any:
    return x


def _minus(a: Any, b: Any) -> Any:
    def minus(a: jax.Array, b: jax.Array) -> jax.Array:
        dtype = compute_dtype(a.dtype, b.dtype)
        return a.astype(dtype) - b.astype(dtype)

    return jax.tree.map(minus, a, b)
