"""Sets of matrices that are defined by singular values.

All compute in float32 or wider, on the matrix divided by a power of two, so that nothing
overflows. An allowed matrix comes back bit for bit; allowed is what holds up to the rounding of
the test itself, which is `_tolerance`. A matrix that is not finite becomes NaN, and so does its
derivative.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from optax_constraints import _numerics
from optax_constraints._args import Arg
from optax_constraints._axes import Axis
from optax_constraints._config import builtin
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import Number, is_number, is_schedule, number, value
from optax_constraints._sharding import vary_like
from optax_constraints._text import shown
from optax_constraints.sets._common import MatrixSet, positive_part
from optax_constraints.sets._common import spectral_tolerance as _tolerance
from optax_constraints.sets.scaled import Scaled, largest_value

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Orthogonal(MatrixSet):
    """The columns are orthonormal, times `scale`: ``{W : W^T W = scale^2 I}``; rows if wide.

    Not convex. The projection is `scale` times the polar factor of the matrix. That is the nearest
    point, and it is unique for a matrix of full rank. If the rank is lower, the missing directions
    are zero, or rounding completes them: the result is finite, but need not be orthogonal. Zero
    stays zero.

    Only matrix products, and as many as the matrix needs. Near the set, a quintic Newton-Schulz
    step and a cubic one are enough. Elsewhere the minimax quintics of N. Amsel et al., "The Polar
    Express", 2025, arXiv:2505.16932, come first: about 9 steps of 3 products up to a condition of
    1e4, and beyond as many as it takes. Entries of ``W^T W / scale^2 - I`` end below 1e-6 in
    float32. The distance to the exact polar factor is that of its conditioning: some eps times the
    ratio of the largest singular value to the smallest.

    Cost:
        5 matrix products near the set, where a training step ends, and about 27 from further away.
        1 for a matrix that is in the set.

    Args:
        scale: The singular values, a positive number, a JAX scalar or a schedule.
        axis: None for the last two axes as the matrix (those before them number matrices), or
            the axes that are flattened into its rows, such as `"fan_in"`. For a convolution
            that is the kernel as a matrix, not the operator.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `scale` is negative or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.orthogonal()(jnp.array([[0.0, 3.0], [-2.0, 0.0]])).round(4)
        Array([[ 0.,  1.],
               [-1.,  0.]], dtype=float32)
    """

    smooth = True
    scale: Number = number(1.0, low=0)
    axis: Axis = None

    def _project(self, a: jax.Array) -> jax.Array:
        if not a.size:
            return a
        scale = value(self.scale, a.dtype)
        if a.shape[-2] < a.shape[-1]:
            return jnp.swapaxes(_orthogonal(jnp.swapaxes(a, -1, -2), scale), -1, -2)
        return _orthogonal(a, scale)

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        """``V - W (W^T V + V^T W) / 2``, of a wide matrix its transpose."""
        del slack, rounding
        if a.shape[-2] < a.shape[-1]:
            a, b = jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2)
            return jnp.swapaxes(self._along_matrices(a, b, 0, 0), -1, -2)
        scale = value(self.scale, a.dtype)
        q = jnp.where(scale > 0, a / jnp.where(scale > 0, scale, 1), 0)
        inner = _matmul(jnp.swapaxes(q, -1, -2), b)
        along = b - _matmul(q, (inner + jnp.swapaxes(inner, -1, -2)) / 2)
        return jnp.where(scale > 0, along, 0)

    def _touches(self, w: jax.Array) -> jax.Array:
        """All matrices but those of zeros."""
        return jnp.any(self._matrices(w)[0] != 0, axis=(-2, -1))

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The set in symbols."""
        factor = "" if is_number(self.scale, 1) else "{scale}² "
        return f"{{ W : WᵀW = {factor}I }}, or WWᵀ = {factor}I if W is wide"

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The singular values."""
        gauge = super().gauge(w, memory)
        scale = value(self.scale, gauge.values.dtype)
        return dataclasses.replace(gauge, low=scale, high=scale)


orthogonal = Orthogonal


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class MaxSpectralNorm(Scaled):
    """The largest singular value is at most `max_value`: ``{W : ||W||_2 <= max_value}``.

    Convex. With ``method="clip"`` the projection clips the singular values and leaves those below
    the bound alone; it is the nearest point, exact up to rounding.

    A Cholesky decomposition of ``max_value^2 I - W^T W`` decides whether a matrix is allowed, since
    it exists only for those matrices. If it fails, the eigenvectors of ``W^T W`` follow, in half
    the time of a singular value decomposition. A full one is needed only if a singular value is
    above 1.25 times the bound, as may be before the first step.

    With ``method="scale"`` the whole matrix is multiplied by ``min(1, max_value / ||W||_2)``, as by
    spectral normalization. That is not the nearest point: all singular values go down, not only
    those above the bound. So `tangent` and `intersection`, which need nearest points, refuse it.
    The largest singular value is found as in `FixedSpectralNorm`, by products with a few vectors
    that `project` keeps in its state. After a step of training it may be up to 1% above
    `max_value`; usually it is 0.01%.

    It bounds the Lipschitz constant of a dense layer: H. Gouk et al., "Regularisation of
    neural networks by enforcing Lipschitz continuity", Machine Learning 110, 2021, who scale
    the matrix.

    Cost:
        One matrix product and one Cholesky factorisation while the bound holds. Where it does not,
        half the time of a singular value decomposition, or all of it beyond 1.25 times the bound.
        With ``method="scale"``, two products with up to 12 vectors.

    Args:
        max_value: The bound, a number of at least 0, a JAX scalar or a schedule.
        axis: What is the matrix, as for `Orthogonal`.
        method: `"clip"` or `"scale"`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `max_value` is negative or NaN, an axis is repeated, or there is no such
            method.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.max_spectral_norm()(jnp.array([[3.0, 0.0], [0.0, 0.5]]))
        Array([[1. , 0. ],
               [0. , 0.5]], dtype=float32)
        >>> oc.max_spectral_norm(method="scale")(jnp.array([[4.0, 0.0], [0.0, 2.0]]))
        Array([[1. , 0. ],
               [0. , 0.5]], dtype=float32)
    """

    formula = "{ W : σ₁(W) ≤ {max_value} }"

    max_value: Number = number(1.0, low=0)
    axis: Axis = None
    method: Literal["clip", "scale"] = "clip"

    def __post_init__(self):
        super().__post_init__()
        if self.method not in ("clip", "scale"):
            raise ValueError(
                f"MaxSpectralNorm: method={shown(self.method)} is not known; write 'clip', for the "
                "nearest point, or 'scale', which multiplies the whole matrix."
            )

    @property
    def convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only
        """Whether the projection is the nearest point."""
        return self.method == "clip"

    @property
    def remembers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only
        """Whether there are vectors to keep."""
        return self.method == "scale"

    @property
    def spreads(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only
        """Whether matrices are decomposed."""
        return self.method == "clip"

    only_down = True

    def _bound(self, dtype: jnp.dtype) -> jax.Array:
        return value(self.max_value, dtype)

    def _project(self, a: jax.Array) -> jax.Array:
        if self.method == "scale":
            return super()._project(a)
        return _spectral(_clip, a, value(self.max_value, a.dtype)) if a.size else a

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        bound = value(self.max_value, a.dtype)
        low = bound * (1 - 2 * (rounding + _tolerance(a))) - slack
        inside = jnp.all(_surely_inside(a, low) & (low > 0))
        return lax.cond(inside, lambda a, b, *_: b, _below, a, b, bound, low)

    def _touches(self, w: jax.Array) -> jax.Array:
        """The matrices whose largest singular value is the bound, up to rounding."""
        a, _ = self._matrices(w)
        low = value(self.max_value, a.dtype) * (1 - 2 * (_numerics.eps(w.dtype) + _tolerance(a)))
        if self.method == "scale":
            return largest_value(a) >= low
        return ~_surely_inside(a, low)

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The singular values."""
        gauge = super().gauge(w, memory)
        return dataclasses.replace(gauge, high=value(self.max_value, gauge.values.dtype))


max_spectral_norm = MaxSpectralNorm


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class NuclearNormBall(MatrixSet):
    """The sum of the singular values is at most `radius`: ``{W : ||W||_* <= radius}``.

    Convex. The projection lowers all singular values by one threshold, and those below it to zero,
    so that ranks go down; it is the nearest point, exact up to rounding.

    The threshold is that of the simplex: J. Duchi et al., "Efficient projections onto the
    l1-ball for learning in high dimensions", ICML 2008.

    Cost:
        One singular value decomposition on every call.

    Args:
        radius: The bound, a number of at least 0, a JAX scalar or a schedule.
        axis: What is the matrix, as for `Orthogonal`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `radius` is negative or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.nuclear_norm_ball(2.0)(jnp.array([[3.0, 0.0], [0.0, 2.0]]))
        Array([[1.5, 0. ],
               [0. , 0.5]], dtype=float32)
    """

    formula = "{ W : Σᵢ σᵢ(W) ≤ {radius} }"

    convex = True
    radius: Number = number(1.0, low=0)
    axis: Axis = None

    def _project(self, a: jax.Array) -> jax.Array:
        return _spectral(_threshold, a, value(self.radius, a.dtype)) if a.size else a

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        radius = value(self.radius, a.dtype)
        return _towards_lower_sum(a, b, radius, slack, 2 * (rounding + _tolerance(a)))

    def _touches(self, w: jax.Array) -> jax.Array:
        """The matrices whose singular values sum to the bound, up to rounding."""
        a, _ = self._matrices(w)
        down = _down(a)
        low = (1 - 2 * (_numerics.eps(w.dtype) + _tolerance(a))) * value(self.radius, a.dtype)
        return ~_threshold(_svd(a * down).s, low * down[..., 0], 0).allowed


nuclear_norm_ball = NuclearNormBall


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(MatrixSet):
    """The rank is at most `rank`: ``{W : rank(W) <= rank}``.

    Not convex. The projection keeps the `rank` largest singular values, and is the nearest
    point; it is unique unless the next one is as large. Smooth at the matrices of just that
    rank. Singular values below the rounding of their decomposition count as zero.

    C. Eckart and G. Young, "The approximation of one matrix by another of lower rank",
    Psychometrika 1, 1936.

    Small steps in other directions are lost: a singular value that is dropped starts from zero
    again. With `straight_through` such steps add up in free weights, until they are among the
    largest.

    Cost:
        One singular value decomposition on every call.

    Args:
        rank: The number of singular values to keep: an integer of at least 0, a JAX scalar of an
            integer dtype, or a schedule of those.
        axis: What is the matrix, as for `Orthogonal`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `rank` is negative, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.low_rank(1)(jnp.array([[3.0, 0.0], [0.0, 2.0]]))
        Array([[3., 0.],
               [0., 0.]], dtype=float32)
        >>> import jax
        >>> def loss(w):
        ...     return jnp.trace(oc.straight_through(w, oc.low_rank(1)))
        >>> jax.grad(loss)(jnp.diag(jnp.array([3.0, 2.0])))
        Array([[1., 0.],
               [0., 1.]], dtype=float32)
    """

    formula = "{ W : rank W ≤ {rank} }"

    smooth = True
    rank: Number = number(low=0, whole=True)
    axis: Axis = None

    def __post_init__(self):
        wanted = "write how many singular values to keep."
        if isinstance(self.rank, jax.Array):
            if not jnp.issubdtype(self.rank.dtype, jnp.integer):
                raise TypeError(f"LowRank: rank={self.rank!r} is not an integer; {wanted}")
        elif not isinstance(self.rank, (str, Arg)) and not is_schedule(self.rank):
            try:
                if isinstance(self.rank, bool):
                    raise TypeError
                rank = operator.index(cast(Any, self.rank))
            except TypeError:
                raise TypeError(f"LowRank: rank={self.rank!r} is not an int; {wanted}") from None
            # More than any matrix has, and still exact as a float.
            object.__setattr__(self, "rank", min(rank, 2**24))
        super().__post_init__()

    def _project(self, a: jax.Array) -> jax.Array:
        if isinstance(self.rank, int) and self.rank >= min(a.shape[-2:]):
            return a
        return _spectral(_truncate, a, value(self.rank, a.dtype)) if a.size else a

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        del slack, rounding
        factors = _svd(a * _down(a))
        count = lax.broadcasted_iota(a.dtype, factors.s.shape, factors.s.ndim - 1)
        return b - _beyond(factors, b, count < value(self.rank, a.dtype))

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The singular values, of which only so many may be above zero."""
        gauge = super().gauge(w, memory)
        counts = jnp.arange(gauge.values.shape[-1]) < value(self.rank, jnp.dtype(jnp.int32))
        return dataclasses.replace(gauge, high=jnp.where(counts, jnp.inf, 0))


low_rank = LowRank


# Scales.


def _down(a: jax.Array) -> jax.Array:
    """A power of two for each matrix that takes its largest entry near 1."""
    return _numerics.power_of_two(jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True))


def _eye(a: jax.Array) -> jax.Array:
    """The identity for the columns of matrices (..., rows, columns), with as many axes."""
    return jnp.expand_dims(jnp.eye(a.shape[-1], dtype=a.dtype), tuple(range(a.ndim - 2)))


def _gram(a: jax.Array) -> jax.Array:
    """``A^T A``, or ``A A^T`` for a wide matrix."""
    wide = a.shape[-2] < a.shape[-1]
    contract = a.ndim - 1 if wide else a.ndim - 2
    batch = tuple(range(a.ndim - 2))
    dims = (((contract,), (contract,)), (batch, batch))
    return lax.dot_general(a, a, dims, precision=lax.Precision.HIGHEST)


# The polar factor.

# Odd quintics a x + b x^3 + c x^5, one after the other, that take [1e-4, 1] to [0.9, 1.1]: each
# is the minimax approximation of 1 on what the one before it left, with its lower end at a tenth
# of its upper end at least, against rounding. Afterwards, the quintic of Newton and Schulz.
_NEWTON_SCHULZ = (15 / 8, -10 / 8, 3 / 8)
_QUINTICS = (
    (7.708090908283992, -19.09753400410399, 13.38867228674827),
    (3.8512929138476277, -2.387326648346359, 0.41874236031499384),
    (3.8392588911994268, -2.3851081709831234, 0.4192745652788329),
    (3.7938033844455146, -2.376890588992865, 0.42137941722773453),
    (3.6317126167130467, -2.349982858420157, 0.43027654189043735),
    (3.1641141619452195, -2.3075488410352976, 0.47618906141056644),
    (2.2169395701737296, -1.5927264471709637, 0.41061265767562755),
    _NEWTON_SCHULZ,
)


@jax.custom_jvp
def _polar(a: jax.Array, scale: jax.Array) -> jax.Array:
    """`scale` times the polar factor of matrices (..., m, n), m >= n."""
    eps, tolerance = _numerics.eps(a.dtype), _tolerance(a)
    eye = _eye(a)
    # The growth of the smallest singular values by the quintics; beyond, 15/8 a step.
    limit = len(_QUINTICS) + 4 + max(0, math.ceil(math.log(1e-4 / eps) / math.log(15 / 8)))

    def column_norm(error):
        return jnp.sqrt(jnp.max(jnp.sum(jnp.square(error), axis=-1), axis=-1))

    def open(error):
        # Whether a cubic step does not do yet. It takes E to about 3/4 E^2, of which no entry
        # is larger than 3/4 of the largest squared norm of a column of E.
        return 3 * column_norm(error) ** 2 > tolerance

    def step(carry):
        k, x, error = carry
        squared = _matmul(error, error)
        gram_squared = squared + 2 * error + eye
        # Upper bounds of the largest eigenvalue of E and the largest singular value of X.
        near = _frobenius(squared) < 0.81
        norm = jnp.sqrt(jnp.sqrt(_frobenius(gram_squared))) * 1.01
        norm = jnp.where((k == 0) & (norm > 0), norm, 1)
        row = jnp.asarray(_QUINTICS, a.dtype)[jnp.minimum(k, len(_QUINTICS) - 1)]
        a1, a3, a5 = (
            jnp.where(near, n, r / norm**p)
            for n, r, p in zip(_NEWTON_SCHULZ, row, (1, 3, 5), strict=True)
        )
        factor = (a1 + a3 + a5) * eye + (a3 + 2 * a5) * error + a5 * squared
        moved = _matmul(x, factor)
        moved_error = _gram(moved) - eye
        going = open(error)[..., None, None]
        return k + 1, jnp.where(going, moved, x), jnp.where(going, moved_error, error)

    x = a / jnp.maximum(scale, jnp.finfo(a.dtype).tiny)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    ordinary = (largest <= 2) & (2 * a.shape[-2] ** 0.5 * largest >= 1)
    x = jnp.where(ordinary, x, a * _down(a))
    gram = _gram(x)
    # Far from the set, squares of singular values with a mean from 1 to 4: if all were small,
    # E = X^T X - I would lose what tells them apart.
    mean = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / a.shape[-1]
    far = (jnp.abs(mean - 1) > 0.5) & (mean > 0) & (mean < jnp.inf)
    _, exponent = jnp.frexp(jnp.sqrt(jnp.where(far, mean, 1)))
    down = jnp.where(far, jnp.ldexp(jnp.ones_like(mean), 1 - exponent), 1)
    # What is not finite takes no steps, nor makes others take them, and ends as NaN.
    finite = mean < jnp.inf
    scale = jnp.where(finite, scale, jnp.nan)
    x, error = x * down, jnp.where(finite, gram * jnp.square(down) - eye, 0)
    off = jnp.max(jnp.abs(error), axis=(-2, -1), keepdims=True)
    _, moved, error = lax.while_loop(
        lambda carry: jnp.any(open(carry[2])) & (carry[0] < limit), step, (0, x, error)
    )
    # Not where the loop gave up, and 3/2 of a column would not end.
    return jnp.where(
        ordinary & ~far & (off <= tolerance), a, scale * _finish(moved, error, tolerance)
    )


def _finish(x: jax.Array, error: jax.Array, tolerance: float) -> jax.Array:
    """One cubic step, unless all are there."""
    return _once(
        lambda x: jnp.any(jnp.abs(error) > tolerance), lambda x: x - _matmul(x, error / 2), x
    )


def _frobenius(a: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(a), axis=(-2, -1), keepdims=True))


@_polar.defjvp
def _polar_jvp(primals, tangents):
    (a, scale), (da, dscale) = primals, tangents
    down = _down(a)
    factors = _svd(a * down)
    ones = jnp.ones_like(factors.s)
    dq = _derivative(factors, da * down, ones, jnp.zeros_like(ones), jnp.zeros_like(ones))
    return _polar(a, scale), scale * dq + dscale * _compose(factors, ones)


# Compiled by themselves, here and below, so that calls outside jit find their program again.
_orthogonal = jax.jit(_polar)


# Functions of the singular values.


class _Svd(NamedTuple):
    u: jax.Array
    s: jax.Array
    vt: jax.Array


class _Values(NamedTuple):
    """New singular values."""

    s: jax.Array
    slope: jax.Array
    """How each of them moves with the old one, all else fixed: 0 or 1."""
    allowed: jax.Array
    """Whether the old ones will do, one bool a matrix."""


Spectrum = Callable[[jax.Array, jax.Array, float], _Values]


def _svd(a: jax.Array) -> _Svd:
    """A singular value decomposition whose vectors are orthonormal to a few eps.

    LAPACK's are off by 40 eps for 1024x1024, which one cubic Newton-Schulz step mends. Of a
    matrix with many equal singular values, such as one that was clipped before, its
    divide and conquer can fail to converge; its older QR iteration does, but takes longer.
    With an infinity it may not return at all, so what is not finite is left out, and has NaN
    for singular values.
    """
    finite = jnp.all(jnp.isfinite(a), axis=(-2, -1), keepdims=True)
    a = jnp.where(finite, a, 0)
    factors = lax.linalg.svd(a, full_matrices=False)

    def failed(carry):
        _, (_, s, _) = carry
        return jnp.any(jnp.isnan(s[..., 0]))

    def again(carry):
        a, _ = carry
        qr = lax.linalg.SvdAlgorithm.QR
        # The matrix must change, lest XLA takes its decomposition out of the loop.
        return 0 * a, list(lax.linalg.svd(a, full_matrices=False, algorithm=qr))

    u, s, vt = lax.platform_dependent(
        a,
        list(factors),
        cpu=lambda a, factors: _once(failed, again, (a, factors))[1],
        default=lambda a, factors: factors,
    )
    eye = _eye(u)
    u -= _matmul(u, (_matmul(jnp.swapaxes(u, -1, -2), u) - eye) / 2)
    vt -= _matmul((_matmul(vt, jnp.swapaxes(vt, -1, -2)) - eye) / 2, vt)
    return _Svd(u, jnp.where(finite[..., 0], s, jnp.nan), vt)


def _once(condition: Callable[[Any], jax.Array], function: Callable[[Any], Any], x: Any) -> Any:
    """`function(x)` if the condition holds, also under `vmap`, which makes both of a `cond`."""
    return lax.while_loop(
        lambda carry: carry[0] & condition(carry[1]),
        lambda carry: (jnp.zeros((), bool), function(carry[1])),
        (jnp.ones((), bool), x),
    )[1]


def _compose(factors: _Svd, s: jax.Array) -> jax.Array:
    return _matmul(factors.u * s[..., None, :], factors.vt)


def _clip(s: jax.Array, bound: jax.Array, tolerance: float) -> _Values:
    allowed = s[..., 0] <= bound[..., 0] * (1 + tolerance)
    return _Values(jnp.minimum(s, bound), s <= bound, allowed)


def _threshold(s: jax.Array, bound: jax.Array, tolerance: float) -> _Values:
    # By distances from the largest, so that nothing cancels where the bound is far below it.
    below = s[..., :1] - s
    counts = lax.broadcasted_iota(s.dtype, s.shape, s.ndim - 1) + 1
    levels = (bound + jnp.cumsum(below, axis=-1)) / counts
    level = jnp.minimum(jnp.min(levels, axis=-1, keepdims=True), s[..., :1])
    # Singular values that are zero come out as rounding, and there can be many.
    total = jnp.sum(jnp.where(s <= tolerance * s[..., :1], 0, s), axis=-1)
    allowed = total <= bound[..., 0] * (1 + tolerance)
    return _Values(jnp.maximum(level - below, 0), level > below, allowed)


def _truncate(s: jax.Array, rank: jax.Array, tolerance: float) -> _Values:
    kept = lax.broadcasted_iota(s.dtype, s.shape, s.ndim - 1) < rank
    largest_left_out = jnp.max(jnp.where(kept, 0, s), axis=-1)
    return _Values(jnp.where(kept, s, 0), kept, largest_left_out <= s[..., 0] * tolerance)


def _scaled(spectrum: Spectrum, bound: jax.Array, down: jax.Array) -> jax.Array:
    """A bound of singular values that were scaled down; a rank stays what it is."""
    return jnp.broadcast_to(bound, down[..., 0].shape) * (
        1 if spectrum is _truncate else down[..., 0]
    )


# How far beyond its bound, as a factor, a matrix may be for eigenvectors to do.
_NEARBY = 1.25


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _composed(spectrum: Spectrum, a: jax.Array, bound: jax.Array) -> jax.Array:
    """Matrices with new singular values, decomposed only if one of them needs it."""
    down = _down(a)

    def decomposed(carry):
        known, a = carry
        factors = _svd(a * down)
        new = spectrum(factors.s, _scaled(spectrum, bound, down), _tolerance(a))
        allowed = (known | new.allowed)[..., None, None]
        return jnp.ones_like(known), jnp.where(allowed, a, _compose(factors, new.s) / down)

    def open(carry):
        return ~jnp.all(carry[0])

    if spectrum is not _clip:
        return decomposed((jnp.zeros(a.shape[:-2], bool), a))[1]

    def nearly(carry):
        # Of the matrix in the carry: what does not change XLA would decompose before the loop.
        known, a = carry
        near, clipped = _clip_nearby(a * down, bound * down)
        done = known | near
        return done, jnp.where((done & ~known)[..., None, None], clipped / down, a)

    inside = _surely_inside(a, bound)
    far = _surely_beyond(a * down, _NEARBY * bound * down)
    near = _once(lambda carry: ~jnp.all(carry[0] | far), nearly, (inside, a))
    return _once(open, decomposed, near)[1]


def _clip_nearby(a: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Matrices whose largest singular value is not far above the bound, with it clipped.

    The eigenvectors of ``A^T A`` take half of the time of a singular value decomposition. Its
    eigenvalues lose what is small, but not what is near the bound, and the rounding of a vector
    counts by the share that is taken off along it.
    """
    wide = a.shape[-2] < a.shape[-1]
    gram = _gram(a)
    finite = jnp.trace(gram, axis1=-2, axis2=-1) < jnp.inf
    gram = jnp.where(finite[..., None, None], gram, 0)
    squares, v = jnp.linalg.eigh(gram, symmetrize_input=False)
    s = jnp.sqrt(jnp.maximum(squares, 0))[..., None, :]
    share = jnp.where(s > bound * (1 + _tolerance(a)), 1 - bound / jnp.maximum(s, bound), 0)
    vt = jnp.swapaxes(v, -1, -2)
    over = _matmul(v * share, _matmul(vt, a)) if wide else _matmul(_matmul(a, v) * share, vt)
    return finite & (s[..., 0, -1] <= _NEARBY * bound[..., 0, 0]), a - over


@_composed.defjvp
def _composed_jvp(spectrum, primals, tangents):
    (a, bound), (da, dbound) = primals, tangents
    down = _down(a)
    factors = _svd(a * down)
    bounds = _scaled(spectrum, bound, down)
    new = spectrum(factors.s, bounds, _tolerance(a))

    def diagonal(ds):
        values = functools.partial(spectrum, tolerance=_tolerance(a))
        dbounds = vary_like(jnp.broadcast_to(dbound, bounds.shape), bounds)
        return jax.jvp(lambda s, b: values(s, b).s, (factors.s, bounds), (ds, dbounds))[1]

    # Of a flat set the derivative at an allowed matrix is not the identity.
    flat = spectrum is _truncate
    moved = _derivative(factors, da, new.s, new.slope.astype(a.dtype), diagonal)
    keep = new.allowed[..., None, None] & (not flat)
    return _composed(spectrum, a, bound), jnp.where(keep, da, moved)


_spectral = jax.jit(_composed, static_argnums=0)


def _derivative(
    factors: _Svd,
    da: jax.Array,
    new: jax.Array,
    slope: jax.Array,
    diagonal: jax.Array | Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The derivative of ``U new(S) V^T`` along `da`, by divided differences.

    Ju. L. Daleckii and S. G. Krein, 1965; for singular values: V. Noferini, "A formula for the
    Frechet derivative of a generalized matrix function", SIAM J. Matrix Anal. Appl. 38, 2017.

    Args:
        factors: The matrix, decomposed.
        da: The direction.
        new: The new singular values, each as a function of the old one by itself.
        slope: The derivative of that function; it is linear between two values of one slope.
        diagonal: How the new values move with the old ones.

    Returns:
        A linear function of `da`, finite also where singular values are tied or zero.
    """
    u, s, vt = factors
    v, ut = jnp.swapaxes(vt, -1, -2), jnp.swapaxes(u, -1, -2)
    tiny = jnp.maximum(_numerics.eps(s.dtype) * s[..., :1], jnp.finfo(s.dtype).tiny)

    def quotient(numerator, denominator, limit):
        small = jnp.abs(denominator) <= tiny.reshape(
            tiny.shape[:-1] + (1,) * (numerator.ndim - tiny.ndim + 1)
        )
        return jnp.where(small, limit, numerator / jnp.where(small, 1, denominator))

    row, column = (lambda x: x[..., :, None]), (lambda x: x[..., None, :])
    mean = (row(slope) + column(slope)) / 2
    differences = quotient(row(new) - column(new), row(s) - column(s), mean)
    differences = jnp.where(row(slope) == column(slope), mean, differences)
    sums = quotient(row(new) + column(new), row(s) + column(s), mean)

    left = _matmul(ut, da)
    inner = _matmul(left, v)
    transposed = jnp.swapaxes(inner, -1, -2)
    moved = differences * (inner + transposed) / 2 + sums * (inner - transposed) / 2
    eye = _eye(inner)
    ds = jnp.sum(inner * eye, axis=-1)
    dnew = diagonal(ds) if callable(diagonal) else diagonal
    moved = moved * (1 - eye) + row(dnew) * eye
    out = _matmul(_matmul(u, moved), vt)
    ratio = quotient(new, s, slope)
    if da.shape[-2] > s.shape[-1]:
        out += _matmul(_matmul(da - _matmul(u, left), v) * column(ratio), vt)
    if da.shape[-1] > s.shape[-1]:
        out += _matmul(u, row(ratio) * (left - _matmul(inner, vt)))
    return out


# Tangent cones, after G. A. Watson, "Characterization of the subdifferential of some matrix
# norms", Linear Algebra Appl. 170, 1992.


def _below(a: jax.Array, b: jax.Array, bound: jax.Array, low: jax.Array) -> jax.Array:
    """`b` without what raises singular values that are above `low`: on their vectors."""
    down = _down(a)
    u, s, vt = _svd(a * down)
    high = (s >= low * down[..., 0])[..., None, :]
    u, v = jnp.where(high, u, 0), jnp.where(high, jnp.swapaxes(vt, -1, -2), 0)
    inner = _matmul(_matmul(jnp.swapaxes(u, -1, -2), b), v)
    rise = positive_part((inner + jnp.swapaxes(inner, -1, -2)) / 2)
    below = b - _matmul(_matmul(u, rise), jnp.swapaxes(v, -1, -2))
    # The bound 0 is that of one matrix.
    return jnp.where(bound > 0, below, 0)


def _towards_lower_sum(
    a: jax.Array, b: jax.Array, radius: jax.Array, slack: Any, tolerance: float
) -> jax.Array:
    """`b` without what raises the sum of the singular values, where that is `radius`."""
    down = _down(a)
    factors = _svd(a * down)
    s, largest = factors.s, factors.s[..., :1]
    kept = s > tolerance * largest + slack * down[..., 0]
    total = jnp.sum(jnp.where(kept, s, 0), axis=-1)[..., None, None]
    at_bound = total >= (radius * (1 - tolerance) - slack) * down
    u, vt = jnp.where(kept[..., None, :], factors.u, 0), jnp.where(kept[..., None], factors.vt, 0)
    polar = _matmul(u, vt)
    rest = _svd(_beyond(factors, b, kept))
    # The sum grows by the inner product with the polar factor, and by what is added beyond it.
    growth = jnp.sum(polar * b, axis=(-2, -1))[..., None] + jnp.cumsum(rest.s, axis=-1)
    rank = jnp.sum(kept, axis=-1, keepdims=True).astype(a.dtype)
    count = lax.broadcasted_iota(a.dtype, s.shape, s.ndim - 1) + 1
    levels = jnp.max(growth / (rank + count), axis=-1, keepdims=True)
    first = jnp.sum(polar * b, axis=(-2, -1))[..., None] / jnp.maximum(rank, 1)
    level = jnp.maximum(jnp.where(rank > 0, jnp.maximum(levels, first), levels), 0)
    lower = b - level[..., None] * polar - _compose(rest, jnp.minimum(rest.s, level))
    return jnp.where(at_bound, lower, b)


def _beyond(factors: _Svd, b: jax.Array, kept: jax.Array) -> jax.Array:
    """What of `b` has neither rows nor columns in common with the singular vectors kept."""
    u = jnp.where(kept[..., None, :], factors.u, 0)
    vt = jnp.where(kept[..., None], factors.vt, 0)
    b = b - _matmul(u, _matmul(jnp.swapaxes(u, -1, -2), b))
    return b - _matmul(_matmul(b, jnp.swapaxes(vt, -1, -2)), vt)


# The largest singular value.


# Compiled by itself, so that `jax.debug_nans` does not see the decomposition that failed.
@jax.jit
def _surely_inside(a: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether all singular values are at most `bound`, one bool a matrix.

    The Cholesky decomposition of a symmetric matrix exists if it is positive definite, and is
    NaN otherwise.
    """
    down = _down(a)
    # Entries are at most 4, so that no singular value is above this, nor need the bound be.
    largest = 8 * math.sqrt(a.shape[-2] * a.shape[-1])
    bound = jnp.minimum(bound * down, largest) * (1 + _tolerance(a))
    gram = _gram(a * down)
    slack = jnp.square(bound) * _eye(gram) - gram
    root = jnp.linalg.cholesky(slack, symmetrize_input=False)
    return ~jnp.isnan(root[..., -1, -1]) | jnp.all(a == 0, axis=(-2, -1))


def _surely_beyond(a: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether some singular value is above `bound`, for some of these matrices; one bool each.

    No column of ``A^T A`` is longer than its largest eigenvalue, nor much shorter for a matrix
    of random numbers: of a square one, 0.35 of it.
    """
    lengths = jnp.sqrt(jnp.sum(jnp.square(_gram(a)), axis=-2))
    return jnp.max(lengths, axis=-1) > jnp.square(bound[..., 0, 0])
