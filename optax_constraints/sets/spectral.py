"""Sets of matrices that are defined by singular values.

All compute in float32 or wider, on the matrix divided by a power of two, so that nothing
overflows. An allowed matrix comes back bit for bit; allowed is what holds up to the rounding of
the test itself, which is `spectral_tolerance`. A matrix that is not finite becomes NaN, and so
does its derivative.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from optax_constraints import _numerics
from optax_constraints._args import Arg
from optax_constraints._axes import Axis
from optax_constraints._config import builtin
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import Number, is_number, is_schedule, number, value
from optax_constraints._text import as_int, shown
from optax_constraints.sets._common import MatrixSet
from optax_constraints.sets._common import spectral_tolerance as _tolerance
from optax_constraints.sets.polar import polar
from optax_constraints.sets.scaled import FIRST_RESIDUAL, Scaled, largest_value
from optax_constraints.sets.singular_values import (
    below_bound,
    beyond,
    clip,
    matmul,
    normalizer,
    surely_inside,
    svd,
    threshold,
    towards_lower_sum,
    truncate,
    with_spectrum,
)


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
            return jnp.swapaxes(polar(jnp.swapaxes(a, -1, -2), scale), -1, -2)
        return polar(a, scale)

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        """``V - W (W^T V + V^T W) / 2``, of a wide matrix its transpose."""
        del slack, rounding
        if a.shape[-2] < a.shape[-1]:
            a, b = jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2)
            return jnp.swapaxes(self._along_matrices(a, b, 0, 0), -1, -2)
        scale = value(self.scale, a.dtype)
        q = jnp.where(scale > 0, a / jnp.where(scale > 0, scale, 1), 0)
        inner = matmul(jnp.swapaxes(q, -1, -2), b)
        along = b - matmul(q, (inner + jnp.swapaxes(inner, -1, -2)) / 2)
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
        return with_spectrum(clip, a, value(self.max_value, a.dtype)) if a.size else a

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        bound = value(self.max_value, a.dtype)
        low = bound * (1 - 2 * (rounding + _tolerance(a))) - slack
        inside = jnp.all(surely_inside(a, low) & (low > 0))
        return lax.cond(inside, lambda a, b, *_: b, below_bound, a, b, bound, low)

    def _touches(self, w: jax.Array) -> jax.Array:
        """The matrices whose largest singular value is the bound, as far as it is known."""
        a, _ = self._matrices(w)
        bound = value(self.max_value, a.dtype)
        rounding = 2 * (_numerics.eps(w.dtype) + _tolerance(a))
        if self.method == "scale":
            return largest_value(a) >= bound * (1 - rounding - FIRST_RESIDUAL)
        return ~surely_inside(a, bound * (1 - rounding))

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
        return with_spectrum(threshold, a, value(self.radius, a.dtype)) if a.size else a

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        radius = value(self.radius, a.dtype)
        return towards_lower_sum(a, b, radius, slack, 2 * (rounding + _tolerance(a)))

    def _touches(self, w: jax.Array) -> jax.Array:
        """The matrices whose singular values sum to the bound, up to rounding."""
        a, _ = self._matrices(w)
        down = normalizer(a)
        low = (1 - 2 * (_numerics.eps(w.dtype) + _tolerance(a))) * value(self.radius, a.dtype)
        return ~threshold(svd(a * down).s, low * down[..., 0], 0).allowed


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
                rank = as_int(self.rank)
            except TypeError:
                raise TypeError(f"LowRank: rank={self.rank!r} is not an int; {wanted}") from None
            # More than any matrix has, and still exact as a float.
            object.__setattr__(self, "rank", min(rank, 2**24))
        super().__post_init__()

    def _project(self, a: jax.Array) -> jax.Array:
        if isinstance(self.rank, int) and self.rank >= min(a.shape[-2:]):
            return a
        return with_spectrum(truncate, a, value(self.rank, a.dtype)) if a.size else a

    def _along_matrices(self, a: jax.Array, b: jax.Array, slack: Any, rounding: float) -> jax.Array:
        del slack, rounding
        factors = svd(a * normalizer(a))
        count = lax.broadcasted_iota(a.dtype, factors.s.shape, factors.s.ndim - 1)
        return b - beyond(factors, b, count < value(self.rank, a.dtype))

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The singular values, of which only so many may be above zero."""
        gauge = super().gauge(w, memory)
        counts = jnp.arange(gauge.values.shape[-1]) < value(self.rank, jnp.dtype(jnp.int32))
        return dataclasses.replace(gauge, high=jnp.where(counts, jnp.inf, 0))


low_rank = LowRank
