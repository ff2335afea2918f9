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
from optax_constraints._numerics import power_below
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


# The potentials of one matrix: those of its rows and then those of its columns, in one vector,
# as are the sums. XLA's CPU backend takes as long to compile each small piece as a large one.

_NEWTON_STEPS = 200
_REFINEMENTS = 4


def _sums(x: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.sum(x, axis=1), jnp.sum(x, axis=0)])


def _spread(potentials: jax.Array, like: jax.Array) -> jax.Array:
    """The potential of the row and that of the column of each entry."""
    rows = len(like)
    return potentials[:rows, None] + potentials[None, rows:]


def _over(combine: tuple[Callable[..., Any], ...], *parts: jax.Array) -> Any:
    """Vectors reduced at once, by operations whose neutral element is 0."""
    zeros = tuple(jnp.zeros((), part.dtype) for part in parts)

    def both(x: Any, y: Any) -> Any:
        return tuple(f(a, b) for f, a, b in zip(combine, x, y, strict=True))

    return lax.reduce(parts, zeros, both, (0,))


def _error(x: jax.Array, totals: jax.Array) -> jax.Array:
    """By how much a row or a column misses its sum."""
    return jnp.max(jnp.abs(_sums(x) - totals))


def _rounding(x: jax.Array) -> float:
    """The rounding of the sums of a matrix, relative to the largest."""
    # XLA's CPU backend adds up float64 entries one after the other.
    return (8 if x.dtype == jnp.float64 else 2) * _best_rounding(x)


def _best_rounding(x: jax.Array) -> float:
    """What Newton's steps come down to."""
    return 2 * _numerics.eps(x.dtype) * max(1, max(x.shape) / 64) ** 0.5


def _potential_solver(
    active: jax.Array, counts: jax.Array, ridge: jax.typing.ArrayLike = 0
) -> Callable[[jax.Array], jax.Array]:
    """Solves for the potentials whose sums over the active entries of rows and columns are given.

    The system is that of a bipartite graph, singular as often as the graph falls apart, so its
    diagonal gets a ridge: at least what rounding asks for. One half of it is eliminated.

    Args:
        active: 1 for active entries, and 0.
        counts: How many there are.
        ridge: What is added to the diagonal.
    """
    m, n = active.shape
    if m < n:
        flipped = _potential_solver(active.T, jnp.roll(counts, n), ridge)
        return lambda sums: jnp.roll(flipped(jnp.roll(sums, n)), m)
    floor = 16 * _numerics.eps(active.dtype) * jnp.max(counts)
    counts = counts + jnp.maximum(ridge, floor)
    share = active / counts[:m, None]
    factor = lax.linalg.cholesky(
        jnp.diag(counts[m:]) - _matmul(active.T, share), symmetrize_input=False
    )

    def solve(sums: jax.Array) -> jax.Array:
        v = jax.scipy.linalg.cho_solve((factor, True), sums[m:] - _matmul(sums[:m], share))
        return jnp.concatenate([sums[:m] / counts[:m] - _matmul(share, v), v])

    return solve


def _settle(
    z: jax.Array, totals: jax.Array, least: jax.typing.ArrayLike, size: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One matrix without its potentials, raised to some least entries, so that it has the sums.

    Args:
        z: The matrix; -inf for entries that are at their least anyway.
        totals: The sums, of which the largest is near 1.
        least: 0, and -inf for entries that may be negative.
        size: The largest finite magnitude of the matrix.

    Returns:
        The matrix, and by how much a sum is missed.
    """
    tolerance = _best_rounding(z)
    # Near the end, what no longer halves the error is rounding.
    near = 32 * tolerance * (1 + size)

    def going(error: jax.Array, before: jax.Array, count: Any) -> jax.Array:
        more = (error > near) | (error < before / 2)
        return (count < _NEWTON_STEPS) & (error > tolerance) & more

    def direction(z: jax.Array, excess: jax.Array, error: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The potentials of a step, and the slope at its start."""
        active = (z > least).astype(z.dtype)
        counts = _sums(active)
        ridge = 3 * jnp.minimum(error, 1) / (1 + size)
        newton = _potential_solver(active, counts, ridge)(excess)
        plain = excess / (2 * jnp.maximum(counts, 1))
        slope, other = _over((jnp.add, jnp.add), excess * newton, excess * plain)
        sound = slope > 0  # not where the factorisation failed
        return jnp.where(sound, newton, plain), jnp.where(sound, slope, other)

    def step(state):
        z, potentials, start, _, before, _, count = state

        def shorter(state):
            """The step up to where the slope would be zero; of a first one, 1."""
            t, slope, *_ = state
            share = jnp.clip(start / jnp.where(start > slope, start - slope, 1), 0.1, 0.8)
            t = t * jnp.where(slope > -jnp.inf, share, 0.8)
            excess = _sums(jnp.maximum(z - t * _spread(potentials, z), least)) - totals
            error, slope = _over((jnp.maximum, jnp.add), jnp.abs(excess), excess * potentials)
            return t, slope, excess, error

        first = *vary_like((1.25 * one, -jnp.inf * one), z), potentials, before
        t, _, excess, error = lax.while_loop(
            lambda state: (state[1] < -0.1 * start) & (state[0] > 1e-6), shorter, first
        )
        z = z - t * _spread(potentials, z)
        return z, *direction(z, excess, error), excess, error, before, count + 1

    inf = 0 * size + jnp.inf  # or NaN, which ends the loop before it begins
    one = jnp.ones((), z.dtype)
    none, zero = vary_like((jnp.zeros_like(totals), 0 * one), z)
    state = z, none, zero, none, inf, inf, 0
    z, *_, error, _, _ = lax.while_loop(lambda state: going(*state[4:]), step, state)
    return z, error


def _repair(x: jax.Array, totals: jax.Array) -> jax.Array:
    """A nearby point of the set, by scaling down and filling up.

    J. Altschuler, J. Weed, P. Rigollet, "Near-linear time approximation algorithms for optimal
    transport via Sinkhorn iteration", 2017.
    """
    rows, columns = totals[: len(x)], totals[len(x) :]

    def down(total: jax.Array, found: jax.Array) -> jax.Array:
        return jnp.where(found > total, total / jnp.where(found > total, found, 1), 1)

    x = x * down(rows, jnp.sum(x, axis=1))[:, None]
    x = x * down(columns, jnp.sum(x, axis=0))[None, :]
    missed = jnp.maximum(totals - _sums(x), 0)
    rows, columns = missed[: len(x)], missed[len(x) :]
    total = jnp.sum(rows)
    return x + rows[:, None] * (columns / jnp.where(total > 0, total, 1))[None, :]


def _is_plan(a: jax.Array, totals: jax.Array) -> jax.Array:
    return (jnp.min(a) >= 0) & (_error(a, totals) <= _rounding(a) * jnp.max(totals))


def _centred(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A matrix of magnitudes of about 1 at most, without its means, and what it was divided by."""
    largest = jnp.max(jnp.abs(a))
    unit = power_below(largest)
    b = jnp.where(largest < jnp.inf, a / unit, jnp.nan)
    b = b - jnp.mean(b, axis=1, keepdims=True)
    return b - jnp.mean(b, axis=0, keepdims=True), unit


def _from_outside(a: jax.Array, totals: jax.Array) -> jax.Array:
    # With sums of about 1. A power of two, so that nothing rounds.
    unit = power_below(jnp.max(totals))
    rows, columns = totals[: len(a), None], totals[None, len(a) :]
    b, divisor = _centred(a)
    size = jnp.max(jnp.abs(b))
    # Beyond this the potentials have no bits left for entries of size 1.
    most = 2.0**11 if a.dtype == jnp.float32 else 2.0**18
    scale = jnp.minimum(divisor / unit, most / 2 / power_below(size))
    b = b * scale + rows / unit / a.shape[1]
    b = jnp.where((rows > 0) & (columns > 0), b, -jnp.inf)
    z, error = _settle(b, totals / unit, 0, size * scale)
    x = jnp.maximum(z, 0)
    x = jnp.where(error > 2 * _best_rounding(a), _repair(x, totals / unit), x)
    return x * unit


@jax.custom_jvp
def _nearest(a: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    totals = jnp.concatenate([rows, columns])
    return lax.cond(_is_plan(a, totals), lambda a, _: a, _from_outside, a, totals)


@_nearest.defjvp
def _nearest_jvp(primals, tangents):
    """The orthogonal projection onto what has sums of 0 and moves positive entries only.

    At a point of the set it moves all entries, as inside.
    """
    a, rows, columns = primals
    x = _nearest(*primals)
    inside = _is_plan(a, jnp.concatenate([rows, columns]))
    active = ((x > 0) | inside) & (rows[:, None] > 0) & (columns[None, :] > 0)
    active = jnp.where(jnp.isnan(x), x, active.astype(x.dtype))
    da, *dtotals = tangents
    return x, _balanced(da, jnp.concatenate(dtotals), active)


def _balanced(dx: jax.Array, dtotals: jax.Array, active: jax.Array) -> jax.Array:
    """The nearest matrix with the given sums which is 0 where not active."""
    dx = active * dx
    return dx - active * _spread(_potentials(active, _sums(dx) - dtotals), dx)


def _potentials(active: jax.Array, sums: jax.Array) -> jax.Array:
    """The potentials with given sums over the active entries."""

    def solve(_: Any, sums: jax.Array) -> jax.Array:
        once = _potential_solver(active, _sums(active))

        def refine(_: Any, potentials: jax.Array) -> jax.Array:
            return potentials + once(sums - _sums(active * _spread(potentials, active)))

        return lax.fori_loop(0, _REFINEMENTS, refine, 0 * sums)

    # Linear, and its own transpose: so loops have derivatives in reverse, too.
    return lax.custom_linear_solve(lambda p: p, sums, solve, symmetric=True)


_nearest_plan = jax.jit(jnp.vectorize(_nearest, signature="(m,n),(m),(n)->(m,n)"))


@jax.custom_jvp
def _along(free: jax.Array, allowed: jax.Array, b: jax.Array) -> jax.Array:
    """The nearest matrix with sums of 0 whose entries are nonnegative unless they are free."""
    centred, unit = _centred(b)
    size = jnp.max(jnp.abs(centred))
    least = jnp.where(free & allowed, -jnp.inf, 0).astype(b.dtype)
    z = jnp.where(allowed, centred, -jnp.inf)
    z, _ = _settle(z, jnp.zeros(sum(b.shape), b.dtype), least, size)
    return jnp.maximum(z, least) * unit


@_along.defjvp
def _along_jvp(primals, tangents):
    free, allowed, b = primals
    x = _along(free, allowed, b)
    active = ((free & allowed) | (x > 0)).astype(b.dtype)
    return x, _balanced(tangents[2], jnp.zeros(sum(b.shape), b.dtype), active)


_along_plan = jax.jit(jnp.vectorize(_along, signature="(m,n),(m,n),(m,n)->(m,n)"))
