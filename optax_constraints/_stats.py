"""Live statistics: how hard each constraint binds, computed inside the training step."""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_constraints._constraint import Constraint, moved
from optax_constraints._numerics import compute_dtype, norm, stored, widest
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


def of_updates(
    bound: Bindings,
    params: Any,
    updates: Any,
    projected: Any,
    before: dict[str, LeafStats],
    *,
    step: jax.typing.ArrayLike,
    extra: Mapping[str, Any] | None,
) -> dict[str, LeafStats]:
    """The statistics of a step that replaced updates by others; without an update those before."""
    treedef = jax.tree.structure(params)
    came, went = treedef.flatten_up_to(updates), treedef.flatten_up_to(projected)
    new = dict(before)
    visits = bound.visits(params, {}, step=step, extra=extra)
    for (key, leaf), visit in zip(bound.keyed, visits, strict=True):
        if visit.constraint is None or any(is_absent(came[place]) for place in leaf.places):
            continue
        update = jax.tree.map(jnp.asarray, leaf.of(came))
        without = jax.tree.map(moved, visit.weights, update)
        weights = jax.tree.map(moved, visit.weights, leaf.of(went))
        new[key] = _measured(visit.constraint, update, without, weights, before[key])
    return new


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
            new[key] = _measured(visit.constraint, update, are, visit.weights, new[key])
    return new


def _measured(
    constraint: Constraint, update: Any, without: Any, weights: Any, like: LeafStats
) -> LeafStats:
    """The statistics of one leaf or group.

    Args:
        constraint: The constraint with its numbers at this step.
        update: The update.
        without: The weights as they would be without the projection.
        weights: The weights as they are.
        like: Statistics of the dtypes that these are to have.

    Returns:
        The statistics.
    """
    without, weights = (jax.tree.map(stored, tree) for tree in (without, weights))
    at_bound = constraint.on_bound(weights)
    new = LeafStats(
        _norm(update),
        # Not of the difference of updates, in which the rounding of each is left.
        _norm(jax.tree.map(_minus, without, weights)),
        jnp.int32(0 if at_bound is None else at_bound.size),
        jnp.int32(-1) if at_bound is None else jnp.sum(at_bound, dtype=jnp.int32),
    )
    return jax.tree.map(lambda x, z: x.astype(z.dtype), new, like)


def _minus(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = compute_dtype(a.dtype, b.dtype)
    return a.astype(dtype) - b.astype(dtype)


def _norm(arrays: Any) -> jax.Array:
    """Euclidean norm of one array, or of those of a group together."""
    wide = [x.astype(compute_dtype(x.dtype)) for x in jax.tree.leaves(arrays)]
    own = [norm(x, None).reshape(()) for x in wide]
    if len(own) == 1:
        return own[0]
    dtype = widest(*(x.dtype for x in own))
    return norm(jnp.stack([x.astype(dtype) for x in own]), None).reshape(())
