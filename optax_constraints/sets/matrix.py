"""Sets of square matrices that are not about singular values, and kernels with one value a ring.

A matrix that is not finite becomes NaN where it would have to be decomposed.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_constraints import _numerics
from optax_constraints._axes import Axis, LeafLayout
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import Number, number, value
from optax_constraints._numerics import exp2, exponent_of
from optax_constraints._sharding import automatic
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

    spectral = False
    spreads = False

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The differences between each matrix and its image, which have to be zero."""
        del memory
        a, _ = self._matrices(w)
        name = "entries of W - Wᵀ" if self.sign > 0 else "entries of W + Wᵀ"
        return Gauge(name, a - self._mirror(a), 0.0, 0.0)

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

    A linear subspace: convex and smooth. The projection ``(W + W^T) / 2`` is the nearest point, and
    its result is symmetric to the bit in every dtype. In a chain, symmetric weights stay so to the
    bit, too; others are symmetric up to rounding after the first step.

    Cost:
        One pass over the weights and their transpose.

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

    formula = "{ W : W = Wᵀ }"

    sign = 1
    axis: Axis = None


symmetric = Symmetric


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class SkewSymmetric(_Mirrored):
    """Each matrix is minus its transpose: ``{W : W = -W^T}``.

    A linear subspace: convex and smooth. The projection ``(W - W^T) / 2`` is the nearest point, and
    its result is skew-symmetric to the bit in every dtype. In a chain, skew-symmetric weights stay
    so to the bit, too; others are so up to rounding after the first step. The matrix exponential of
    such a matrix is a rotation.

    Cost:
        One pass over the weights and their transpose.

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

    formula = "{ W : W = -Wᵀ }"

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

    Cost:
        One Cholesky factorisation, which tells whether a matrix is in the set, and an
        eigendecomposition where it is not. If one matrix of an array is outside, all of them are
        decomposed.

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

    formula = "{ W : W = Wᵀ, λ(W) ≥ {min_eigenvalue} }"

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

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The eigenvalues of the symmetric parts."""
        del memory
        a, _ = self._matrices(w)
        a = jnp.where(jnp.isfinite(a), a, 0)
        low = value(self.min_eigenvalue, a.dtype)
        return Gauge("eigenvalues", jnp.linalg.eigvalsh((a + jnp.swapaxes(a, -1, -2)) / 2), low)


positive_semidefinite = PositiveSemidefinite


def _eigenvalue_rounding(a: jax.Array) -> float:
    """The rounding of eigenvalues, relative to the largest."""
    return 4 * _numerics.eps(a.dtype) * max(1, a.shape[-1] / 16) ** 0.5


def _symmetric_part(a: jax.Array) -> jax.Array:
    return a / 2 + _transpose(a) / 2


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
    exponent = exponent_of(largest)
    scaled = jnp.where(finite, _symmetric_part(a * exp2(-exponent, a.dtype)), 0)
    vectors, values = lax.linalg.eigh(scaled, symmetrize_input=False)
    values = jnp.where(finite, values[..., None, :] * exp2(exponent, a.dtype), jnp.nan)[..., 0, :]
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


# Kernels with one value a ring.


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Radial(Constraint):
    """The weights of each square window are the same at the same distance from its centre.

    ``{w : w[i] = w[j] where i and j lie on one ring}``. The window is the first two axes, as in the
    kernel (height, width, in, out) of a Conv2D; the distance of an entry is ``max(|row - centre|,
    |column - centre|)``, so that a ring is the border of a square, and each slice along the other
    axes has its own values. A linear subspace: convex and smooth. The projection takes the mean of
    each ring, and is the nearest point.

    The set is the one that the documentation of `tf.keras.constraints.RadialConstraint`
    shows; the code there copies values instead, and not those of its documentation.

    Cost:
        Two passes over the weights.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.radial()(jnp.array([[8.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.0]]))
        Array([[1., 1., 1.],
               [1., 5., 1.],
               [1., 1., 1.]], dtype=float32)
    """

    formula = "{ w : wᵢⱼ depends on max(|i - c|, |j - c|) only, c the centre }"

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

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """By how much entries differ from the mean of their ring."""
        del memory
        return Gauge("differences from the mean of the ring", w - self(w), 0.0, 0.0)

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
