"""Arrays that increase along each of several axes: by Dykstra's method, line by line."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_constraints import _numerics
from optax_constraints._sharding import vary_like
from optax_constraints.sets.intersection import PLAIN_ROUNDS
from optax_constraints.sets.isotonic import runs_of, sorted_columns

ROUNDS = 1000
"""How many rounds there are at most."""


# Compiled by itself, so that calls outside jit find the program they made before.
@functools.partial(jax.jit, static_argnums=1)
def onto_lattice(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The nearest array that increases along some axes.

    Args:
        w: Weights in float32 or wider.
        axes: The axes.

    Returns:
        The projection; a unit that is not finite becomes NaN.
    """

    def one(w: jax.Array) -> jax.Array:
        # Sums, as XLA's CPU backend compiles `all` of a matrix slowly.
        finite = jnp.sum(lax.stop_gradient(w - w)) == 0
        w = jnp.where(finite, w, 0)
        falls = (jnp.sum((jnp.diff(w, axis=a) < 0).astype(w.dtype)) for a in range(w.ndim))
        allowed = sum(falls) == 0
        return jnp.where(finite, jnp.where(allowed, w, _nearest(w)), jnp.nan)

    return _unit_by_unit(one, axes, w)


@functools.partial(jax.jit, static_argnums=3)
def along_lattice(w: jax.Array, v: jax.Array, slack: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The nearest array that increases along some axes where neighbouring weights are equal.

    Args:
        w: Weights that increase along the axes.
        v: A vector in a dtype in which sums are taken.
        slack: How near to one another neighbours count as equal, one number for each unit.
        axes: The axes.

    Returns:
        The projection of the vector.
    """

    def one(w: jax.Array, v: jax.Array, slack: jax.Array) -> jax.Array:
        return _nearest_direction(w, v, slack.ravel()[0])

    return _unit_by_unit(one, axes, w, v, slack)


def _unit_by_unit(function: Any, axes: tuple[int, ...], *arrays: jax.Array) -> jax.Array:
    """Calls a function for each unit, in whose loops no unit waits for the others."""
    first = arrays[0]
    order = (*(a for a in range(first.ndim) if a not in axes), *axes)
    beside = len(order) - len(axes)
    moved = [jnp.transpose(array, order) for array in arrays]
    units = [array.reshape(-1, *array.shape[beside:]) for array in moved]
    if len(units[0]) == 1:
        out = function(*(unit[0] for unit in units))
    else:
        out = jax.vmap(function)(*units)
    out = out.reshape(moved[0].shape)
    return jnp.transpose(out, tuple(map(order.index, range(first.ndim))))


def _axis_by_axis(
    turn: Callable[..., tuple[Any, Any, Any]], arrays: list[jax.Array], rest: Any, own: list[Any]
) -> tuple[list[jax.Array], Any, list[Any]]:
    """Takes a turn for each axis of a lattice, which is the first one of all arrays then.

    Axes of one size are compiled once.

    Args:
        turn: Makes arrays and the rest, and something for that axis, of those of the last turn and
            of what is the axis' own.
        arrays: Arrays of one shape.
        rest: What has no such axes.
        own: What each axis has for itself, stacked for those of one size.

    Returns:
        The arrays and the rest of the last turn, and what all turns made for their axes.
    """
    made = []
    for axes, mine in zip(_alike(arrays[0].shape), own, strict=True):
        first = tuple(range(len(axes)))

        def step(state: Any, mine: Any, last: int = len(axes) - 1) -> tuple[Any, Any]:
            arrays, rest, out = turn(*state, mine)
            return ([jnp.moveaxis(array, 0, last) for array in arrays], rest), out

        arrays = [jnp.moveaxis(array, axes, first) for array in arrays]
        (arrays, rest), out = lax.scan(step, (arrays, rest), mine, length=len(axes))
        arrays = [jnp.moveaxis(array, first, axes) for array in arrays]
        made.append(out)
    return arrays, rest, made


def _alike(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The axes of each size."""
    sizes = dict.fromkeys(shape)
    return [tuple(a for a, n in enumerate(shape) if n == size) for size in sizes]


class _Rounds(NamedTuple):
    """What one round of Dykstra's method hands to the next."""

    x: jax.Array
    taken: list[jax.Array]
    """What was taken away along each axis, with that axis first, stacked for those of one size."""
    total: jax.Array
    """The sum of that; with `x` the weights."""
    last_taken: list[jax.Array]
    last_total: jax.Array
    pace: jax.Array
    """Nesterov's sequence, from which the momentum follows."""
    dual: jax.Array
    """The dual objective, which a round without momentum never lowers."""
    changed: jax.Array
    number: jax.Array


def _by_rounds(w: jax.Array, runs: list[Any]) -> jax.Array:
    """The nearest array that increases along each axis, or within each of the runs along it.

    By the method of `intersection.dykstra`, for projections that differ in their axis alone.
    """
    tolerance = _numerics.eps(w.dtype) / 2
    largest = jnp.max(jnp.abs(w), initial=0)
    # The dual objective is one of squares.
    unit = 1 / jnp.where(largest > 0, largest, 1)

    def round_(last: _Rounds) -> _Rounds:
        pace = (1 + jnp.sqrt(1 + 4 * jnp.square(last.pace))) / 2
        momentum = (last.pace - 1) / pace

        def turn(arrays: list[jax.Array], rest: Any, own: Any) -> tuple[Any, Any, Any]:
            (x, total), (dual, changed) = arrays, rest
            taken, last_taken, runs = own
            before = taken + momentum * (taken - last_taken)
            y = x + before
            columns = None if runs is None else runs.reshape(len(y), -1)
            x = sorted_columns(y.reshape(len(y), -1), columns).reshape(y.shape)
            taken = y - x
            # Increments settle before the point does, or after: both have to stand still.
            much = jnp.max(jnp.abs(taken - before)) > tolerance * jnp.max(jnp.abs(y))
            dual = dual - jnp.sum((taken * unit) * (x * unit))
            return [x, total + taken], (dual, changed | much), taken

        x = last.x - momentum * (last.total - last.last_total)
        own = list(zip(last.taken, last.last_taken, runs, strict=True))
        rest = jnp.zeros_like(last.dual), jnp.zeros_like(last.changed)
        (x, total), (dual, changed), taken = _axis_by_axis(turn, [x, jnp.zeros_like(x)], rest, own)
        share = total * unit
        dual = dual + jnp.sum((w * unit - share / 2) * share)
        rises = (dual >= last.dual) & (last.number >= PLAIN_ROUNDS)
        pace = jnp.where(rises, pace, 1)
        return _Rounds(
            x, taken, total, last.taken, last.total, pace, dual, changed, last.number + 1
        )

    nothing = jnp.zeros_like(w)
    none = [
        jnp.stack([jnp.moveaxis(nothing, axes, range(len(axes)))] * len(axes))
        for axes in _alike(w.shape)
    ]
    one, lowest = jnp.ones((), w.dtype), jnp.asarray(-jnp.finfo(w.dtype).max, w.dtype)
    last = _Rounds(
        w, none, nothing, none, nothing, one, lowest, jnp.asarray(True), jnp.zeros((), jnp.int32)
    )
    return lax.while_loop(
        lambda last: (last.number < ROUNDS) & last.changed, round_, vary_like(last, w)
    ).x


@jax.custom_jvp
def _nearest(w: jax.Array) -> jax.Array:
    none = [None] * len(_alike(w.shape))
    x = _by_rounds(w, none)
    # Rounds end within rounding of the weights, which may be large beside what comes of them.
    # So what is equal but for that becomes equal, and all axes are in order to the bit.
    x = _pooled(w, x, None, x)
    return _axis_by_axis(lambda x, *_: ([lax.cummax(x[0])], None, None), [x], None, none)[0][0]


@_nearest.defjvp
def _nearest_jvp(primals, tangents):
    (w,) = primals
    x = _nearest(w)
    return x, _pooled(w, x, None, tangents[0])


@jax.custom_jvp
def _nearest_direction(w: jax.Array, v: jax.Array, slack: jax.Array) -> jax.Array:
    def turn(arrays: list[jax.Array], rest: Any, own: Any) -> tuple[Any, Any, Any]:
        return arrays, rest, runs_of(arrays[0], 0, slack)

    return _by_rounds(v, _axis_by_axis(turn, [w], None, [None] * len(_alike(w.shape)))[2])


@_nearest_direction.defjvp
def _nearest_direction_jvp(primals, tangents):
    w, v, slack = primals
    x = _nearest_direction(w, v, slack)
    return x, _pooled(v, x, _equal(w, slack), tangents[1])


def _rounding(w: jax.Array) -> jax.Array:
    return 64 * _numerics.eps(w.dtype) * jnp.max(jnp.abs(w))


def _equal(x: jax.Array, near: jax.Array) -> list[jax.Array]:
    """Which entries along each axis equal the next one, but for so much."""

    def turn(arrays: list[jax.Array], rest: Any, own: Any) -> tuple[Any, Any, Any]:
        (x,) = arrays
        return arrays, rest, jnp.diff(x, axis=0, append=jnp.inf * jnp.ones_like(x[:1])) <= near

    return _axis_by_axis(turn, [x], None, [None] * len(_alike(x.shape)))[2]


def _pooled(w: jax.Array, x: jax.Array, bound: list[jax.Array] | None, dw: jax.Array) -> jax.Array:
    """The means of `dw` over what a projection `x` of `w` makes equal.

    That is the derivative of the projection. Of neighbours only those are `bound` to each other;
    None for all.
    """
    near = _rounding(w)
    pairs = _equal(x, near)
    if bound is not None:
        pairs = jax.tree.map(jnp.logical_and, pairs, bound)
    pools = _connected(pairs, x).ravel()

    def sums(entries: jax.Array) -> jax.Array:
        return jnp.zeros_like(entries).at[pools].add(entries)

    count, total = sums(jnp.ones_like(dw).ravel()), sums(dw.ravel())
    moved = sums((jnp.abs(x - w) > near).ravel().astype(x.dtype))
    mean = total / jnp.maximum(count, 1)
    return jnp.where(moved[pools] > 0, mean[pools], dw.ravel()).reshape(x.shape)


def _connected(pairs: list[jax.Array], like: jax.Array) -> jax.Array:
    """The least index of what is connected with each entry by pairs of neighbours.

    Indices only fall, so that there is an end.
    """

    def turn(arrays: list[jax.Array], rest: Any, paired: jax.Array) -> tuple[Any, Any, Any]:
        (index,) = arrays
        after = jnp.concatenate([index[1:], index[-1:]])
        least = jnp.where(paired, jnp.minimum(index, after), like.size)
        before = jnp.concatenate([jnp.full_like(index[:1], like.size), least[:-1]])
        return [jnp.minimum(index, jnp.minimum(least, before))], rest, None

    def lower(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        last, _ = state
        (index,), _, _ = _axis_by_axis(turn, [last], None, pairs)
        index = index.ravel()[index.ravel()].reshape(index.shape)
        return index, jnp.sum((index != last).astype(like.dtype))

    index = jnp.arange(like.size, dtype=jnp.int32).reshape(like.shape)
    start = vary_like((index, jnp.ones((), like.dtype)), like)
    return lax.while_loop(lambda state: state[1] > 0, lower, start)[0]
