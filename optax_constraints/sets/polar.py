"""The polar factor of matrices, by products alone."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from optax_constraints import _numerics
from optax_constraints.sets._common import spectral_tolerance as _tolerance
from optax_constraints.sets.singular_values import (
    compose,
    derivative,
    gram_matrix,
    identity,
    matmul,
    normalizer,
    once,
    svd,
)

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
    eye = identity(a)
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
        squared = matmul(error, error)
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
        moved = matmul(x, factor)
        moved_error = gram_matrix(moved) - eye
        going = open(error)[..., None, None]
        return k + 1, jnp.where(going, moved, x), jnp.where(going, moved_error, error)

    x = a / jnp.maximum(scale, jnp.finfo(a.dtype).tiny)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    ordinary = (largest <= 2) & (2 * a.shape[-2] ** 0.5 * largest >= 1)
    x = jnp.where(ordinary, x, a * normalizer(a))
    gram = gram_matrix(x)
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
    return once(
        lambda x: jnp.any(jnp.abs(error) > tolerance), lambda x: x - matmul(x, error / 2), x
    )


def _frobenius(a: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(a), axis=(-2, -1), keepdims=True))


@_polar.defjvp
def _polar_jvp(primals, tangents):
    (a, scale), (da, dscale) = primals, tangents
    down = normalizer(a)
    factors = svd(a * down)
    ones = jnp.ones_like(factors.s)
    dq = derivative(factors, da * down, ones, jnp.zeros_like(ones), jnp.zeros_like(ones))
    return _polar(a, scale), scale * dq + dscale * compose(factors, ones)


# Compiled by themselves, here and below, so that calls outside jit find their program again.
polar = jax.jit(_polar)
