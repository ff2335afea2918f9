"""Arrays that increase along each of several axes: by Dykstra's method, line by line."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_constraints import _numerics
from optax_constraints._constraint import Constraint, tangent_at
from optax_constraints._sharding import vary_like
from optax_constraints.sets.intersection import Intersection, dykstra

ROUNDS = 1000
"""How many rounds there are at most."""


# Compiled by itself, so that calls outside jit find the program they made before.
@functools.partial(jax.jit, static_argnums=2)
def onto_lattice(lines: Intersection, w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The nearest array that increases along some axes.

    Args:
        lines: What increases along axis 0, what along axis 1, and so on.
        w: Weights in float32 or wider.
        axes: The axes.

    Returns:
        The projection; a unit that is not finite becomes NaN.
    """

    def one(w: jax.Array) -> jax.Array:
        finite = jnp.all(jnp.isfinite(w))
        w = jnp.where(finite, w, 0)
        allowed = functools.reduce(
            jnp.logical_and, (jnp.all(jnp.diff(w, axis=a) >= 0) for a in range(w.ndim))
        )
        return jnp.where(finite, jnp.where(allowed, w, _nearest(lines, w)), jnp.nan)

    return _unit_by_unit(one, axes, w)


@functools.partial(jax.jit, static_argnums=4)
def along_lattice(
    lines: Intersection, w: jax.Array, v: jax.Array, slack: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """The nearest array that increases along some axes where neighbouring weights are equal.

    Args:
        lines: As above.
        w: Weights that increase along the axes.
        v: A vector in a dtype in which sums are taken.
        slack: How near to one another neighbours count as equal, one number for each unit.
        axes: The axes.

    Returns:
        The projection of the vector.
    """

    def one(w: jax.Array, v: jax.Array, slack: jax.Array) -> jax.Array:
        return _nearest_direction(lines, w, v, slack.ravel()[0])

    return _unit_by_unit(one, axes, w, v, slack)


def _unit_by_unit(function: Any, axes: tuple[int, ...], *arrays: jax.Array) -> jax.Array:
    """Calls a function for each unit, in whose loops no unit waits for the others."""
    first = arrays[0]
    order = (*(a for a in range(first.ndim) if a not in axes), *axes)
    beside = len(order) - len(axes)
    moved = [jnp.transpose(array, order) for array in arrays]
    units = [array.reshape(-1, *array.shape[beside:]) for array in moved]
    out = jax.vmap(function)(*units).reshape(moved[0].shape)
    return jnp.transpose(out, tuple(map(order.index, range(first.ndim))))


@jax.custom_jvp
def _nearest(lines: Intersection, w: jax.Array) -> jax.Array:
    x = dykstra(lines, ((),) * w.ndim, w)
    # Rounds end within rounding of the weights, which may be large beside what comes of them.
    # So what is equal but for that becomes equal, and all axes are in order to the bit.
    x = _pooled(w, x, None, x)
    for axis in range(w.ndim):
        x = lax.cummax(x, axis=axis)
    return x


@_nearest.defjvp
def _nearest_jvp(primals, tangents):
    lines, w = primals
    x = _nearest(lines, w)
    return x, _pooled(w, x, None, tangents[1])


@jax.custom_jvp
def _nearest_direction(
    lines: Intersection, w: jax.Array, v: jax.Array, slack: jax.Array
) -> jax.Array:
    def onto(constraint: Constraint, own: Any) -> Any:
        return lambda v: tangent_at(constraint, w, v, own, slack)

    return dykstra(lines, ((),) * w.ndim, v, onto=onto)


@_nearest_direction.defjvp
def _nearest_direction_jvp(primals, tangents):
    lines, w, v, slack = primals
    x = _nearest_direction(lines, w, v, slack)
    return x, _pooled(v, x, _equal(w, slack), tangents[2])


def _rounding(w: jax.Array) -> jax.Array:
    return 64 * _numerics.eps(w.dtype) * jnp.max(jnp.abs(w))


def _equal(x: jax.Array, near: jax.Array) -> tuple[jax.Array, ...]:
    """Which neighbours along each axis are equal, but for so much."""
    return tuple(jnp.diff(x, axis=a) <= near for a in range(x.ndim))


def _pooled(
    w: jax.Array, x: jax.Array, bound: tuple[jax.Array, ...] | None, dw: jax.Array
) -> jax.Array:
    """The means of `dw` over what a projection `x` of `w` makes equal.

    That is the derivative of the projection. Of neighbours only those are `bound` to each other;
    None for all.
    """
    near = _rounding(w)
    pairs = _equal(x, near)
    if bound is not None:
        pairs = tuple(a & b for a, b in zip(pairs, bound, strict=True))
    pools = _connected(pairs, x).ravel()

    def sums(entries: jax.Array) -> jax.Array:
        return jnp.zeros_like(entries).at[pools].add(entries)

    count, total = sums(jnp.ones_like(dw).ravel()), sums(dw.ravel())
    moved = sums((jnp.abs(x - w) > near).ravel().astype(x.dtype))
    mean = total / jnp.maximum(count, 1)
    return jnp.where(moved[pools] > 0, mean[pools], dw.ravel()).reshape(x.shape)


def _connected(pairs: tuple[jax.Array, ...], like: jax.Array) -> jax.Array:
    """The least index of what is connected with each entry by pairs of neighbours.

    Indices only fall, so that there is an end.
    """

    def lower(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        last, _ = state
        index = last
        for axis, paired in enumerate(pairs):
            n = index.shape[axis]
            before = lax.slice_in_dim(index, 0, n - 1, axis=axis)
            after = lax.slice_in_dim(index, 1, n, axis=axis)
            least = jnp.where(paired, jnp.minimum(before, after), like.size)
            up, down = ([(0, 0)] * index.ndim for _ in range(2))
            up[axis], down[axis] = (0, 1), (1, 0)
            for room in (up, down):
                index = jnp.minimum(index, jnp.pad(least, room, constant_values=like.size))
        index = index.ravel()[index.ravel()].reshape(index.shape)
        return index, jnp.any(index != last)

    index = jnp.arange(like.size, dtype=jnp.int32).reshape(like.shape)
    start = vary_like((index, jnp.ones((), bool)), like)
    return lax.while_loop(lambda state: state[1], lower, start)[0]
