"""Floating-point helpers shared by the sets and the verbs."""

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from optax_constraints._sharding import explicit_axes

# Before JAX 0.8 what was float64 for a while is float32 in a batch: there is none of it there.
enable_x64: Any = getattr(jax, "enable_x64", None)


def compute_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which norms of a leaf are taken: float32, or float64 if one is float64."""
    wide = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widest(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype that holds the numbers of all; also where JAX promotes nothing by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes[1:], jnp.dtype(dtypes[0]))


def eps(dtype: jax.typing.DTypeLike) -> float:
    """Machine epsilon of a floating dtype, bfloat16 included, as a Python number."""
    return float(jnp.finfo(dtype).eps)


def sum_of_squares(x: jax.Array, axis: tuple[int, ...] | None) -> jax.Array:
    """The sum of squares along `axis`, kept as axes of length 1; may overflow.

    Nothing but the square stands inside the reduction: XLA's CPU backend recognises that
    form, and turns a constant beside it into an array of the size of `x`.
    """
    return jnp.sum(jnp.square(x), axis=axis, keepdims=True)


def _parts(x: jax.Array, axis: tuple[int, ...] | None) -> int:
    """In how many parts a GPU takes sums along the first axis that leave the last: columns.

    XLA gives 64 columns to a block of threads. Where that leaves most of the GPU idle, it does not
    fuse the sums with the optimizer, and reads the weights once more.
    """
    if axis is None or 0 not in axis or x.ndim - 1 in axis or explicit_axes(x):
        return 1
    parts = 32
    while parts > 1 and (x.shape[0] % parts or x.shape[0] < 128 * parts):
        parts //= 2
    return parts


def _sum_of_squares_in_parts(x: jax.Array, axis: tuple[int, ...] | None) -> jax.Array:
    """`sum_of_squares`, first of the parts that there are."""
    parts = _parts(x, axis)
    if axis is None or parts == 1:
        return sum_of_squares(x, axis)
    split = x.reshape(parts, -1, *x.shape[1:])
    squares = jnp.sum(jnp.square(split), axis=tuple(a + 1 for a in axis), keepdims=True)
    # Without a barrier XLA makes one sum of the two.
    return jnp.sum(lax.optimization_barrier(squares), axis=0)


def _three_range_norm(
    x: jax.Array, axis: tuple[int, ...] | None, squares: jax.Array | None = None
) -> jax.Array:
    """The norm where the sum of squares left its safe range, by sums over scaled entries.

    J. L. Blue, "A portable Fortran program to find the Euclidean norm of a vector",
    ACM TOMS 4(1), 1978, without its branches. Powers of two scale exactly.
    """
    down, up = _scales(x.dtype)
    huge, tiny = (sum_of_squares(x * scale, axis) for scale in (down, up))
    return norm_by_sums(sum_of_squares(x, axis) if squares is None else squares, huge, tiny)


def _scales(dtype: jnp.dtype) -> tuple[float, float]:
    exponent = 3 * int(jnp.finfo(dtype).maxexp) // 4
    return 2.0**-exponent, 2.0**exponent


def norm_by_sums(squares: jax.Array, huge: jax.Array, tiny: jax.Array) -> jax.Array:
    """The norm from the sums of squares in three ranges."""
    down, up = _scales(squares.dtype)
    norm = jnp.where(squares == jnp.inf, jnp.sqrt(huge) * up, jnp.sqrt(squares))
    return jnp.where(_may_have_underflowed(squares), jnp.sqrt(tiny) * down, norm)


def _may_have_underflowed(squares: jax.Array) -> jax.Array:
    return squares < 2.0 ** (-5 * int(jnp.finfo(squares.dtype).maxexp) // 8)


def _left_its_range(squares: jax.Array) -> jax.Array:
    return (squares == jnp.inf) | _may_have_underflowed(squares)


def _fallback_norm(x: jax.Array, axis: tuple[int, ...] | None) -> jax.Array:
    """The same, with the scaled sums taken only when there is a unit that needs them."""
    squares = sum_of_squares(x, axis)
    return lax.cond(
        jnp.any(_left_its_range(squares)),
        lambda x, squares: _three_range_norm(x, axis, squares),
        lambda x, squares: jnp.sqrt(squares),
        x,
        squares,
    )


def _wide_norm(x: jax.Array, axis: tuple[int, ...] | None, *, in_parts: bool = False) -> jax.Array:
    """The norm by one sum in float64, where no square of a float32 leaves the range.

    CPUs and GPUs have the type, whether or not JAX gives it to its users. XLA makes one kernel of
    one sum and the optimizer before it, but not of three, nor of what is under a condition.
    """
    squares = _sum_of_squares_in_parts if in_parts else sum_of_squares
    with enable_x64(True):
        return jnp.sqrt(squares(x.astype(jnp.float64), axis)).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _differentiable_norm(x: jax.Array, axis: tuple[int, ...] | None) -> jax.Array:
    axes = range(x.ndim) if axis is None else axis
    if all(x.shape[a] == 1 for a in axes):
        # XLA would make (x * up) ** 2 of a single number x ** 2 * inf.
        return jnp.abs(x)
    scaled = functools.partial(_three_range_norm, axis=axis)
    if x.dtype == jnp.float64 or enable_x64 is None:
        return lax.platform_dependent(
            x, cpu=functools.partial(_fallback_norm, axis=axis), default=scaled
        )
    wide = functools.partial(_wide_norm, axis=axis)
    return lax.platform_dependent(
        x, cpu=wide, cuda=functools.partial(wide, in_parts=True), default=scaled
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _plain_norm(x: jax.Array, axis: tuple[int, ...] | None) -> jax.Array:
    if _parts(x, axis) == 1:
        return jnp.sqrt(sum_of_squares(x, axis))
    squares = (functools.partial(f, axis=axis) for f in (_sum_of_squares_in_parts, sum_of_squares))
    in_parts, whole = squares
    return jnp.sqrt(lax.platform_dependent(x, cuda=in_parts, default=whole))


@functools.partial(jax.jit, static_argnums=1, inline=True)
def plain_norm(x: jax.Array, axis: tuple[int, ...] | None) -> jax.Array:
    """`norm` by one sum of squares, which overflows and underflows."""
    return _plain_norm(x, axis)


def _norm_jvp(function, axis, primals, tangents):
    (x,), (dx,) = primals, tangents
    n = function(x, axis)
    direction = x / jnp.where(n > 0, n, 1)
    return n, jnp.sum(direction * dx, axis=axis, keepdims=True)


_differentiable_norm.defjvp(lambda *args: _norm_jvp(norm, *args))
_plain_norm.defjvp(lambda *args: _norm_jvp(plain_norm, *args))


# Compiled by itself, so that calls outside jit find the program they made before.
@functools.partial(jax.jit, static_argnums=1)
def norm(x: jax.Array, axis: tuple[int, ...] | None) -> jax.Array:
    """Euclidean norm along `axis`, kept as axes of length 1.

    Right from the smallest normal number to the largest, and differentiable at zero
    (with derivative 0 there). One pass over `x`. On a CPU and on a GPU there is one sum, in
    float64 (since JAX 0.8). Of float64 itself the scaled sums are under a condition on a CPU, where
    XLA does not fuse them with the plain one. Elsewhere sibling sums share their pass, and all
    three are taken at once.

    Args:
        x: Array in float32 or float64.
        axis: Axes along which to sum; None for all.

    Returns:
        The norms, in the dtype of `x`.
    """
    return _differentiable_norm(x, axis)


def row_sums(*terms: jax.Array) -> list[jax.Array]:
    """The sums over arrays of one shape, without derivative, in one pass without copies.

    XLA's CPU backend would take one sum after the other, and write down what each reads. One
    long sum loses digits in older versions of XLA: sums over rows come first.
    """

    def together(*terms: jax.Array) -> Any:
        zeros = tuple(jnp.zeros((), x.dtype) for x in terms)
        last = (terms[0].ndim - 1,)
        return lax.reduce(terms, zeros, lambda a, b: tuple(map(operator.add, a, b)), last)

    def apart(*terms: jax.Array) -> Any:
        return tuple(jnp.sum(x, axis=-1, dtype=x.dtype) for x in terms)

    terms = tuple(jnp.atleast_1d(lax.stop_gradient(x)) for x in terms)
    rows = lax.platform_dependent(*terms, cpu=together, default=apart)
    return [jnp.sum(x, dtype=x.dtype) for x in rows]


def norm_of(make: Callable[..., Any], *trees: Any, squares: jax.Array | None = None) -> jax.Array:
    """The Euclidean norm of all entries of ``make(*trees)``, which is not written down.

    Args:
        make: Makes a tree of arrays of trees of arrays, entry by entry.
        trees: What it takes.
        squares: The sum of squares, if it is known; it may have overflowed.

    Returns:
        A scalar in float32, or float64 if one of the arrays is, without derivative.
    """
    trees = lax.stop_gradient(trees)

    def made(trees: Any) -> list[jax.Array]:
        leaves = [jnp.atleast_1d(x) for x in jax.tree.leaves(make(*trees))]
        dtype = compute_dtype(*(x.dtype for x in leaves))
        return [x.astype(dtype) for x in leaves]

    def fallback(squares: jax.Array, trees: Any) -> jax.Array:
        leaves = made(trees)
        if sum(x.size for x in leaves) == 1:
            # XLA would make (x * up) ** 2 of a single number x ** 2 * inf.
            return functools.reduce(operator.add, (jnp.sum(jnp.abs(x)) for x in leaves))
        parts = [row_sums(*(jnp.square(x * s) for s in _scales(x.dtype))) for x in leaves]
        huge, tiny = (functools.reduce(operator.add, own) for own in zip(*parts, strict=True))
        return norm_by_sums(squares, huge, tiny)

    def conditional(squares: jax.Array, trees: Any) -> jax.Array:
        scaled = _left_its_range(squares)
        return lax.cond(scaled, fallback, lambda squares, _: jnp.sqrt(squares), squares, trees)

    if squares is None:
        rows = [sum_of_squares(x, (-1,)) for x in made(trees)]
        squares = functools.reduce(operator.add, map(jnp.sum, rows))
    return lax.platform_dependent(squares, trees, cpu=conditional, default=fallback)


def power_of_two(largest: jax.Array) -> jax.Array:
    """A power of two by which a number, such as the largest of many, comes near 1.

    Of zero, subnormal numbers and what is not finite it is 1.
    """
    ordinary = (largest >= jnp.finfo(largest.dtype).tiny) & (largest < jnp.inf)
    _, exponent = jnp.frexp(jnp.where(ordinary, largest, 1))
    # 2^-128 is not a normal float32.
    exponent = jnp.minimum(exponent, jnp.finfo(largest.dtype).maxexp - 2)
    return jnp.ldexp(jnp.ones_like(largest), -exponent)


def power_below(x: jax.Array) -> jax.Array:
    """The power of two at or below a positive number, to the bit; within range also of others.

    From its bits: XLA's CPU backend compiles such operations into what uses them.
    """
    info = jnp.finfo(x.dtype)
    ordinary = jnp.clip(x, 4 * float(info.tiny), 2.0 ** (int(info.maxexp) - 3))
    kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(ordinary, kind) >> info.nmant << info.nmant
    return lax.bitcast_convert_type(bits, x.dtype)


def in_turn(x: jax.Array, before: jax.Array | None) -> jax.Array:
    """`x` to the bit, but on the CPU it is not known until the array `before` is.

    XLA's CPU backend drops optimization barriers. Where nothing orders them, it takes the sums
    over many leaves first, and keeps what it has summed of all of them at once.
    """
    if before is None or not before.size or not isinstance(x, Tracer):
        return x
    return _times(x, _one_after([before]))


@jax.jit
def _one_after(arrays: list[jax.Array]) -> jax.Array:
    """The number 1, which on the CPU is not known until all of the arrays are."""

    def one(number: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(number, jnp.dtype(f"uint{8 * number.dtype.itemsize}"))
        # There are at most 64 of them. XLA does not know that, and so not that this is always 1.
        always = 1 - (lax.population_count(bits).astype(jnp.int32) >> 7)
        # A reduction is a kernel of its own: what waits for it is known later than what else uses
        # the norms, and so XLA puts that first.
        return jnp.max(always * np.asarray([0, 1], np.int32))

    dtype = widest(*(x.dtype for x in arrays))

    def entry(x: jax.Array) -> jax.Array:
        # What has computed one entry, has computed all of them. Not of a vector of all: on a mesh
        # that would be gathered.
        if explicit_axes(x):
            return jnp.max(x)
        return lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())

    each = (entry(lax.stop_gradient(x)).astype(dtype) for x in arrays)
    number = functools.reduce(lax.max, each)
    return lax.platform_dependent(number, cpu=one, default=lambda n: jnp.ones_like(n, jnp.int32))


@jax.jit
def _times(x: jax.Array, one: jax.Array) -> jax.Array:
    return x * one.astype(x.dtype)


AT_ONCE = 2**22
"""So many entries may be kept of several leaves at once: 16 MB in float32."""


class InTurn:
    """The order in which leaves are summed, so that what is kept of them shares its memory.

    As many leaves at once as together have about the size of the largest, or `AT_ONCE`, take a
    turn, and the next ones wait until the norms of these are known, if they are not small beside
    the largest: to wait for a norm is a kernel more to compile.

    Args:
        largest: The size of the largest leaf.
    """

    def __init__(self, largest: int):
        self._most = max(largest + largest // 4, AT_ONCE)  # a kernel with its bias
        self._size = self._last = 0
        self._ends: list[tuple[int, jax.Array]] = []
        self._one: jax.Array | None = None

    def wait(self, x: Any) -> Any:
        """A tree of arrays to the bit, which is not known until the last turn is over."""
        leaves = jax.tree.leaves(x)
        size = sum(leaf.size for leaf in leaves)
        if self._size + size > self._most and self._ends:
            known = [norm for size, norm in self._ends if 32 * size >= self._most]
            self._one = _one_after(known or [norm for _, norm in self._ends])
            self._size, self._ends = 0, []
        self._size += size
        self._last = size
        one = self._one
        if one is None or not any(isinstance(leaf, Tracer) for leaf in leaves):
            return x
        return jax.tree.map(lambda leaf: _times(leaf, one), x)

    def end(self, known: Any) -> None:
        """Says what is known when the leaf that waited last has been summed: the last of these."""
        arrays = [
            x
            for x in jax.tree.leaves(known)
            if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        ]
        if arrays and arrays[-1].size:
            self._ends.append((self._last, arrays[-1]))


def stored(w: jax.Array) -> jax.Array:
    """Weights as their dtype holds them, where XLA would leave out the rounding of a sum."""
    dtype, held = compute_dtype(w.dtype), jnp.finfo(w.dtype)
    if dtype == w.dtype:
        return w
    wide = w.astype(dtype)
    kept = lax.reduce_precision(wide, held.nexp, held.nmant)
    if held.tiny > jnp.finfo(dtype).tiny:  # subnormal numbers of float16 would become zeros
        step = float(held.smallest_subnormal)
        kept = jnp.where(jnp.abs(wide) < float(held.tiny), jnp.round(wide / step) * step, kept)
    return kept.astype(w.dtype)


def read_again(x: jax.Array) -> jax.Array:
    """`x` to the bit, of which a GPU does not keep what was made of it before.

    Where the second pass over weights computes the sum of weights and update as the first did, XLA
    would keep the sum, which is a copy of the leaf.
    """
    return _read_again(x) if isinstance(x, Tracer) else x


@functools.partial(jax.jit, inline=True)
def _read_again(x: jax.Array) -> jax.Array:
    return lax.platform_dependent(x, cuda=lax.optimization_barrier, default=lambda x: x)


ARRAYS = np.ndarray, jax.Array


def is_array(value: Any) -> TypeGuard[np.ndarray | jax.Array]:
    """Whether a value is an array, of NumPy or of JAX."""
    return isinstance(value, ARRAYS)


def is_readable(array: Any) -> bool:
    """Whether this process can read the numbers of an array now."""
    if isinstance(array, Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def exponent_of(largest: jax.Array) -> jax.Array:
    """An exponent by which numbers up to `largest` are scaled to about 1, without underflow."""
    info = jnp.finfo(largest.dtype)
    exponent = jnp.frexp(largest)[1]
    return jnp.clip(exponent, int(info.minexp) + 2, int(info.maxexp) - 2)


def exp2(exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A power of two, to the bit."""
    return jnp.ldexp(jnp.ones((), dtype), exponent)
