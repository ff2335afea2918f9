"""Matrices by their singular values: decompositions, new values for old, and derivatives."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_constraints import _numerics
from optax_constraints._sharding import vary_like
from optax_constraints.sets._common import positive_part
from optax_constraints.sets._common import spectral_tolerance as _tolerance

matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


# Scales.


def normalizer(a: jax.Array) -> jax.Array:
    """A power of two for each matrix that takes its largest entry near 1."""
    return _numerics.power_of_two(jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True))


def identity(a: jax.Array) -> jax.Array:
    """The identity for the columns of matrices (..., rows, columns), with as many axes."""
    return jnp.expand_dims(jnp.eye(a.shape[-1], dtype=a.dtype), tuple(range(a.ndim - 2)))


def gram_matrix(a: jax.Array) -> jax.Array:
    """``A^T A``, or ``A A^T`` for a wide matrix."""
    wide = a.shape[-2] < a.shape[-1]
    contract = a.ndim - 1 if wide else a.ndim - 2
    batch = tuple(range(a.ndim - 2))
    dims = (((contract,), (contract,)), (batch, batch))
    return lax.dot_general(a, a, dims, precision=lax.Precision.HIGHEST)


# Functions of the singular values.


class Svd(NamedTuple):
    """A singular value decomposition, with as many vectors as values."""

    u: jax.Array
    s: jax.Array
    vt: jax.Array


class Values(NamedTuple):
    """New singular values."""

    s: jax.Array
    slope: jax.Array
    """How each of them moves with the old one, all else fixed: 0 or 1."""
    allowed: jax.Array
    """Whether the old ones will do, one bool a matrix."""


Spectrum = Callable[[jax.Array, jax.Array, float], Values]


def svd(a: jax.Array) -> Svd:
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
        cpu=lambda a, factors: once(failed, again, (a, factors))[1],
        default=lambda a, factors: factors,
    )
    eye = identity(u)
    u -= matmul(u, (matmul(jnp.swapaxes(u, -1, -2), u) - eye) / 2)
    vt -= matmul((matmul(vt, jnp.swapaxes(vt, -1, -2)) - eye) / 2, vt)
    return Svd(u, jnp.where(finite[..., 0], s, jnp.nan), vt)


def once(condition: Callable[[Any], jax.Array], function: Callable[[Any], Any], x: Any) -> Any:
    """`function(x)` if the condition holds, also under `vmap`, which makes both of a `cond`."""
    return lax.while_loop(
        lambda carry: carry[0] & condition(carry[1]),
        lambda carry: (jnp.zeros((), bool), function(carry[1])),
        (jnp.ones((), bool), x),
    )[1]


def compose(factors: Svd, s: jax.Array) -> jax.Array:
    """The matrix of these singular vectors and other values."""
    return matmul(factors.u * s[..., None, :], factors.vt)


def clip(s: jax.Array, bound: jax.Array, tolerance: float) -> Values:
    """Those above the bound lowered to it."""
    allowed = s[..., 0] <= bound[..., 0] * (1 + tolerance)
    return Values(jnp.minimum(s, bound), s <= bound, allowed)


def threshold(s: jax.Array, bound: jax.Array, tolerance: float) -> Values:
    """All lowered by one number, not below zero, until their sum is the bound."""
    # By distances from the largest, so that nothing cancels where the bound is far below it.
    below = s[..., :1] - s
    counts = lax.broadcasted_iota(s.dtype, s.shape, s.ndim - 1) + 1
    levels = (bound + jnp.cumsum(below, axis=-1)) / counts
    level = jnp.minimum(jnp.min(levels, axis=-1, keepdims=True), s[..., :1])
    # Singular values that are zero come out as rounding, and there can be many.
    total = jnp.sum(jnp.where(s <= tolerance * s[..., :1], 0, s), axis=-1)
    allowed = total <= bound[..., 0] * (1 + tolerance)
    return Values(jnp.maximum(level - below, 0), level > below, allowed)


def truncate(s: jax.Array, rank: jax.Array, tolerance: float) -> Values:
    """All but the first ones zero."""
    kept = lax.broadcasted_iota(s.dtype, s.shape, s.ndim - 1) < rank
    largest_left_out = jnp.max(jnp.where(kept, 0, s), axis=-1)
    return Values(jnp.where(kept, s, 0), kept, largest_left_out <= s[..., 0] * tolerance)


def _scaled(spectrum: Spectrum, bound: jax.Array, down: jax.Array) -> jax.Array:
    """A bound of singular values that were scaled down; a rank stays what it is."""
    return jnp.broadcast_to(bound, down[..., 0].shape) * (
        1 if spectrum is truncate else down[..., 0]
    )


# How far beyond its bound, as a factor, a matrix may be for eigenvectors to do.
_NEARBY = 1.25


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _composed(spectrum: Spectrum, a: jax.Array, bound: jax.Array) -> jax.Array:
    """Matrices with new singular values, decomposed only if one of them needs it."""
    down = normalizer(a)

    def decomposed(carry):
        known, a = carry
        factors = svd(a * down)
        new = spectrum(factors.s, _scaled(spectrum, bound, down), _tolerance(a))
        allowed = (known | new.allowed)[..., None, None]
        return jnp.ones_like(known), jnp.where(allowed, a, compose(factors, new.s) / down)

    def open(carry):
        return ~jnp.all(carry[0])

    if spectrum is not clip:
        return decomposed((jnp.zeros(a.shape[:-2], bool), a))[1]

    def nearly(carry):
        # Of the matrix in the carry: what does not change XLA would decompose before the loop.
        known, a = carry
        near, clipped = _clip_nearby(a * down, bound * down)
        done = known | near
        return done, jnp.where((done & ~known)[..., None, None], clipped / down, a)

    inside = surely_inside(a, bound)
    far = _surely_beyond(a * down, _NEARBY * bound * down)
    near = once(lambda carry: ~jnp.all(carry[0] | far), nearly, (inside, a))
    return once(open, decomposed, near)[1]


def _clip_nearby(a: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Matrices whose largest singular value is not far above the bound, with it clipped.

    The eigenvectors of ``A^T A`` take half of the time of a singular value decomposition. Its
    eigenvalues lose what is small, but not what is near the bound, and the rounding of a vector
    counts by the share that is taken off along it.
    """
    wide = a.shape[-2] < a.shape[-1]
    gram = gram_matrix(a)
    finite = jnp.trace(gram, axis1=-2, axis2=-1) < jnp.inf
    gram = jnp.where(finite[..., None, None], gram, 0)
    squares, v = jnp.linalg.eigh(gram, symmetrize_input=False)
    s = jnp.sqrt(jnp.maximum(squares, 0))[..., None, :]
    share = jnp.where(s > bound * (1 + _tolerance(a)), 1 - bound / jnp.maximum(s, bound), 0)
    vt = jnp.swapaxes(v, -1, -2)
    over = matmul(v * share, matmul(vt, a)) if wide else matmul(matmul(a, v) * share, vt)
    return finite & (s[..., 0, -1] <= _NEARBY * bound[..., 0, 0]), a - over


@_composed.defjvp
def _composed_jvp(spectrum, primals, tangents):
    (a, bound), (da, dbound) = primals, tangents
    down = normalizer(a)
    factors = svd(a * down)
    bounds = _scaled(spectrum, bound, down)
    new = spectrum(factors.s, bounds, _tolerance(a))

    def diagonal(ds):
        values = functools.partial(spectrum, tolerance=_tolerance(a))
        dbounds = vary_like(jnp.broadcast_to(dbound, bounds.shape), bounds)
        return jax.jvp(lambda s, b: values(s, b).s, (factors.s, bounds), (ds, dbounds))[1]

    # Of a flat set the derivative at an allowed matrix is not the identity.
    flat = spectrum is truncate
    moved = derivative(factors, da, new.s, new.slope.astype(a.dtype), diagonal)
    keep = new.allowed[..., None, None] & (not flat)
    return _composed(spectrum, a, bound), jnp.where(keep, da, moved)


with_spectrum = jax.jit(_composed, static_argnums=0)


def derivative(
    factors: Svd,
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

    left = matmul(ut, da)
    inner = matmul(left, v)
    transposed = jnp.swapaxes(inner, -1, -2)
    moved = differences * (inner + transposed) / 2 + sums * (inner - transposed) / 2
    eye = identity(inner)
    ds = jnp.sum(inner * eye, axis=-1)
    dnew = diagonal(ds) if callable(diagonal) else diagonal
    moved = moved * (1 - eye) + row(dnew) * eye
    out = matmul(matmul(u, moved), vt)
    ratio = quotient(new, s, slope)
    if da.shape[-2] > s.shape[-1]:
        out += matmul(matmul(da - matmul(u, left), v) * column(ratio), vt)
    if da.shape[-1] > s.shape[-1]:
        out += matmul(u, row(ratio) * (left - matmul(inner, vt)))
    return out


# Tangent cones, after G. A. Watson, "Characterization of the subdifferential of some matrix
# norms", Linear Algebra Appl. 170, 1992.


def below_bound(a: jax.Array, b: jax.Array, bound: jax.Array, low: jax.Array) -> jax.Array:
    """`b` without what raises singular values that are above `low`: on their vectors."""
    down = normalizer(a)
    u, s, vt = svd(a * down)
    high = (s >= low * down[..., 0])[..., None, :]
    u, v = jnp.where(high, u, 0), jnp.where(high, jnp.swapaxes(vt, -1, -2), 0)
    inner = matmul(matmul(jnp.swapaxes(u, -1, -2), b), v)
    rise = positive_part((inner + jnp.swapaxes(inner, -1, -2)) / 2)
    below = b - matmul(matmul(u, rise), jnp.swapaxes(v, -1, -2))
    # The bound 0 is that of one matrix.
    return jnp.where(bound > 0, below, 0)


def towards_lower_sum(
    a: jax.Array, b: jax.Array, radius: jax.Array, slack: Any, tolerance: float
) -> jax.Array:
    """`b` without what raises the sum of the singular values, where that is `radius`."""
    down = normalizer(a)
    factors = svd(a * down)
    s, largest = factors.s, factors.s[..., :1]
    kept = s > tolerance * largest + slack * down[..., 0]
    total = jnp.sum(jnp.where(kept, s, 0), axis=-1)[..., None, None]
    at_bound = total >= (radius * (1 - tolerance) - slack) * down
    u, vt = jnp.where(kept[..., None, :], factors.u, 0), jnp.where(kept[..., None], factors.vt, 0)
    polar = matmul(u, vt)
    rest = svd(beyond(factors, b, kept))
    # The sum grows by the inner product with the polar factor, and by what is added beyond it.
    growth = jnp.sum(polar * b, axis=(-2, -1))[..., None] + jnp.cumsum(rest.s, axis=-1)
    rank = jnp.sum(kept, axis=-1, keepdims=True).astype(a.dtype)
    count = lax.broadcasted_iota(a.dtype, s.shape, s.ndim - 1) + 1
    levels = jnp.max(growth / (rank + count), axis=-1, keepdims=True)
    first = jnp.sum(polar * b, axis=(-2, -1))[..., None] / jnp.maximum(rank, 1)
    level = jnp.maximum(jnp.where(rank > 0, jnp.maximum(levels, first), levels), 0)
    lower = b - level[..., None] * polar - compose(rest, jnp.minimum(rest.s, level))
    return jnp.where(at_bound, lower, b)


def beyond(factors: Svd, b: jax.Array, kept: jax.Array) -> jax.Array:
    """What of `b` has neither rows nor columns in common with the singular vectors kept."""
    u = jnp.where(kept[..., None, :], factors.u, 0)
    vt = jnp.where(kept[..., None], factors.vt, 0)
    b = b - matmul(u, matmul(jnp.swapaxes(u, -1, -2), b))
    return b - matmul(matmul(b, jnp.swapaxes(vt, -1, -2)), vt)


# The largest singular value.


# Compiled by itself, so that `jax.debug_nans` does not see the decomposition that failed.
@jax.jit
def surely_inside(a: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether all singular values are at most `bound`, one bool a matrix.

    The Cholesky decomposition of a symmetric matrix exists if it is positive definite, and is
    NaN otherwise.
    """
    down = normalizer(a)
    # Entries are at most 4, so that no singular value is above this, nor need the bound be.
    largest = 8 * math.sqrt(a.shape[-2] * a.shape[-1])
    bound = jnp.minimum(bound * down, largest) * (1 + _tolerance(a))
    gram = gram_matrix(a * down)
    slack = jnp.square(bound) * identity(gram) - gram
    root = jnp.linalg.cholesky(slack, symmetrize_input=False)
    return ~jnp.isnan(root[..., -1, -1]) | jnp.all(a == 0, axis=(-2, -1))


def _surely_beyond(a: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether some singular value is above `bound`, for some of these matrices; one bool each.

    No column of ``A^T A`` is longer than its largest eigenvalue, nor much shorter for a matrix
    of random numbers: of a square one, 0.35 of it.
    """
    lengths = jnp.sqrt(jnp.sum(jnp.square(gram_matrix(a)), axis=-2))
    return jnp.max(lengths, axis=-1) > jnp.square(bound[..., 0, 0])
