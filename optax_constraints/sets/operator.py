"""Convolutions as linear operators on images."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from optax_constraints import _numerics
from optax_constraints._axes import LeafLayout, drop_axes
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint, own_arrays
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import Number, check_numbers, number, value
from optax_constraints._sharding import automatic
from optax_constraints._text import as_int, describe, shown
from optax_constraints.sets._common import spectral_tolerance, widen
from optax_constraints.sets.combinators import Stacked

Sizes: TypeAlias = int | Sequence[int] | None
Padding: TypeAlias = str | int | Sequence[int | Sequence[int]] | None

_ZEROS = ("SAME", "SAME_LOWER", "VALID", "CAUSAL")
_NAMES = ("strides", "padding", "dilation", "groups")
_EXAMPLE = 'strides=1, padding="SAME", dilation=1, groups=1'


class Convolution(NamedTuple):
    """How a layer moves its kernel (*window, in / groups, out) over an image."""

    strides: tuple[int, ...]
    padding: Any
    """Text, or how many zeros are around an image."""
    dilation: tuple[int, ...]
    groups: int
    input_dilation: tuple[int, ...]


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class MaxOperatorNorm(Constraint):
    """The convolution with a kernel makes no image longer than `max_value` times.

    ``{K : bound(K) <= max_value}``, where ``bound(K)`` is never below ``||conv_K||_2``, the norm
    of the convolution as a linear operator on images of several channels, whatever their size. So
    it bounds the Lipschitz constant of the layer, for certain. The set is convex, but the
    projection is not the nearest point: it multiplies the kernel, or of a convolution in groups
    the kernel of each group, by ``min(1, max_value / bound(K))``.

    The bound: with zeros around it, or with none, an image is a part of an infinite one, and what
    comes out a part of what the infinite one gives, so that the norm is at most the largest one
    over all frequencies of the matrices ``sum_p K[p] exp(-i p . theta)`` (in, out). On a circle the
    frequencies are some of those. With strides, pixels that are a stride apart become channels,
    and the frequencies are those of the coarser image; strides that wrap around a circle need not
    fit, and count as 1. Dilation changes only how strides count: by their greatest common
    divisor. Frequencies are tried on a grid of 8 (n - 1) points for a window of n. The square of
    the norm of a matrix times a fixed vector is a trigonometric polynomial of degree n - 1,
    between 0 and its maximum, so that between two points it is at most ``1 / cos(pi / 16)^2`` of
    what it is at the nearer one: 2% of the norm for each axis of the window (M. Riesz, 1914, see
    P. Borwein and T. Erdelyi, "Polynomials and Polynomial Inequalities", 1995). At each point the
    norm is bounded by that of the singular values to the power 128, by five squarings of a Gram
    matrix: B. Delattre et al., "Efficient bound of Lipschitz constant for convolutional layers by
    Gram iteration", ICML 2023, and "Spectral norm of convolutional layers with circular and zero
    paddings", 2024, arXiv:2402.00240. That is at most a factor of ``r^(1/128)`` for r channels, the
    fewer of the two: 3.3% for 64.

    For random 3x3 kernels the bound is 4% to 6% above the norm on images of 16x16, and up to 12%
    on those of 8x8. It is more for images that are hardly larger than the window (30% to 50% for
    3x3), for windows of more axes, and where strides count as 1: with circular padding, and where
    pixels are set apart as well.

    Cost:
        Six products of complex matrices of the fewer channels at each frequency, of which a 3x3
        window has 130. That grows with the cube of the channels, and does not depend on the size of
        images and batches. 32 frequencies are computed at a time.

    Args:
        max_value: The bound, a number of at least 0, a JAX scalar or a schedule.
        strides: The strides of the layer, an int or one for each axis of the window. If this and
            the next three are left out, `layout` of `optax_constraints.flax` must tell them;
            an array by itself does not.
        padding: As of Flax and JAX: `"SAME"`, `"VALID"`, `"CAUSAL"`, how many zeros on each side,
            or `"CIRCULAR"`. `"REFLECT"` has no bound here.
        dilation: Of the kernel: how far its entries are apart.
        groups: The number of groups of channels.
        input_dilation: How far pixels are set apart beforehand, as by a transposed convolution
            with these as strides; by default as the layout says, or 1.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `max_value` is negative or NaN, or a size is below 1; at bind, if neither
            these arguments nor a layout tell what the layer does, the two say different things,
            or the kernel is not one of such a layer.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> blur = jnp.ones((3, 3, 1, 1))  # it makes a constant image 9 times as bright
        >>> bound = oc.max_operator_norm(1.0, strides=1, padding="SAME", dilation=1, groups=1)
        >>> round(1 / float(bound(blur)[0, 0, 0, 0]), 2)
        9.36
    """

    formula = "{ K : bound(K) ≤ {max_value} }, with bound(K) ≥ ‖x ↦ K * x‖₂"

    max_value: Number = number(low=0)
    strides: Sizes = None
    padding: Padding = None
    dilation: Sizes = None
    groups: int | None = None
    input_dilation: Sizes = None

    _not_shown = (*Constraint._not_shown, *_NAMES, "input_dilation")

    def __post_init__(self):
        own_arrays(self)
        check_numbers(self)
        for name in ("strides", "dilation", "groups", "input_dilation"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, _sizes(name, given, single=name == "groups"))
        if self.padding is not None:
            object.__setattr__(self, "padding", _padding("MaxOperatorNorm", self.padding))

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Scales one kernel (*window, in / groups, out)."""
        return automatic(lambda w, this: this._whole(w), jnp.asarray(w), self)

    def _whole(self, w: jax.Array) -> jax.Array:
        kernels, restore = self._kernels(w)
        if not w.size:
            return w
        bound = value(self.max_value, kernels.dtype)
        scaled = _scaled(kernels, bound, *self._phases(w.shape))
        return restore(scaled).astype(w.dtype)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """Of which groups of an allowed kernel the bound is reached, up to rounding."""

        def reaches(w: jax.Array, this: MaxOperatorNorm) -> jax.Array:
            kernels, _ = this._kernels(w)
            if not w.size:
                return jnp.zeros(len(kernels), bool)
            low = 1 - 2 * (_numerics.eps(w.dtype) + _rounding(kernels))
            norms = _bounds(kernels, *this._phases(w.shape))
            return norms >= low * value(this.max_value, kernels.dtype)

        return automatic(reaches, w, self, spec=PartitionSpec())

    def _kernels(self, w: jax.Array) -> tuple[jax.Array, Any]:
        """The kernels (groups, *window, in, out) in float32 or wider, and the way back."""
        self._check(None, w.shape)
        wide, groups = widen("MaxOperatorNorm", w), cast(int, self.groups)
        parted = wide.reshape(*w.shape[:-1], groups, w.shape[-1] // groups)

        def restore(kernels: jax.Array) -> jax.Array:
            return jnp.moveaxis(kernels, 0, -2).reshape(w.shape)

        return jnp.moveaxis(parted, -2, 0), restore

    def _phases(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """By how many pixels an image, and what comes out, is taken apart along each axis."""
        rank = len(shape) - 2
        strides, dilation, apart = (
            _each(size, rank) for size in (self.strides, self.dilation, self.input_dilation or 1)
        )
        ones = (1,) * rank
        if max(strides, default=1) > 1:
            if self.padding == "CIRCULAR":
                return ones, ones
            return _reduced(strides, dilation), ones
        return ones, _reduced(apart, dilation)

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint for one leaf, with what the layout says of its layer."""
        stacked = layout.stacked if layout is not None else ()
        told = layout.convolution if layout is not None else None
        known = {} if told is None else told._asdict()
        own, values = drop_axes(shape, stacked), {}
        where = f"MaxOperatorNorm on {describe(path, shape)}"
        for name, of_layer in known.items():
            given = getattr(self, name)
            if name == "padding":
                of_layer = _padding(where, of_layer)
            if given is not None and not _agree(name, given, of_layer, len(own) - 2):
                raise ValueError(
                    f"{where}: {name}={given!r} is not what the layout says of this "
                    f"{cast(LeafLayout, layout).layer}, which is {of_layer!r}; leave it out."
                )
            values[name] = of_layer
        settled = cast(MaxOperatorNorm, super().settle(path, shape, layout))._replace(**values)
        missing = [name for name in _NAMES if getattr(settled, name) is None]
        if missing and layout is not None:
            raise ValueError(
                f"{where}: the layout does not know a convolution with this kernel of a "
                f"{layout.layer}. For a dense kernel write max_spectral_norm; for a convolution "
                f"of your own all of {_EXAMPLE}."
            )
        settled._check(path, own)
        return Stacked(settled, stacked) if stacked else settled

    def _check(self, path: str | None, shape: tuple[int, ...]) -> None:
        """Raises if this is not known to be, or is not, the kernel of such a convolution."""
        where = f"MaxOperatorNorm on {describe(path, shape)}"
        missing = [name for name in _NAMES if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"{where}: a kernel does not tell the {' and '.join(missing)} of its layer. Give "
                f"layout=layout(model), or write what they are, such as {_EXAMPLE}."
            )
        rank = len(shape) - 2
        if rank < 1:
            raise ValueError(
                f"{where}: a kernel has the axes (*window, in, out); for a dense kernel write "
                "max_spectral_norm, or leave this leaf free with None."
            )
        for name in ("strides", "dilation", "input_dilation"):
            sizes = getattr(self, name)
            if isinstance(sizes, tuple) and len(sizes) != rank:
                raise ValueError(
                    f"{where}: {name}={sizes!r} has {len(sizes)} numbers, and the window {rank} "
                    "axes; write one for each, or one for all."
                )
        if self.groups and shape[-1] % self.groups:
            raise ValueError(
                f"{where}: groups={self.groups} does not divide the {shape[-1]} outputs; write "
                "the feature_group_count of the layer."
            )
        if self.padding == "CIRCULAR" and max(_each(self.input_dilation or 1, rank)) > 1:
            raise ValueError(
                f"{where}: padding='CIRCULAR' with input_dilation={self.input_dilation!r} has no "
                "bound here; pad with zeros, or leave this leaf free with None."
            )

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The bounds of the groups."""
        del memory
        kernels, _ = self._kernels(w)
        norms = _bounds(kernels, *self._phases(w.shape)) if w.size else jnp.zeros(0)
        return Gauge("operator norms", norms, None, value(self.max_value, kernels.dtype))


max_operator_norm = MaxOperatorNorm


# What is given.


def _sizes(name: str, given: Any, *, single: bool) -> int | tuple[int, ...]:
    """Sizes as an int, or a tuple of them."""
    wanted = "an int" if single else "an int, or one for each axis of the window"
    several = isinstance(given, (tuple, list)) and not single
    try:
        sizes = tuple(map(as_int, given if several else (given,)))
    except TypeError:
        raise TypeError(f"MaxOperatorNorm: {name}={shown(given)} is not {wanted}.") from None
    if min(sizes, default=0) < 1:
        raise ValueError(f"MaxOperatorNorm: {name}={shown(given)} is below 1; write {wanted}.")
    return sizes if several else sizes[0]


def _padding(where: str, given: Any) -> Any:
    """Padding in a form that hashes."""
    wanted = "'SAME', 'VALID', 'CAUSAL' or 'CIRCULAR', an int, or a pair of ints for each axis"
    what = f"{where}: padding={shown(given)}"
    if isinstance(given, str):
        if given.upper() in (*_ZEROS, "CIRCULAR"):
            return given.upper()
        raise ValueError(f"{what} has no bound here; it is for {wanted}.")
    try:
        if not isinstance(given, (tuple, list)):
            return as_int(given)
        return tuple(
            tuple(map(as_int, own)) if isinstance(own, (tuple, list)) else as_int(own)
            for own in given
        )
    except TypeError:
        raise TypeError(f"{what} is none; write {wanted}.") from None


def _each(size: Any, rank: int) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,) * rank


def _agree(name: str, given: Any, of_layer: Any, rank: int) -> bool:
    """Whether two say the same; how many zeros there are makes no difference."""
    if name == "padding":
        return (given == "CIRCULAR") == (of_layer == "CIRCULAR")
    return _each(given, rank) == _each(of_layer, rank)


def _reduced(strides: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in terms of the pixels that one entry of a dilated kernel and the next see."""
    return tuple(s // math.gcd(s, d) for s, d in zip(strides, dilation, strict=True))


# The bound.

_SQUARINGS = 5
_POINTS = 8
"""Of the grid of frequencies along an axis, for each degree of a polynomial."""
_AT_ONCE = 32
"""How many frequencies are looked at together."""


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scaled(
    kernels: jax.Array, bound: jax.Array, of_image: tuple[int, ...], of_output: tuple[int, ...]
) -> jax.Array:
    ratio = _bounds(kernels, of_image, of_output) / jnp.maximum(
        bound, jnp.finfo(kernels.dtype).tiny
    )
    inside = ratio <= 1 + _rounding(kernels)
    factor = (bound > 0).astype(kernels.dtype) / jnp.where(inside, 1, ratio)
    return kernels * jnp.expand_dims(factor, tuple(range(1, kernels.ndim)))


def _rounding(kernels: jax.Array) -> float:
    """The relative rounding of a bound."""
    *_, a, b = kernels.shape
    return spectral_tolerance(kernels.reshape(len(kernels), -1, b)) + spectral_tolerance(
        kernels.reshape(len(kernels), a, -1)
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bounds(kernels: jax.Array, of_image: tuple[int, ...], of_output: tuple[int, ...]) -> jax.Array:
    """An upper bound of the norm of each of the convolutions with kernels (n, *window, in, out)."""
    largest = jnp.max(jnp.abs(kernels), axis=tuple(range(1, kernels.ndim)), keepdims=True)
    down = _numerics.power_of_two(largest)
    taps = _phases_as_channels(kernels * down, of_image, -2)
    taps = _phases_as_channels(taps, of_output, -1)
    n, *window, a, b = taps.shape
    places = np.array(list(np.ndindex(*window)), float)
    taps = taps.reshape(n, len(places), a, b)
    waves = _waves(_frequencies(window) @ places.T, taps.dtype)

    def at(wave: jax.Array) -> jax.Array:
        return _schatten(_spectrum(lax.stop_gradient(taps), wave))

    # The norms are only taken where they are largest once more, with a derivative.
    norms = lax.map(at, waves, batch_size=_AT_ONCE)
    best = jax.vmap(_schatten)(_spectrum(taps, waves[jnp.argmax(norms, axis=0)])[:, None])[:, 0]
    between = math.cos(math.pi / 2 / _POINTS) ** -sum(size > 1 for size in window)
    between *= 1 + _rounding(kernels)
    finite = jnp.reshape(largest < jnp.inf, -1)
    return jnp.where(finite, between * best / down.reshape(-1), jnp.nan)


def _phases_as_channels(kernels: jax.Array, phases: tuple[int, ...], channels: int) -> jax.Array:
    """Kernels for images of which pixels at a distance are one pixel of several channels."""
    for axis, phase in enumerate(phases, start=1):
        if phase == 1:
            continue
        size = kernels.shape[axis]
        pad = [(0, 0)] * kernels.ndim
        pad[axis] = (0, -size % phase)
        kernels = jnp.pad(kernels, pad)
        shape = kernels.shape
        kernels = kernels.reshape(*shape[:axis], -1, phase, *shape[axis + 1 :])
        kernels = jnp.moveaxis(kernels, axis + 1, channels - 1)
        shape = list(kernels.shape)
        shape[channels - 1 : len(shape) + channels + 1] = [phase * shape[channels]]
        kernels = kernels.reshape(shape)
    return kernels


def _frequencies(window: Sequence[int]) -> np.ndarray:
    """A grid of angles (points, axes), without those of which the negatives are there."""
    sizes = [_POINTS * (size - 1) if size > 1 else 1 for size in window]
    found = {}
    for point in itertools.product(*map(range, sizes)):
        negative = tuple(-i % size for i, size in zip(point, sizes, strict=True))
        found[min(point, negative)] = True
    return 2 * np.pi * np.array(list(found), float).reshape(-1, len(sizes)) / np.array(sizes)


def _waves(angles: np.ndarray, dtype: jnp.dtype) -> jax.Array:
    """Cosines and sines (points, 2, taps)."""
    return jnp.asarray(np.stack([np.cos(angles), -np.sin(angles)], axis=1), dtype)


def _spectrum(taps: jax.Array, wave: jax.Array) -> jax.Array:
    """The matrices of kernels (n, taps, in, out) at frequencies, of one or one for each."""
    wave = jnp.broadcast_to(wave, (len(taps), *wave.shape[-2:]))
    parts = jnp.einsum("nwp,npab->wnab", wave, taps, precision=lax.Precision.HIGHEST)
    return lax.complex(parts[0], parts[1])


def _schatten(m: jax.Array) -> jax.Array:
    """Upper bounds of the largest singular values of matrices (..., rows, columns)."""
    if m.shape[-2] > m.shape[-1]:
        m = jnp.swapaxes(m, -1, -2)
    gram = _product(m, jnp.conj(jnp.swapaxes(m, -1, -2)))
    bound = jnp.ones(m.shape[:-2], m.real.dtype)
    for k in range(_SQUARINGS + 1):
        square = jnp.sum(jnp.square(gram.real) + jnp.square(gram.imag), axis=(-2, -1))
        some = square > 0
        size = jnp.sqrt(jnp.where(some, square, 1))
        bound = jnp.where(some, bound * size ** (0.5 ** (k + 1)), 0)
        gram = gram / size[..., None, None].astype(gram.dtype)
        if k < _SQUARINGS:
            gram = _product(gram, gram)
    return bound


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
