"""Non-negative matrices with given sums of rows and of columns: transport plans.

A matrix that is not finite becomes NaN.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_constraints import _numerics
from optax_constraints._axes import Axis, LeafLayout
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint
from optax_constraints._gauge import Gauge
from optax_constraints._numerics import exp2, exponent_of
from optax_constraints._sharding import vary_like
from optax_constraints._text import describe, shown
from optax_constraints.sets._common import MatrixSet
from optax_constraints.sets.linear import check_array, readable

# Accelerators would multiply float32 matrices in fewer bits.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

Pair: TypeAlias = tuple[jax.Array, jax.Array]
"""Numbers for the rows and for the columns of a matrix."""


class _Plans(MatrixSet):
    """What `DoublyStochastic` and `Transport` share."""

    convex: ClassVar[bool] = True

    def _totals(self, a: jax.Array) -> Pair:
        """The sums of rows and columns."""
        raise NotImplementedError

    def _project(self, a: jax.Array) -> jax.Array:
        if not a.size:
            return a
        totals = (jnp.broadcast_to(sums, (*a.shape[:-2], sums.size)) for sums in self._totals(a))
        return _nearest_plan(a, *vary_like(tuple(totals), a))

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        del rounding
        rows, columns = self._totals(a)
        # What the projection makes of a zero can be the rounding of its potentials.
        largest = jnp.maximum(jnp.max(rows), jnp.max(columns))
        free = a > slack + 8 * _numerics.eps(a.dtype) * largest
        allowed = (rows[:, None] > 0) & (columns[None, :] > 0)
        return _along_plan(free, vary_like(jnp.broadcast_to(allowed, a.shape), b), b)

    spectral = False

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The entries."""
        del memory
        return Gauge("entries", w, 0.0)

    def _touches(self, w: jax.Array) -> jax.Array:
        """The entries that are zero."""
        return w <= 0


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class DoublyStochastic(_Plans):
    """Each matrix is nonnegative, and each of its rows and columns sums to 1.

    ``{W : W >= 0, W 1 = 1, W^T 1 = 1}``, the Birkhoff polytope, whose corners are the
    permutations; convex. `Transport` with ones, where method, cost and accuracy are described.

    Cost:
        That of `Transport`: 5 to 10 Newton steps, each one product and one Cholesky factorisation.

    Args:
        axis: None for the last two axes; otherwise the axes that are flattened into the rows.

    Raises:
        TypeError: If `axis` has the wrong type.
        ValueError: If an axis is repeated; when used, if the matrices are not square.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.doubly_stochastic()(jnp.array([[0.5, 0.0], [0.0, 0.1]]))
        Array([[0.65, 0.35],
               [0.35, 0.65]], dtype=float32)
    """

    formula = "{ W : W ≥ 0, Σⱼ Wᵢⱼ = 1, Σᵢ Wᵢⱼ = 1 }"

    square: ClassVar[bool] = True
    axis: Axis = None

    def _totals(self, a: jax.Array) -> Pair:
        ones = jnp.ones(a.shape[-1], a.dtype)
        return ones, ones


doubly_stochastic = DoublyStochastic


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Transport(_Plans):
    """Each matrix is nonnegative, and its rows and columns have given sums.

    ``{W : W >= 0, W 1 = rows, W^T 1 = columns}``, the transport polytope: plans that take
    `rows` to `columns`, joint distributions with given margins, contingency tables; convex. The
    projection is the nearest point, ``max(W - u_i - v_j, 0)`` with a potential for each row and
    column. Sinkhorn's scaling is another map.

    The potentials maximise a concave, piecewise quadratic dual, by a semismooth Newton method with
    a line search (X. Li, D. Sun, K.-C. Toh, "On the efficient computation of a generalized Jacobian
    of the projector over the Birkhoff polytope", 2020). At the end sums are right up to the
    rounding of the largest, and the entries are as near as the potentials, whose rounding goes by
    the largest weight. Matrices with weights that are more than 2000 times the largest sum apart
    (in float64: 200,000) are scaled down to that first; their nearest point mostly is a corner, and
    remains so. The derivative at a matrix outside is that of the face on which the result lies, and
    leaves out entries that are zero. At a matrix in the set it is that of the plane of its sums,
    along all entries.

    Cost:
        5 to 10 Newton steps, each one product and one Cholesky factorisation of the size of the
        smaller side. 5 is for 10 x 10 and 10 for 1000 x 1000, with normal weights of scale 1 and
        sums of 1; larger weights take more.

    Args:
        rows: The sum of each row, at least 0: an array, or one number for all.
        columns: The sum of each column, likewise. Both have the same total, up to rounding, and
            columns are scaled to that of the rows.
        axis: None for the last two axes; otherwise the axes that are flattened into the rows.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a sum is negative, infinite or NaN, the totals differ, or an axis is
            repeated; when used, if there are not as many sums as rows and columns.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.transport([3.0, 1.0], [2.0, 2.0])(jnp.array([[1.0, 0.0], [0.0, 0.0]]))
        Array([[1.75, 1.25],
               [0.25, 0.75]], dtype=float32)
    """

    formula = "{ W : W ≥ 0, Σⱼ Wᵢⱼ = {rows}ᵢ, Σᵢ Wᵢⱼ = {columns}ⱼ }"

    rows: Any
    columns: Any
    axis: Axis = None

    def __post_init__(self):
        for name in ("rows", "columns"):
            given = getattr(self, name)
            what = f"Transport: {name}={shown(given)}"
            array = check_array(what, given)
            entries = readable(array)
            if array.ndim > 1:
                raise ValueError(f"{what} has shape {array.shape}; write one number for each.")
            if entries is not None and np.any(entries < 0):
                raise ValueError(f"{what} has a negative sum; write numbers of at least 0.")
            object.__setattr__(self, name, array)
        super().__post_init__()
        if self.rows.ndim and self.columns.ndim:
            self._check_totals("Transport", (self.rows.size, self.columns.size))

    def _check_totals(self, where: str, shape: tuple[int, int]) -> None:
        """Raises if rows and columns are known not to have the same total."""
        rows, columns = readable(self.rows), readable(self.columns)
        if rows is None or columns is None:
            return
        one, other = (
            np.sum(np.broadcast_to(rows, shape[:1])),
            np.sum(np.broadcast_to(columns, shape[1:])),
        )
        if abs(one - other) > 1e-5 * max(one, other):
            raise ValueError(
                f"{where}: the rows sum to {one:g} and the columns to {other:g}; write sums "
                "with the same total."
            )

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint for one leaf, which its sums have to fit."""
        settled = super().settle(path, shape, layout)
        inner, own = settled, shape
        while not isinstance(inner, Transport):
            own = tuple(n for a, n in enumerate(own) if a not in cast(Any, inner).axis)
            inner = cast(Any, inner).constraint
        inner._sizes(path, own)
        return settled

    def _sizes(self, path: str | None, shape: tuple[int, ...]) -> None:
        a = jax.eval_shape(lambda w: self._matrices(w)[0], jax.ShapeDtypeStruct(shape, jnp.float32))
        self._fit(path, shape, cast(tuple[int, int], a.shape[-2:]))

    def _fit(self, path: str | None, shape: tuple[int, ...], sizes: tuple[int, int]) -> None:
        where = f"Transport on {describe(path, shape)}"
        for name, size in zip(("rows", "columns"), sizes, strict=True):
            found = getattr(self, name).shape
            if found not in ((), (size,)):
                raise ValueError(
                    f"{where}: the matrices are {sizes[0]}x{sizes[1]}, and {name} has shape "
                    f"{found}; write one number for each of the {size} {name}, or another axis."
                )
        self._check_totals(where, sizes)

    def _totals(self, a: jax.Array) -> Pair:
        self._fit(None, a.shape, cast(tuple[int, int], a.shape[-2:]))
        rows, columns = (
            jnp.broadcast_to(jnp.asarray(sums, a.dtype), (n,))
            for sums, n in zip((self.rows, self.columns), a.shape[-2:], strict=True)
        )
        total = jnp.sum(columns)
        return rows, columns * (jnp.sum(rows) / jnp.where(total > 0, total, 1))


transport = Transport


# The potentials of one matrix.

_NEWTON_STEPS = 200
_REFINEMENTS = 4


def _sums(x: jax.Array) -> Pair:
    return jnp.sum(x, axis=1), jnp.sum(x, axis=0)


def _spread(u: jax.Array, v: jax.Array) -> jax.Array:
    return u[:, None] + v[None, :]


def _measure(rows: jax.Array, columns: jax.Array, u: jax.Array, v: jax.Array) -> Pair:
    """The largest magnitude of the one pair, and its inner product with the other."""
    n = max(rows.size, columns.size)
    a, b, c, d = (jnp.pad(x, (0, n - x.size)) for x in (rows, columns, u, v))
    # XLA's CPU backend takes long to compile sums and maxima by themselves.
    zero = jnp.zeros((), a.dtype)
    largest, product = lax.reduce(
        (jnp.maximum(jnp.abs(a), jnp.abs(b)), a * c + b * d),
        (zero, zero),
        lambda x, y: (jnp.maximum(x[0], y[0]), x[1] + y[1]),
        (0,),
    )
    return largest, product


def _error(x: jax.Array, totals: Pair) -> jax.Array:
    """By how much a row or a column misses its sum."""
    rows, columns = _sums(x)
    rows, columns = rows - totals[0], columns - totals[1]
    return jnp.maximum(jnp.max(jnp.abs(rows)), jnp.max(jnp.abs(columns)))


def _rounding(x: jax.Array) -> float:
    """The rounding of the sums of a matrix, relative to the largest."""
    # XLA's CPU backend adds up float64 entries one after the other.
    return (8 if x.dtype == jnp.float64 else 2) * _best_rounding(x)


def _best_rounding(x: jax.Array) -> float:
    """What Newton's steps come down to."""
    return 2 * _numerics.eps(x.dtype) * max(1, max(x.shape) / 64) ** 0.5


def _potential_solver(active: jax.Array, ridge: jax.typing.ArrayLike = 0) -> Callable[..., Pair]:
    """Solves for the potentials whose sums over the active entries of rows and columns are given.

    The system is that of a bipartite graph, singular as often as the graph falls apart, so its
    diagonal gets a ridge: at least what rounding asks for. One half of it is eliminated.
    """
    if active.shape[0] < active.shape[1]:
        flipped = _potential_solver(active.T, ridge)

        def other_way(row_sums: jax.Array, column_sums: jax.Array) -> Pair:
            v, u = flipped(column_sums, row_sums)
            return u, v

        return other_way
    rows, columns = _sums(active)
    floor = 16 * _numerics.eps(active.dtype) * jnp.maximum(jnp.max(rows), jnp.max(columns))
    ridge = jnp.maximum(ridge, floor)
    rows, columns = rows + ridge, columns + ridge
    share = active / rows[:, None]
    factor = lax.linalg.cholesky(
        jnp.diag(columns) - _matmul(active.T, share), symmetrize_input=False
    )

    def solve(row_sums: jax.Array, column_sums: jax.Array) -> Pair:
        v = jax.scipy.linalg.cho_solve((factor, True), column_sums - _matmul(row_sums, share))
        return row_sums / rows - _matmul(share, v), v

    return solve


def _settle(
    z: jax.Array, totals: Pair, free: jax.Array, barred: jax.Array, size: jax.Array
) -> jax.Array:
    """One matrix without its potentials, so that its positive part has the sums.

    Args:
        z: The matrix.
        totals: The sums, of which the largest is near 1.
        free: Which entries may be negative.
        barred: Which entries are zero.
        size: The largest magnitude of the matrix.
    """
    tolerance = _best_rounding(z)
    # Near the end, what no longer halves the error is rounding.
    near = 32 * tolerance * (1 + size)

    def excess(z: jax.Array) -> Pair:
        rows, columns = _sums(_part(z, free, barred))
        return rows - totals[0], columns - totals[1]

    def going(error: jax.Array, before: jax.Array, count: Any) -> jax.Array:
        more = (error > near) | (error < before / 2)
        return (count < _NEWTON_STEPS) & (error > tolerance) & more

    def direction(z: jax.Array, rows: jax.Array, columns: jax.Array, error: jax.Array) -> Pair:
        active = ((free | (z > 0)) & ~barred).astype(z.dtype)
        u, v = _potential_solver(active, 3 * jnp.minimum(error, 1) / (1 + size))(rows, columns)
        sound = _measure(rows, columns, u, v)[1] > 0  # not where the factorisation failed
        row_counts, column_counts = _sums(active)
        u = jnp.where(sound, u, rows / (2 * jnp.maximum(row_counts, 1)))
        return u, jnp.where(sound, v, columns / (2 * jnp.maximum(column_counts, 1)))

    def step(state):
        z, u, v, rows, columns, before, _, count = state
        start = _measure(rows, columns, u, v)[1]

        def shorter(state):
            """The step up to where the slope would be zero; of a first one, 1."""
            t, slope, *_ = state
            share = jnp.clip(start / jnp.where(start > slope, start - slope, 1), 0.1, 0.8)
            t = t * jnp.where(slope > -jnp.inf, share, 0.8)
            rows, columns = excess(z - t * _spread(u, v))
            error, slope = _measure(rows, columns, u, v)
            return t, slope, rows, columns, error

        first = 0 * start + 1.25, 0 * start - jnp.inf, rows, columns, before
        t, _, rows, columns, error = lax.while_loop(
            lambda state: (state[1] < -0.1 * start) & (state[0] > 1e-6), shorter, first
        )
        z = z - t * _spread(u, v)
        u, v = direction(z, rows, columns, error)
        return z, u, v, rows, columns, error, before, count + 1

    inf = 0 * size + jnp.inf  # or NaN, which ends the loop before it begins
    u, v = vary_like((jnp.zeros(z.shape[0], z.dtype), jnp.zeros(z.shape[1], z.dtype)), z)
    state = z, u, v, u, v, inf, inf, 0
    return lax.while_loop(lambda state: going(*state[5:]), step, state)[0]


def _part(z: jax.Array, free: jax.Array, barred: jax.Array) -> jax.Array:
    return jnp.where(barred, 0, jnp.where(free, z, jnp.maximum(z, 0)))


def _repair(x: jax.Array, totals: Pair) -> jax.Array:
    """A nearby point of the set, by scaling down and filling up.

    J. Altschuler, J. Weed, P. Rigollet, "Near-linear time approximation algorithms for optimal
    transport via Sinkhorn iteration", 2017.
    """

    def down(total: jax.Array, found: jax.Array) -> jax.Array:
        return jnp.where(found > total, total / jnp.where(found > total, found, 1), 1)

    x = x * down(totals[0], jnp.sum(x, axis=1))[:, None]
    x = x * down(totals[1], jnp.sum(x, axis=0))[None, :]
    rows, columns = (jnp.maximum(t - s, 0) for t, s in zip(totals, _sums(x), strict=True))
    total = jnp.sum(rows)
    return x + rows[:, None] * (columns / jnp.where(total > 0, total, 1))[None, :]


def _is_plan(a: jax.Array, totals: Pair) -> jax.Array:
    largest = jnp.maximum(jnp.max(totals[0]), jnp.max(totals[1]))
    return (jnp.min(a) >= 0) & (_error(a, totals) <= _rounding(a) * largest)


def _centred(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A matrix of magnitudes of about 1 at most, without its means, and the exponent of that."""
    largest = jnp.max(jnp.abs(a))
    exponent = exponent_of(largest)
    b = jnp.where(largest < jnp.inf, a * exp2(-exponent, a.dtype), jnp.nan)
    b = b - jnp.mean(b, axis=1, keepdims=True)
    return b - jnp.mean(b, axis=0, keepdims=True), exponent


def _from_outside(a: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    # With sums of about 1. A power of two, so that nothing rounds.
    unit = exponent_of(jnp.maximum(jnp.max(rows), jnp.max(columns))) - 1
    down = exp2(-unit, a.dtype)
    totals = rows * down, columns * down
    b, exponent = _centred(a)
    size = jnp.max(jnp.abs(b))
    # Beyond this the potentials have no bits left for entries of size 1.
    most = 11 if a.dtype == jnp.float32 else 18
    scale = exp2(jnp.minimum(exponent - unit, most - jnp.frexp(size)[1]), a.dtype)
    b = b * scale + totals[0][:, None] / a.shape[1]
    barred = (rows[:, None] <= 0) | (columns[None, :] <= 0)
    free = jnp.zeros_like(barred)
    x = _part(_settle(b, totals, free, barred, size * scale), free, barred)
    x = jnp.where(_error(x, totals) > 2 * _best_rounding(a), _repair(x, totals), x)
    return x * exp2(unit, a.dtype)


@jax.custom_jvp
def _nearest(a: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    inside = _is_plan(a, (rows, columns))
    return lax.cond(inside, lambda a, *_: a, _from_outside, a, rows, columns)


@_nearest.defjvp
def _nearest_jvp(primals, tangents):
    """The orthogonal projection onto what has sums of 0 and moves positive entries only.

    At a point of the set it moves all entries, as inside.
    """
    a, rows, columns = primals
    x = _nearest(*primals)
    active = ((x > 0) | _is_plan(a, (rows, columns))) & (rows[:, None] > 0) & (columns[None, :] > 0)
    active = jnp.where(jnp.isnan(x), x, active.astype(x.dtype))
    da, drows, dcolumns = tangents
    return x, _balanced(da, drows, dcolumns, active)


def _balanced(dx: jax.Array, drows: jax.Array, dcolumns: jax.Array, active: jax.Array) -> jax.Array:
    """The nearest matrix with the given sums which is 0 where not active."""
    dx = active * dx
    rows, columns = _sums(dx)
    return dx - active * _spread(*_potentials(active, rows - drows, columns - dcolumns))


def _potentials(active: jax.Array, rows: jax.Array, columns: jax.Array) -> Pair:
    """The potentials with given sums over the active entries."""

    def solve(_: Any, sums: Pair) -> Pair:
        once = _potential_solver(active)

        def refine(_: Any, potentials: Pair) -> Pair:
            found = _sums(active * _spread(*potentials))
            more = once(*(s - f for s, f in zip(sums, found, strict=True)))
            return potentials[0] + more[0], potentials[1] + more[1]

        start = jax.tree.map(lambda s: 0 * s, sums)
        return lax.fori_loop(0, _REFINEMENTS, refine, start)

    # Linear, and its own transpose: so loops have derivatives in reverse, too.
    return lax.custom_linear_solve(lambda p: p, (rows, columns), solve, symmetric=True)


_nearest_plan = jax.jit(jnp.vectorize(_nearest, signature="(m,n),(m),(n)->(m,n)"))


@jax.custom_jvp
def _along(free: jax.Array, allowed: jax.Array, b: jax.Array) -> jax.Array:
    """The nearest matrix with sums of 0 whose entries are nonnegative unless they are free."""
    centred, exponent = _centred(b)
    zeros = jnp.zeros(b.shape[0], b.dtype), jnp.zeros(b.shape[1], b.dtype)
    free, barred = free & allowed, ~allowed
    z = _settle(centred, zeros, free, barred, jnp.max(jnp.abs(centred)))
    return _part(z, free, barred) * exp2(exponent, b.dtype)


@_along.defjvp
def _along_jvp(primals, tangents):
    free, allowed, b = primals
    x = _along(free, allowed, b)
    active = ((free & allowed) | (x > 0)).astype(b.dtype)
    zeros = jnp.zeros(b.shape[0], b.dtype), jnp.zeros(b.shape[1], b.dtype)
    return x, _balanced(tangents[2], *zeros, active)


_along_plan = jax.jit(jnp.vectorize(_along, signature="(m,n),(m,n),(m,n)->(m,n)"))
