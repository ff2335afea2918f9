"""Isotonic regression: the nearest sorted array, all units at once."""

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_constraints import _numerics


# Compiled by itself, so that calls outside jit find the program they made before.
@functools.partial(jax.jit, static_argnums=1)
def isotonic(w: jax.Array, axis: int, runs: jax.Array | None = None) -> jax.Array:
    """The nearest array that increases along `axis`; with `runs`, within each of them.

    Those are numbers that increase along `axis`, and are the same in each run; for all units, or
    the same for each.
    """
    moved = jnp.moveaxis(w, axis, 0)
    x = moved.reshape(len(moved), -1)
    finite = are_finite(x)
    if runs is not None:
        runs = jnp.moveaxis(runs, axis, 0).reshape(len(moved), -1)
    sorted_ = jnp.where(finite, sorted_columns(jnp.where(finite, x, 0), runs), jnp.nan)
    return jnp.moveaxis(sorted_.reshape(moved.shape), 0, axis)


def sorted_columns(x: jax.Array, runs: jax.Array | None) -> jax.Array:
    """As `isotonic`, for the columns of a matrix without infinities and NaNs."""
    n = len(x)
    # Infinity at the end is in order whatever comes before.
    size = min(8, 1 << (n - 1).bit_length())
    x = _fill(x, size, jnp.inf)
    if runs is not None:
        runs = _fill(runs, size, -1)
    half = 1
    while half < size:
        x = _merge_few(x, runs, half)
        half *= 2
    if n > size:
        x = _merge_many(x, runs)
    return x[:n]


def runs_of(w: jax.Array, axis: int, near: jax.Array) -> jax.Array:
    """Which run of sorted neighbours that are equal, but for so much, each entry is in."""
    first = lax.slice_in_dim(w, 0, 1, axis=axis)
    apart = jnp.diff(w, axis=axis, prepend=first) > near
    return jnp.cumsum(apart.astype(jnp.int32), axis=axis)


def are_finite(x: jax.Array) -> jax.Array:
    """Which columns have neither an infinity nor a NaN."""
    x = lax.stop_gradient(x)
    return jnp.sum(x - x, axis=0, keepdims=True) == 0


def _fill(x: jax.Array, size: int, value: Any) -> jax.Array:
    """Adds rows of a value, up to a multiple of a size."""
    return jnp.pad(x, ((0, -len(x) % size), (0, 0)), constant_values=value)


@jax.custom_jvp
def instead(value: jax.Array, same: jax.Array) -> jax.Array:
    """The value, with the derivative of what is the same but for rounding."""
    del same
    return value


@instead.defjvp
def _instead_jvp(primals, tangents):
    return instead(*primals), tangents[1]


def _merge_few(x: jax.Array, runs: jax.Array | None, half: int) -> jax.Array:
    """Sorts blocks of entries whose first `half` and whose rest are sorted."""
    rows = x.reshape(-1, 2 * half, x.shape[1])
    first, last = rows[:, half : half + 1], rows[:, half - 1 : half]
    left = np.arange(2 * half)[:, None] < half
    if runs is None:
        own = last > first
        pool = _pool_of_few(lax.stop_gradient(rows), half)
    else:
        # Only the run in the middle can be out of order: what is not of it is in order anyway.
        runs = runs.reshape(*rows.shape[:2], -1)
        own = (runs == runs[:, half : half + 1]) & (runs == runs[:, half - 1 : half])
        pool = _pool_of_few(lax.stop_gradient(rows), half, own)
        own &= last > first
    pooled = jnp.where(left, rows > pool, rows < pool) & own
    total = jnp.sum(jnp.where(pooled, rows, 0), axis=1, keepdims=True)
    count = jnp.sum(pooled, axis=1, keepdims=True, dtype=x.dtype)
    pool = instead(pool, total / jnp.maximum(count, 1))
    # The rest keeps blocks in order to the bit, also where a division is off by an ulp.
    return jnp.where(pooled, pool, rows).reshape(x.shape)


def _pool_of_few(x: jax.Array, half: int, own: jax.Array | None = None) -> jax.Array:
    """The largest, over the ends of the left, of the least mean up to an end of the right."""
    if own is not None:
        x = jnp.where(own, x, 0)

    def ends(order: range) -> list[tuple[jax.Array, int]]:
        entries = (x[:, i : i + 1] for i in order)
        return list(zip(itertools.accumulate(entries, operator.add), order, strict=True))

    def within(value: jax.Array, i: int, beyond: float) -> jax.Array:
        return value if own is None else jnp.where(own[:, i : i + 1], value, beyond)

    def least(a: jax.Array, i: int) -> jax.Array:
        means = (within((a + b) / (j - i + 1), j, jnp.inf) for b, j in ends(range(half, 2 * half)))
        return within(functools.reduce(jnp.minimum, means), i, -jnp.inf)

    lefts = ends(range(half - 1, -1, -1))
    return functools.reduce(jnp.maximum, (least(a, i) for a, i in lefts))


def _merge_many(x: jax.Array, runs: jax.Array | None) -> jax.Array:
    """Sorts entries, eights of which are sorted, by merging blocks pair by pair.

    One program for all levels: what depends on the size of blocks are indices, and the two small
    matrices that add up the sums over eights, which stand in a square of `outer` by `inner`.
    """
    n, units = x.shape
    bits = (n // 8 - 1).bit_length()
    inner_bits = bits // 2
    inner = 1 << inner_bits
    outer = -(-n // (8 * inner))
    eights = outer * inner
    x = _fill(x, 8 * inner, jnp.inf).reshape(eights, 8, units)
    if runs is not None:
        runs = _fill(runs, 8 * inner, -1).reshape(eights, 8, -1)
    # Here and above NumPy's, which are constants to the compiler.
    index = np.arange(eights, dtype=np.int32)

    def merged(x: jax.Array, level: jax.Array) -> tuple[jax.Array, None]:
        start = (index >> (level + 1)) << (level + 1)
        middle = start + (1 << level)
        left = (index < middle)[:, None, None]

        def same(size: int, level: jax.Array, copies: int) -> jax.Array:
            block = np.arange(size, dtype=np.int32) >> level
            matrix = (block[:, None] == block[None, :]).astype(x.dtype)
            return jnp.broadcast_to(matrix, (copies, size, size))

        # Of few units copies of the matrix would be larger than what they are multiplied by.
        few = units < inner
        within = same(inner, jnp.minimum(level + 1, inner_bits), 1 if few else 2 * outer)
        across = same(outer, jnp.maximum(level + 1 - inner_bits, 0), 2)

        def mean(parts: jax.Array, counted: jax.Array) -> jax.Array:
            """The mean over each block of what is counted."""
            # Not `jnp.sum`, for which the CPU would write down the parts once more.
            sums = [sum(a[:, i] for i in range(8)) for a in (parts, counted.astype(x.dtype))]
            both = jnp.stack(sums).reshape(2 * outer, inner, units)
            if few:
                both = jnp.einsum("ij,bju->biu", within[0], both, precision=_EXACT)
            else:
                both = jnp.matmul(within, both, precision=_EXACT)
            both = jnp.matmul(across, both.reshape(2, outer, -1), precision=_EXACT)
            total, count = both.reshape(2, eights, units)
            return total / jnp.maximum(count, 1)

        before, after = jnp.minimum(middle, eights) - 1, jnp.minimum(middle, eights - 1)
        neighbours = jnp.concatenate([8 * after, 8 * before + 7])

        def beside(entries: jax.Array) -> jax.Array:
            """The first entry behind the middle of each block, and the last before it."""
            return entries.reshape(8 * eights, -1)[neighbours].reshape(2, eights, -1)

        first, last = beside(x)
        own = ((last > first) & (middle < eights)[:, None])[:, None]
        if runs is not None:
            # Only the run in the middle can be out of order: what is not of it is in order anyway.
            run, other = beside(runs)
            run = jnp.where(run == other, run, -2)
            own = own & (runs == run[:, None])

        def step(pool: jax.Array) -> jax.Array:
            excess = lax.stop_gradient(x) - pool[:, None]
            excess = jnp.where(left, jnp.maximum(excess, 0), jnp.minimum(excess, 0))
            excess = jnp.where(own, excess, 0)
            return mean(excess, excess != 0)

        pool = _root(step, *lax.stop_gradient((first, last)), math.sqrt(4 * eights))
        # Products may round differently from row to row.
        pool = pool[start]
        pooled = jnp.where(left, x > pool[:, None], x < pool[:, None]) & own
        pool = instead(pool, mean(jnp.where(pooled, x, 0), pooled))
        return jnp.where(pooled, pool[:, None], x), None

    levels = jnp.asarray(np.arange(bits, dtype=np.int32))
    return lax.scan(merged, x, levels)[0].reshape(-1, units)[:n]


_EXACT = lax.Precision.HIGHEST


def _root(
    step: Callable[[jax.Array], jax.Array], first: jax.Array, last: jax.Array, roundings: float
) -> jax.Array:
    """Where the steps of Newton's method for the sum of excesses end: means of pools.

    It needs no brackets. Between two values no more entries are pooled than at the two
    together, so a step that passes the root is followed by one back that is not longer.
    """
    scale = jnp.maximum(jnp.abs(first), jnp.abs(last))
    rounding = max(4, roundings) * _numerics.eps(first.dtype) * scale

    def improve(state):
        i, pool, active = state
        further = step(pool)
        # What has converged stays, so that no unit depends on how long another takes.
        pool = jnp.where(active, pool + further, pool)
        return i + 1, pool, active & (jnp.abs(further) > rounding)

    # Eight steps are the rule; the limit is for sums that round more than they should.
    start = 0, first / 2 + last / 2, last > first
    return lax.while_loop(lambda s: jnp.any(s[-1]) & (s[0] < 50), improve, start)[1]
