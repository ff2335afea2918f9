"""Sets of square matrices that are not about singular values, and kernels with one value a ring.

A matrix that is not finite becomes NaN where it would have to be decomposed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_constraints import _numerics
from optax_constraints._axes import Axis, LeafLayout
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint
from optax_constraints._numbers import Number, number, value
from optax_constraints._sharding import automatic, vary_like
from optax_constraints._text import describe
from optax_constraints.sets._common import MatrixSet, positive_part, widen
from optax_constraints.sets.combinators import Stacked

# Accelerators would multiply float32 matrices in fewer bits.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _transpose(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, -1, -2)


def _eye(a: jax.Array) -> jax.Array:
    """The identity of the size of square matrices, with as many axes."""
    return jnp.expand_dims(jnp.eye(a.shape[-1], dtype=a.dtype), tuple(range(a.ndim - 2)))


@jax.custom_jvp
def _keep(w: jax.Array, target: jax.Array) -> jax.Array:
    """The target; where the weights equal it, themselves, so that a zero keeps its sign."""
    return jnp.where(w == target, w, target)


@_keep.defjvp
def _keep_jvp(primals, tangents):
    return _keep(*primals), tangents[1]


class _Mirrored(MatrixSet):
    """What `Symmetric` and `SkewSymmetric` share: a matrix is its mirror image."""

    convex = True
    smooth = True
    square = True
    sign: ClassVar[int]

    def _mirror(self, a: jax.Array) -> jax.Array:
        return self.sign * _transpose(a)

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        del a, slack, rounding
        return b / 2 + self._mirror(b) / 2

    def _project(self, a: jax.Array) -> jax.Array:
        # Not a + (image - a) / 2, which is not its own image to the bit.
        image = self._mirror(a)
        total = a + image
        mean = jnp.where(jnp.isinf(total), a / 2 + image / 2, total / 2)
        return _keep(a, mean)


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Symmetric(_Mirrored):
    """Each matrix is its own transpose: ``{W : W = W^T}``.

    A linear subspace: convex and smooth. The projection ``(W + W^T) / 2`` is the nearest
    point, and its result is symmetric to the bit in every dtype. In a chain, symmetric weights
    stay so to the bit, too; others are symmetric up to rounding after the first step. One pass
    over the weights and their transpose.

    Args:
        axis: None for the last two axes; otherwise the axes that are flattened into the rows.

    Raises:
        TypeError: If `axis` has the wrong type.
        ValueError: If an axis is repeated; when used, if the matrices are not square.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.symmetric()(jnp.array([[1.0, 2.0], [4.0, 3.0]]))
        Array([[1., 3.],
               [3., 3.]], dtype=float32)
    """

    sign = 1
    axis: Axis = None


symmetric = Symmetric


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class SkewSymmetric(_Mirrored):
    """Each matrix is minus its transpose: ``{W : W = -W^T}``.

    A linear subspace: convex and smooth. The projection ``(W - W^T) / 2`` is the nearest
    point, and its result is skew-symmetric to the bit in every dtype. In a chain,
    skew-symmetric weights stay so to the bit, too; others are so up to rounding after the
    first step. One pass over the weights and their transpose. The matrix exponential of such a
    matrix is a rotation.

    Args:
        axis: None for the last two axes; otherwise the axes that are flattened into the rows.

    Raises:
        TypeError: If `axis` has the wrong type.
        ValueError: If an axis is repeated; when used, if the matrices are not square.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.skew_symmetric()(jnp.array([[1.0, 2.0], [4.0, 3.0]]))
        Array([[ 0., -1.],
               [ 1.,  0.]], dtype=float32)
    """

    sign = -1
    axis: Axis = None


skew_symmetric = SkewSymmetric


# Positive semidefinite matrices.


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class PositiveSemidefinite(MatrixSet):
    """Each matrix is symmetric, and its eigenvalues have a lower bound.

    ``{W : W = W^T, lambda(W) >= min_eigenvalue}``, convex. The projection takes the
    symmetric part and raises the eigenvalues that are below the bound to it; this is the
    nearest point (N. Higham, "Computing a nearest symmetric positive semidefinite matrix",
    1988), up to the rounding of the eigenvalues, which goes by the largest of them. The
    result is symmetric to the bit.

    One Cholesky factorisation, which tells whether a matrix is in the set; if one of an array
    is not, one eigendecomposition of each.

    Args:
        min_eigenvalue: The lower bound: a number, a JAX scalar or a schedule. With a positive
            one the matrices are positive definite.
        axis: None for the last two axes; otherwise the axes that are flattened into the rows.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `min_eigenvalue` is NaN, or an axis is repeated; when used, if the
            matrices are not square.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.positive_semidefinite()(jnp.array([[1.0, 0.0], [0.0, -1.0]]))
        Array([[1., 0.],
               [0., 0.]], dtype=float32)
    """

    convex = True
    square = True
    min_eigenvalue: Number = number(0.0)
    axis: Axis = None

    def _project(self, a: jax.Array) -> jax.Array:
        return _project_positive(a, value(self.min_eigenvalue, a.dtype)) if a.size else a

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        # On the eigenvectors at the bound, eigenvalues may only grow.
        vectors, values, own = _eigen(a)
        near = own + 2 * rounding * jnp.max(jnp.abs(values), axis=-1, keepdims=True) + slack
        low = values <= value(self.min_eigenvalue, a.dtype) + near
        basis, b = jnp.where(low[..., None, :], vectors, 0), _symmetric_part(b)
        falling = positive_part(-_matmul(_matmul(_transpose(basis), b), basis))
        return b + _matmul(_matmul(basis, falling), _transpose(basis))

    def _touches(self, w: jax.Array) -> jax.Array:
        """The matrices whose smallest eigenvalue is the bound, up to rounding."""
        a, _ = self._matrices(w)
        if not a.size:
            return jnp.zeros(a.shape[:-2], bool)
        a = jnp.where(jnp.isfinite(a), a, 0)
        eigenvalues = jnp.linalg.eigvalsh(a)
        largest = jnp.max(jnp.abs(eigenvalues), axis=-1)
        bound = value(self.min_eigenvalue, a.dtype)
        slack = _eigenvalue_rounding(a) * largest + 2 * _numerics.eps(w.dtype) * largest
        return eigenvalues[..., 0] <= bound + slack


positive_semidefinite = PositiveSemidefinite


def _eigenvalue_rounding(a: jax.Array) -> float:
    """The rounding of eigenvalues, relative to the largest."""
    return 4 * _numerics.eps(a.dtype) * max(1, a.shape[-1] / 16) ** 0.5


def _symmetric_part(a: jax.Array) -> jax.Array:
    return a / 2 + _transpose(a) / 2


def _power_of_two(largest: jax.Array) -> jax.Array:
    """An exponent by which numbers up to `largest` are scaled to about 1, without underflow."""
    info = jnp.finfo(largest.dtype)
    exponent = jnp.frexp(largest)[1]
    return jnp.clip(exponent, int(info.minexp) + 2, int(info.maxexp) - 2)


def _exp2(exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.ldexp(jnp.ones((), dtype), exponent)


def _is_positive(a: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether a Cholesky factorisation finds the matrices in the set, up to rounding."""
    largest = jnp.max(jnp.abs(jnp.diagonal(a, axis1=-2, axis2=-1)), axis=-1, keepdims=True)
    slack = _eigenvalue_rounding(a) * largest[..., None]
    shifted = a + (slack - bound) * _eye(a)
    factor = lax.linalg.cholesky(shifted, symmetrize_input=False)
    symmetric = jnp.all(a == _transpose(a), axis=(-2, -1), keepdims=True)
    return symmetric & jnp.all(jnp.isfinite(factor), axis=(-2, -1), keepdims=True)


def _eigen(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvectors and eigenvalues of the symmetric part, and the rounding of these.

    The eigenvalues of what is not finite are NaN: LAPACK may not return from an infinity.
    """
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    finite = largest < jnp.inf
    exponent = _power_of_two(largest)
    scaled = jnp.where(finite, _symmetric_part(a * _exp2(-exponent, a.dtype)), 0)
    vectors, values = lax.linalg.eigh(scaled, symmetrize_input=False)
    values = jnp.where(finite, values[..., None, :] * _exp2(exponent, a.dtype), jnp.nan)[..., 0, :]
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return vectors, values, _eigenvalue_rounding(a) * largest


def _raise_eigenvalues(a: jax.Array, bound: jax.Array) -> jax.Array:
    vectors, values, _ = _eigen(a)
    above = jnp.maximum(values - bound, 0)
    out = _matmul(vectors * above[..., None, :], _transpose(vectors))
    return _symmetric_part(out) + bound * _eye(a)


@jax.custom_jvp
def _positive(a: jax.Array, bound: jax.Array) -> jax.Array:
    inside = _is_positive(a, bound)
    return lax.cond(
        jnp.all(inside),
        lambda a, bound: a,
        lambda a, bound: jnp.where(inside, a, _raise_eigenvalues(a, bound)),
        a,
        bound,
    )


@_positive.defjvp
def _positive_jvp(primals, tangents):
    """The divided differences of ``max(lambda, bound)``, after Daleckii and Krein.

    With the heights g above and h below the bound these are ``(g_i + g_j) / (g_i + g_j + h_i
    + h_j)``, without a difference that cancels.
    """
    a, bound = primals
    da, dbound = tangents
    vectors, values, slack = _eigen(a)
    above = jnp.maximum(values - bound, 0)
    below = jnp.where(values >= bound - slack, 0, bound - values)
    rise = above[..., :, None] + above[..., None, :]
    fall = below[..., :, None] + below[..., None, :]
    divided = jnp.where(fall == 0, 1, rise / jnp.where(fall == 0, 1, rise + fall))
    inner = _matmul(_matmul(_transpose(vectors), _symmetric_part(da)), vectors)
    inner = divided * inner + jnp.where(below > 0, dbound, 0)[..., None] * _eye(a)
    return _positive(a, bound), _matmul(_matmul(vectors, inner), _transpose(vectors))


# Compiled by itself, so that calls outside jit find the program they made before.
_project_positive = jax.jit(_positive)


# Doubly stochastic matrices.


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class DoublyStochastic(MatrixSet):
    """Each matrix is nonnegative, and each of its rows and columns sums to 1.

    ``{W : W >= 0, W 1 = 1, W^T 1 = 1}``, the Birkhoff polytope, whose corners are the
    permutations; convex. The projection is the nearest point, ``max(W - u_i - v_j, 0)`` with a
    potential for each row and column. Sinkhorn's scaling is another map.

    The potentials maximise a concave, piecewise quadratic dual, by a semismooth Newton method
    with an exact line search (X. Li, D. Sun, K.-C. Toh, "On the efficient computation of a
    generalized Jacobian of the projector over the Birkhoff polytope", 2020). Each of its steps
    costs one product and one Cholesky factorisation of the size of the matrix; normal weights
    of scale 1 take about 5 of them for 10 x 10 and 10 for 1000 x 1000, larger weights more.
    At the end rows and columns sum to 1 up to rounding, and the entries are as near as the
    potentials, whose rounding goes by the largest weight. Matrices with weights that are more
    than 2000 apart (in float64: 200,000) are scaled down to that first; their nearest point
    mostly is a corner, and remains so. The derivative at a matrix outside is that of the face on
    which the result lies, and leaves out entries that are zero. At a matrix in the set it is that
    of the plane of its sums, along all entries.

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

    convex = True
    square = True
    axis: Axis = None

    def _project(self, a: jax.Array) -> jax.Array:
        return _nearest_doubly_stochastic(a) if a.size else a

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        del rounding
        # What the projection makes of a zero can be the rounding of its potentials.
        return _along_birkhoff(a > slack + 8 * _numerics.eps(a.dtype), b)

    def _touches(self, w: jax.Array) -> jax.Array:
        """The entries that are zero."""
        return w <= 0


doubly_stochastic = DoublyStochastic


_NEWTON_STEPS = 200
_POLISHING_STEPS = 3
_REFINEMENTS = 4


def _excess(x: jax.Array, total: int = 1) -> tuple[jax.Array, jax.Array]:
    """By how much the rows and the columns of one matrix sum to more than `total`."""
    return jnp.sum(x, axis=1) - total, jnp.sum(x, axis=0) - total


def _largest(rows: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.max(jnp.abs(rows)), jnp.max(jnp.abs(columns)))


def _sum_rounding(x: jax.Array) -> float:
    """The rounding of the sums of a doubly stochastic matrix."""
    return 4 * _numerics.eps(x.dtype) * max(1, x.shape[-1] / 64) ** 0.5


def _potential_solver(active: jax.Array, ridge: jax.typing.ArrayLike = 0) -> Callable[..., Any]:
    """Solves for the potentials whose sums over the active entries of rows and columns are given.

    The system is that of a bipartite graph, singular as often as the graph falls apart, so its
    diagonal gets a ridge: at least what rounding asks for. One half of it is eliminated.
    """
    rows, columns = jnp.sum(active, axis=1), jnp.sum(active, axis=0)
    floor = 16 * _numerics.eps(active.dtype) * jnp.maximum(jnp.max(rows), jnp.max(columns))
    ridge = jnp.maximum(ridge, floor)
    rows, columns = rows + ridge, columns + ridge
    share = active / rows[:, None]
    factor = lax.linalg.cholesky(
        jnp.diag(columns) - _matmul(active.T, share), symmetrize_input=False
    )

    def solve(row_sums: jax.Array, column_sums: jax.Array) -> tuple[jax.Array, jax.Array]:
        v = jax.scipy.linalg.cho_solve((factor, True), column_sums - _matmul(row_sums, share))
        return row_sums / rows - _matmul(share, v), v

    return solve


def _ascend(
    b: jax.Array, size: jax.Array, free: jax.Array | None = None, total: int = 1
) -> jax.Array:
    """Maximises the dual of one matrix; returns a matrix that is in the set up to rounding.

    Args:
        b: The matrix.
        size: Its largest magnitude.
        free: Which entries may be negative.
        total: What rows and columns sum to.
    """
    tolerance = 2 * _sum_rounding(b) * (1 + size)
    free = jnp.zeros(b.shape, bool) if free is None else free

    def point(u: jax.Array, v: jax.Array) -> jax.Array:
        x = b - u[:, None] - v[None, :]
        return jnp.where(free, x, jnp.maximum(x, 0))

    def going(state) -> jax.Array:
        _, _, error, before, count = state
        # Near the end, what no longer halves the error is rounding.
        return (
            (count < _NEWTON_STEPS)
            & (error > tolerance)
            & ((error > 8 * tolerance) | (error < before / 2))
        )

    def step(state):
        u, v, before, _, count = state
        x = point(u, v)
        rows, columns = _excess(x, total)
        active = (free | (x > 0)).astype(b.dtype)
        solve = _potential_solver(active, 3 * jnp.minimum(before, 1) / (1 + size))
        du, dv = solve(rows, columns)
        sound = rows @ du + columns @ dv > 0  # not where the factorisation failed
        du = jnp.where(sound, du, rows / (2 * jnp.maximum(jnp.sum(active, 1), 1)))
        dv = jnp.where(sound, dv, columns / (2 * jnp.maximum(jnp.sum(active, 0), 1)))

        def slope(t: jax.typing.ArrayLike) -> jax.Array:
            rows, columns = _excess(point(u + t * du, v + t * dv), total)
            return rows @ du + columns @ dv

        t = _line_search(slope, slope(0))
        u, v = u + t * du, v + t * dv
        return u, v, _largest(*_excess(point(u, v), total)), before, count + 1

    zero = vary_like(jnp.zeros(b.shape[0], b.dtype), b)
    start = _largest(*_excess(point(zero, zero), total))
    u, v, *_ = lax.while_loop(going, step, (zero, zero, start, jnp.full_like(start, jnp.inf), 0))
    return point(u, v)


def _line_search(slope: Callable[[jax.Array], jax.Array], start: jax.Array) -> jax.Array:
    """A step of at most 1 at which a decreasing slope, positive at 0, is nearly zero."""

    def going(state) -> jax.Array:
        *_, t, at, count = state
        return (count < 20) & ((at < -0.1 * start) | ((t < 1) & (at > 0.5 * start)))

    def step(state):
        low, low_slope, high, high_slope, t, at, count = state
        past = at < 0
        low, low_slope = jnp.where(past, low, t), jnp.where(past, low_slope, at)
        high, high_slope = jnp.where(past, t, high), jnp.where(past, at, high_slope)
        t = low + (high - low) * jnp.clip(low_slope / (low_slope - high_slope), 0.1, 0.9)
        return low, low_slope, high, high_slope, t, slope(t), count + 1

    one = jnp.ones_like(start)
    at = slope(one)
    return lax.while_loop(going, step, (0 * one, start, one, at, one, at, 0))[4]


def _polish(x: jax.Array) -> jax.Array:
    """Moves the positive entries of one matrix so that the sums are right."""

    def going(state) -> jax.Array:
        x, count = state
        return (count < _POLISHING_STEPS) & (_largest(*_excess(x)) > _sum_rounding(x) / 2)

    def step(state):
        x, count = state
        active = x > 0
        u, v = _potential_solver(active.astype(x.dtype))(*_excess(x))
        moved = jnp.where(active, jnp.maximum(x - u[:, None] - v[None, :], 0), 0)
        return jnp.where(jnp.isfinite(u[0]), moved, x), count + 1

    return lax.while_loop(going, step, (x, 0))[0]


def _repair(x: jax.Array) -> jax.Array:
    """A nearby point of the set, by scaling down and filling up.

    J. Altschuler, J. Weed, P. Rigollet, "Near-linear time approximation algorithms for optimal
    transport via Sinkhorn iteration", 2017.
    """
    x = x / jnp.maximum(jnp.sum(x, axis=1, keepdims=True), 1)
    x = x / jnp.maximum(jnp.sum(x, axis=0, keepdims=True), 1)
    rows, columns = (jnp.maximum(-excess, 0) for excess in _excess(x))
    total = jnp.sum(rows)
    return x + rows[:, None] * (columns / jnp.where(total > 0, total, 1))[None, :]


def _in_birkhoff(a: jax.Array) -> jax.Array:
    return jnp.all(a >= 0) & (_largest(*_excess(a)) <= _sum_rounding(a))


def _from_outside(a: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(a))
    exponent = _power_of_two(largest)
    b = jnp.where(largest < jnp.inf, a * _exp2(-exponent, a.dtype), jnp.nan)
    b = b - jnp.mean(b, axis=1, keepdims=True)
    b = b - jnp.mean(b, axis=0, keepdims=True)
    size = jnp.max(jnp.abs(b))
    # Beyond this the potentials have no bits left for entries of size 1.
    most = 11 if a.dtype == jnp.float32 else 18
    exponent = jnp.minimum(exponent, most - jnp.frexp(size)[1])
    scale = _exp2(exponent, a.dtype)
    x = _polish(_ascend(b * scale + 1 / a.shape[0], size * scale))
    return jnp.where(_largest(*_excess(x)) > _sum_rounding(a), _repair(x), x)


@jax.custom_jvp
def _nearest(a: jax.Array) -> jax.Array:
    return lax.cond(_in_birkhoff(a), lambda a: a, _from_outside, a)


@_nearest.defjvp
def _nearest_jvp(primals, tangents):
    """The orthogonal projection onto what has sums of 0 and moves positive entries only.

    At a point of the set it moves all entries, as inside.
    """
    x = _nearest(*primals)
    active = ((x > 0) | _in_birkhoff(*primals)).astype(x.dtype)
    active = jnp.where(jnp.isnan(x), x, active)
    return x, _balanced(tangents[0], active)


def _balanced(dx: jax.Array, active: jax.Array) -> jax.Array:
    """The nearest matrix whose rows and columns sum to 0, and which is 0 where not active."""
    active = active.astype(dx.dtype)
    solve = _potential_solver(active)
    dx = active * dx
    for _ in range(_REFINEMENTS):
        u, v = solve(jnp.sum(dx, axis=1), jnp.sum(dx, axis=0))
        dx = dx - active * (u[:, None] + v[None, :])
    return dx


_nearest_doubly_stochastic = jax.jit(jnp.vectorize(_nearest, signature="(n,n)->(n,n)"))


def _along_birkhoff_one(free: jax.Array, b: jax.Array) -> jax.Array:
    """The nearest matrix with sums of 0 whose entries are nonnegative unless they are free."""
    largest = jnp.max(jnp.abs(b))
    exponent = _power_of_two(largest)
    b = jnp.where(largest < jnp.inf, b * _exp2(-exponent, b.dtype), jnp.nan)
    b = b - jnp.mean(b, axis=1, keepdims=True)
    b = b - jnp.mean(b, axis=0, keepdims=True)
    # The loop says which entries move; what follows has derivatives in reverse, too.
    fixed = lax.stop_gradient(b)
    x = _ascend(fixed, jnp.max(jnp.abs(fixed)), free, 0)
    return _balanced(b, free | (x > 0)) * _exp2(exponent, b.dtype)


_along_birkhoff = jax.jit(jnp.vectorize(_along_birkhoff_one, signature="(n,n),(n,n)->(n,n)"))


# Kernels with one value a ring.


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Radial(Constraint):
    """The weights of each square window are the same at the same distance from its centre.

    The window is the first two axes, as in the kernel (height, width, in, out) of a Conv2D;
    the distance of an entry is ``max(|row - centre|, |column - centre|)``, so that a ring is
    the border of a square, and each slice along the other axes has its own values. A linear
    subspace: convex and smooth. The projection takes the mean of each ring, and is the
    nearest point. Two passes over the weights.

    The set is the one that the documentation of `tf.keras.constraints.RadialConstraint`
    shows; the code there copies values instead, and not those of its documentation.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.radial()(jnp.array([[8.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.0]]))
        Array([[1., 1., 1.],
               [1., 5., 1.],
               [1., 1., 1.]], dtype=float32)
    """

    convex = True
    smooth = True

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one kernel; means are taken in float32 or wider."""
        w = jnp.asarray(w)
        wide = widen("Radial", w)
        _check_window(None, w.shape)
        if not w.size:
            return w
        return automatic(_mean_of_rings, wide).astype(w.dtype)

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint, once the leaf has a square window."""
        stacked = layout.stacked if layout is not None else ()
        if stacked:
            return Stacked(self, stacked).settle(path, shape)
        _check_window(path, shape)
        return self


radial = Radial


@functools.cache
def _rings(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The entries of each ring of an n x n window, padded with -1, and the ring of each entry."""
    i = np.minimum(np.arange(n), np.arange(n)[::-1])
    ring = np.minimum(i[:, None], i).ravel()
    members = np.full((ring.max() + 1, np.bincount(ring).max()), -1)
    for row, index in zip(members, range(len(members)), strict=True):
        entries = np.flatnonzero(ring == index)
        row[: len(entries)] = entries
    return members, ring


@jax.jit
def _mean_of_rings(w: jax.Array) -> jax.Array:
    members, ring = _rings(w.shape[0])
    flat = w.reshape(ring.size, -1)
    present = (members >= 0)[..., None]
    count = np.sum(present, axis=1).astype(w.dtype)
    # Around one member of the ring, so that the mean of equal values is that value.
    first = flat[members[:, 0]]
    share = flat[members] / count[:, None] - (first / count)[:, None]
    mean = first + jnp.sum(jnp.where(present, share, 0), axis=1)
    return _keep(w, mean[ring].reshape(w.shape))


def _check_window(path: str | None, shape: tuple[int, ...]) -> None:
    if len(shape) < 2 or shape[0] != shape[1]:
        raise ValueError(
            f"Radial on {describe(path, shape)}: the first two axes are no square window; leave "
            "this leaf free with a rule that maps its path to None."
        )
