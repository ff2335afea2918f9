"""Floating-point helpers shared by the sets and the verbs."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def compute_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which norms of a leaf are taken: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def eps(dtype: jax.typing.DTypeLike) -> float:
    """Machine epsilon of a floating dtype, bfloat16 included, as a Python number."""
    return float(jnp.finfo(dtype).eps)


def sum_of_squares(x: jax.Array, axis: Sequence[int] | None) -> jax.Array:
    """The sum of squares along `axis`, kept as axes of length 1; may overflow.

    Nothing but the square stands inside the reduction: XLA's CPU backend recognises that
    form, and turns a constant beside it into an array of the size of `x`.
    """
    return jnp.sum(jnp.square(x), axis=axis, keepdims=True)


def _three_range_norm(x: jax.Array, axis: Sequence[int] | None) -> jax.Array:
    """A norm that neither overflows nor underflows, from three sums of squares.

    J. L. Blue, "A portable Fortran program to find the Euclidean norm of a vector",
    ACM TOMS 4(1), 1978, without its branches: the sums share one pass where XLA fuses
    sibling reductions, and powers of two scale exactly.
    """
    info = jnp.finfo(x.dtype)
    exponent = 3 * int(info.maxexp) // 4
    down, up = 2.0**-exponent, 2.0**exponent
    middle = sum_of_squares(x, axis)
    huge = jnp.sqrt(sum_of_squares(x * down, axis)) * up
    small = jnp.sqrt(sum_of_squares(x * up, axis)) * down
    norm = jnp.where(middle < jnp.inf, jnp.sqrt(middle), huge)
    return jnp.where(middle < _underflow_threshold(x.dtype), small, norm)


def _underflow_threshold(dtype: jnp.dtype) -> float:
    """Sums of squares below this may have lost terms to underflow."""
    return 2.0 ** (-5 * int(jnp.finfo(dtype).maxexp) // 8)


def _fallback_norm(x: jax.Array, axis: Sequence[int] | None) -> jax.Array:
    """The plain norm, with the second pass taken only when a sum left the safe range."""
    squares = sum_of_squares(x, axis)
    threshold = _underflow_threshold(x.dtype)
    safe = jnp.all((squares >= threshold) & (squares < jnp.inf))
    return lax.cond(
        safe,
        lambda x, squares: jnp.sqrt(squares),
        lambda x, squares: _three_range_norm(x, axis),
        x,
        squares,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def norm(x: jax.Array, axis: Sequence[int] | None) -> jax.Array:
    """Euclidean norm along `axis`, kept as axes of length 1.

    Right from the smallest normal number to the largest, and differentiable at zero
    (with derivative 0 there). One pass over `x` on every backend: the CPU takes a second
    one only when a sum of squares overflowed or may have underflowed, which on an
    accelerator would mean a round trip to the host, so there three sums are taken at once.

    Args:
        x: Array in float32 or float64.
        axis: Axes along which to sum; None for all.

    Returns:
        The norms, in the dtype of `x`.
    """
    return lax.platform_dependent(
        x,
        cpu=functools.partial(_fallback_norm, axis=axis),
        default=functools.partial(_three_range_norm, axis=axis),
    )


@norm.defjvp
def _norm_jvp(axis, primals, tangents):
    (x,), (dx,) = primals, tangents
    n = norm(x, axis)
    direction = x / jnp.where(n > 0, n, 1)
    return n, jnp.sum(direction * dx, axis=axis, keepdims=True)
