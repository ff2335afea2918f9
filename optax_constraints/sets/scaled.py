"""Matrices that are scaled as a whole by their largest singular value.

That is found by a block of vectors, which `project` keeps in its state: from one step to the next
a matrix moves little, so that one more iteration does, of two products of the matrix with a few
vectors. No decomposition, and nothing larger than these vectors is summed over devices.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from optax_constraints import _numerics
from optax_constraints._axes import Axis
from optax_constraints._config import builtin
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import Number, number, value
from optax_constraints._sharding import automatic, vary_like
from optax_constraints.sets._common import MatrixSet, spectral_tolerance


class Scaled(MatrixSet):
    """Base of the sets onto which a matrix is scaled."""

    remembers = True
    starts_anew = True
    spreads = False
    only_down: ClassVar[bool] = False
    """Whether a smaller largest singular value is allowed, too."""

    def _bound(self, dtype: jnp.dtype) -> jax.Array:
        """The largest singular value that is allowed."""
        raise NotImplementedError

    def remember(self, w: jax.Array) -> Any:
        """Vectors near those of the largest singular values, for each matrix."""
        if not self.remembers:
            return ()
        return self._anywhere(Scaled._start, w, PartitionSpec())

    def _start(self, w: jax.Array) -> jax.Array:
        a, _ = self._matrices(w)
        return found(a).block if a.size else first_block(a)

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Scales one matrix, or each, with the help of the vectors that are remembered."""
        if not self.remembers or isinstance(memory, tuple):
            return self(w), memory

        def advance(w: jax.Array, this: Scaled, block: jax.Array) -> tuple[jax.Array, jax.Array]:
            a, restore = this._matrices(w)
            if not a.size:
                return w, block
            top = followed(a, block)
            return restore(this._scale(a, top)).astype(w.dtype), top.block

        return automatic(advance, w, self, memory, like=(w, memory))

    def _project(self, a: jax.Array) -> jax.Array:
        return self._scale(a, found(a)) if a.size else a

    def _scale(self, a: jax.Array, top: "Top") -> jax.Array:
        return scaled(a, top, self._bound(a.dtype), self.only_down)


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class FixedSpectralNorm(Scaled):
    """The largest singular value is `value`: ``{W : ||W||_2 = value}``.

    Not convex. The whole matrix is multiplied by ``value / ||W||_2``, which keeps the ratios of
    its singular values. That is not the nearest point, which would change the largest alone. A
    matrix of zeros stays zero.

    In training, each step costs two products of the matrix with up to 12 vectors, whose memory
    is in the state of `project`: a Rayleigh-Ritz step on vectors near the singular ones, the
    residuals of these, and where they were (A. V. Knyazev, "Toward the optimal preconditioned
    eigensolver: locally optimal block preconditioned conjugate gradient method", SIAM J. Sci.
    Comput. 23, 2001), with a little of fixed random vectors, which finds what is new. Where the
    residual is above 1% of the singular value, there are more of these steps, up to 10. By hand,
    and when training starts, there are up to 60 from random vectors, until the residual is below
    0.01%: about the time of a singular value decomposition. A side of at most 12 is exact.

    Accuracy: the estimate is a Rayleigh quotient, and so never above the largest singular value:
    that of the result is `value` or more. With the residual at 1%, the estimate is within 0.71%
    of a singular value, and in training that is the largest one: over 1,000 steps of Adam at a
    rate of 1e-2 the result is at most 1% above `value` after each step, and usually 0.01%. A few
    vectors can miss a new direction that is orthogonal to all of them, until some steps later. In a
    diagonal matrix with 30 entries, an entry that grows by 1% of the largest in each step was up to
    6% above `value`, for 5 steps; with 200 entries up to 14%, for 13 steps. `violations` without a
    state starts anew, and sees it. A bound that holds for certain is
    `MaxSpectralNorm` with ``method="clip"``. Derivatives are as exact as the singular vectors.

    T. Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018,
    with one vector and inside of the loss. J. Kuczynski and H. Wozniakowski, "Estimating the
    largest eigenvalue by the power and Lanczos algorithms with a random start", SIAM J. Matrix
    Anal. Appl. 13, 1992, on how it may miss.

    Cost:
        Two products of the matrix with up to 12 vectors in each step. When training starts, and by
        hand, about the time of a singular value decomposition.

    Args:
        value: The largest singular value, a number of at least 0, a JAX scalar or a schedule.
        axis: What is the matrix, as for `Orthogonal`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `value` is negative or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.fixed_spectral_norm(1.0)(jnp.array([[4.0, 0.0], [0.0, 2.0]]))
        Array([[1. , 0. ],
               [0. , 0.5]], dtype=float32)
    """

    formula = "{ W : σ₁(W) = {value} }"

    value: Number = number(low=0)
    axis: Axis = None

    def _bound(self, dtype: jnp.dtype) -> jax.Array:
        return value(self.value, dtype)

    def _touches(self, w: jax.Array) -> jax.Array:
        """All matrices but those of zeros."""
        return jnp.any(self._matrices(w)[0] != 0, axis=(-2, -1))

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The singular values, of which the largest is given."""
        gauge = super().gauge(w, memory)
        return dataclasses.replace(gauge, high=value(self.value, gauge.values.dtype))


fixed_spectral_norm = FixedSpectralNorm


# The largest singular value, from below.

_FOLLOWED = 4
"""How many singular vectors are followed, with two more vectors for each."""
_STEPS, _RESIDUAL = 10, 1e-2
_FIRST_STEPS, FIRST_RESIDUAL = 60, 1e-4
# How much of other directions is beside the vectors, and the share below which a direction
# counts as one that the others have already.
_NOISE, _DEPENDENT = 0.1, 1e-3


_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Top(NamedTuple):
    """The largest singular value of each matrix (..., rows, columns), and vectors that have it."""

    norm: jax.Array
    """The length of the image of a unit vector, of the matrix times `down`; NaN if not finite."""
    u: jax.Array
    v: jax.Array
    """Unit vectors with ``u^T A v`` that length."""
    down: jax.Array
    """A power of two for each matrix."""
    block: jax.Array
    """Orthonormal vectors (..., smaller side, up to 12) from which to go on."""


@jax.jit
def found(a: jax.Array) -> Top:
    """The largest singular value from random vectors."""
    return _top(a, first_block(a), _FIRST_STEPS, FIRST_RESIDUAL)


@jax.jit
def followed(a: jax.Array, block: jax.Array) -> Top:
    """The same from the vectors of a matrix nearby."""
    size = jnp.sum(jnp.square(block), axis=(-2, -1), keepdims=True)
    usable = (size > 0) & (size < jnp.inf)
    return _top(a, jnp.where(usable, block, first_block(a)), _STEPS, _RESIDUAL)


def _random(rows: int, columns: int, dtype: jnp.dtype) -> jax.Array:
    """Numbers from -1 to 1, the same each time and on each device: a hash of their places."""
    shape = (rows, columns)
    x = columns * lax.broadcasted_iota(jnp.uint32, shape, 0)
    x = x + lax.broadcasted_iota(jnp.uint32, shape, 1) + 1
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return (x >> 8).astype(dtype) / 2**23 - 1


def first_block(a: jax.Array) -> jax.Array:
    """Vectors to start from, which for a small matrix are all there are."""
    n, most = min(a.shape[-2:]), 3 * _FOLLOWED
    block = jnp.eye(n, dtype=a.dtype) if n <= most else _orthonormal(_random(n, most, a.dtype))
    return jnp.broadcast_to(block, (*a.shape[:-2], *block.shape))


def _top(a: jax.Array, block: jax.Array, steps: int, residual: float) -> Top:
    # How it was found has no derivative: see `_differentiable`.
    a, block = lax.stop_gradient((a, block))
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    finite = largest < jnp.inf
    down = _numerics.power_of_two(largest)
    wide = a.shape[-2] < a.shape[-1]
    n, m = sorted(a.shape[-2:])
    whole = n <= 3 * _FOLLOWED
    random = _NOISE / n**0.5 * _random(n, _FOLLOWED, a.dtype)

    def times(x: jax.Array, *, back: bool) -> jax.Array:
        # The vectors are scaled, lest the matrix is copied.
        b = jnp.swapaxes(a, -1, -2) if back != wide else a
        return jnp.where(finite, _matmul(b, x * down), 0)

    def step(carry: Any) -> Any:
        k, block, u, v, off = carry
        image = times(block, back=False)
        values, q = jnp.linalg.eigh(_inner(image, image), symmetrize_input=False)
        best = q[..., ::-1][..., :_FOLLOWED]
        x, image = _matmul(block, best), _matmul(image, best)
        back = times(image, back=True)
        rest = back - values[..., None, ::-1][..., :_FOLLOWED] * x
        now = _norm(rest[..., :1]) / _nonzero(jnp.square(_norm(image[..., :1])))
        after = block if whole else _next(x, rest, block[..., :_FOLLOWED] + random)
        new = after, _unit(image[..., :1]), back[..., :1] / _nonzero(_norm(image[..., :1])), now
        old = block, u, v, off
        return k + 1, *(jnp.where(off > residual, *both) for both in zip(new, old, strict=True))

    batch = a.shape[:-2]
    start = block, *(jnp.zeros((*batch, side, 1), a.dtype) for side in (m, n))
    off = jnp.where(finite, jnp.inf, 0).astype(a.dtype)
    _, block, u, v, _ = lax.while_loop(
        lambda carry: (carry[0] < steps) & jnp.any(carry[-1] > residual),
        step,
        (jnp.zeros((), jnp.int32), *vary_like((*start, off), a)),
    )
    norm, v = _norm(v), _unit(v)
    return Top(jnp.where(finite, norm, jnp.nan), *((v, u) if wide else (u, v)), down, block)


def _next(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Orthonormal vectors, nearly so as they come in, and what others add to them."""
    x = 1.5 * x - _matmul(x, _inner(x, x)) / 2
    more = jnp.concatenate(others, axis=-1)
    for _ in range(2):  # what is left of a vector after the first time is not at right angles
        more = more / _nonzero(_norm(more))
        more = more - _matmul(x, _inner(x, more))
    return jnp.concatenate([x, _orthonormal(more)], axis=-1)


def _orthonormal(x: jax.Array) -> jax.Array:
    """Orthonormal vectors that span the same space; zeros for what depends on others."""
    values, q = jnp.linalg.eigh(_inner(x, x), symmetrize_input=False)
    values = values[..., None, :]
    independent = values > _DEPENDENT * jnp.maximum(values[..., -1:], 0)
    return jnp.where(independent, _matmul(x, q) / jnp.sqrt(jnp.where(independent, values, 1)), 0)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    return _matmul(jnp.swapaxes(x, -1, -2), y)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=-2, keepdims=True))


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)


def _unit(x: jax.Array) -> jax.Array:
    return x / _nonzero(_norm(x))


# What is made of it.


@jax.custom_jvp
def _differentiable(a: jax.Array, top: Top) -> jax.Array:
    """The largest singular value, of matrices times `down`, as a function of them."""
    del a
    return top.norm


@_differentiable.defjvp
def _differentiable_jvp(primals, tangents):
    (_, top), (da, _) = primals, tangents
    slope = jnp.sum(top.u * _matmul(da, top.v * top.down), axis=(-2, -1), keepdims=True)
    return top.norm, slope * (1 + (top.norm - top.norm))  # NaN where that is


def largest_value(a: jax.Array) -> jax.Array:
    """The largest singular value of each matrix, without what a state remembers.

    From below; within `FIRST_RESIDUAL` of a singular value, as a share of it.
    """
    top = found(a)
    return (top.norm / top.down)[..., 0, 0]


@functools.partial(jax.jit, static_argnums=3)
def scaled(a: jax.Array, top: Top, bound: jax.Array, only_down: bool) -> jax.Array:
    """Matrices whose largest singular value is, or is at most, a bound.

    The factor is exactly 1 for those that are there already, up to rounding.
    """
    norm = _differentiable(a, top)
    ratio = norm / jnp.maximum(bound, jnp.finfo(a.dtype).tiny) / top.down
    there = jnp.abs(ratio - 1) <= spectral_tolerance(a)
    still = there | (top.norm == 0)
    if only_down:
        still = still | (ratio <= 1)
        ratio = jnp.where(still, 1, ratio)
    else:
        # Only the value snaps to 1: the derivative there is not that of the identity.
        snap = jnp.where(still, 1 - ratio, 0)
        ratio = ratio + lax.stop_gradient(snap)
    return a * (jnp.where(bound > 0, 1, 0).astype(a.dtype) / ratio)
