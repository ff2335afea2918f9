"""Sets that let few of the entries of a unit, or few units, differ from zero."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from optax_constraints import _numerics
from optax_constraints._args import Arg
from optax_constraints._axes import Axis, LeafLayout, remove_axes
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import Limits, Number, check_number, is_schedule, number, value
from optax_constraints._numerics import in_turn
from optax_constraints._sharding import automatic, vary_like
from optax_constraints._text import describe, shown
from optax_constraints.sets._common import (
    InParts,
    LineSet,
    Parts,
    Terms,
    Units,
    UnitSet,
    check_floating,
    totals,
)
from optax_constraints.sets.combinators import Stacked


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class TopK(InParts, UnitSet):
    """At most `k` entries of each unit are not zero, ``{w : ||unit||_0 <= k}``, or `k` units.

    Not convex. The projection keeps the `k` entries of largest magnitude as they are and sets
    the others to zero, exactly, which is a nearest point. Of equal magnitudes the first ones
    are kept, so that there are never more than `k`. A NaN counts as larger than any number and
    stays; so does an infinity, as the largest of the numbers.

    The k-th magnitude is found bit by bit, without a sort: one pass that counts for each bit of
    the dtype, 31 for float32, all units at once. Where magnitudes are tied, one more for each
    bit of the size of a unit. So `k` may change, as in gradual pruning, and nothing compiles
    again.

    With ``of="units"``, for structured pruning, at most `k` units have an entry that is not zero:
    those of largest norm stay as they are. Units are then slices along `axis` as everywhere, such
    as neurons with ``axis=0`` for a Dense kernel (in, out), filters with ``"fan_in"``, and heads
    with ``(0, 2)`` for a kernel (in, heads, depth).

    The set is that of iterative hard thresholding, T. Blumensath and M. Davies, 2008; for a `k`
    that falls during training see M. Zhu and S. Gupta, "To prune, or not to prune", 2017.

    At zeros small steps are lost: what is not among the largest starts from zero again. With
    `straight_through` the steps of dropped entries add up in free weights, until they come back.

    Cost:
        One counting pass for each bit of the dtype, 31 for float32, and no sort. For
        ``of="units"``, one pass for the norms and one to choose.

    Args:
        k: How many entries to keep. An integer of at least 0 is a count, and a float in (0, 1]
            a fraction of the unit's size, to the nearest whole number and at least 1. Its type
            decides also for a JAX scalar or a schedule: a schedule of counts has to return
            integers.
        axis: The axes along which one unit runs: an int, several ints, None for the whole
            tensor, or `"fan_in"`.
        of: What `k` counts, and a fraction is a share of: the `"entries"` of each unit, or the
            `"units"` of the leaf; of a stack under `Stacked` or `"fan_in"`, those of each layer.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `k` is negative, or a float outside (0, 1], an axis is repeated, or `of` is
            something else; with ``of="units"``, if `axis` makes one unit of the leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.top_k(2)(jnp.array([1.0, -3.0, 2.0, 0.5]))
        Array([ 0., -3.,  2.,  0.], dtype=float32)
        >>> oc.top_k(1, axis=0, of="units")(jnp.array([[1.0, 3.0], [-3.0, 2.0]]))
        Array([[0., 3.],
               [0., 2.]], dtype=float32)
        >>> import jax
        >>> def loss(w):
        ...     return jnp.sum(oc.straight_through(w, oc.top_k(1)))
        >>> jax.grad(loss)(jnp.array([3.0, -2.0]))  # also of what is dropped
        Array([1., 1.], dtype=float32)
    """

    k: Number = number(low=0, high=2**31 - 1, whole=True)
    axis: Axis = None
    of: str = "entries"

    def __post_init__(self):
        if self.of not in ("entries", "units"):
            raise ValueError(
                f"TopK: of={shown(self.of)} is not allowed; write 'entries' for those of each "
                "unit, or 'units'."
            )
        high = 1 if _is_fraction(self.k) else jnp.iinfo(jnp.int32).max
        if check_number("TopK", "k", self.k, Limits(low=0, high=high)) == 0 and high == 1:
            raise ValueError(
                "TopK: k=0.0 as a fraction keeps nothing; write a fraction above 0, or the "
                "count k=0."
            )
        super().__post_init__()
        if self.of == "units":
            self._check_units("TopK", self.axis is None)

    @property
    def unitwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only
        """Whether units have nothing to do with one another."""
        return self.of == "entries"

    def _check_units(self, where: str, whole: bool) -> None:
        if whole:
            raise ValueError(
                f"{where}: axis={self.axis!r} makes the whole leaf one unit, of which at most k "
                "are to be kept; write the axes along which one of several units runs, such as "
                "axis=0 for the columns of a matrix."
            )

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint for one leaf; of units, `"fan_in"` layer by layer of a stack."""
        settled = cast(TopK, super().settle(path, shape, layout))
        if self.of == "entries":
            return settled
        axes = cast(tuple[int, ...], settled.axis)
        stacked = layout.stacked if layout is not None and self.axis == "fan_in" else ()
        self._check_units(f"TopK on {describe(path, shape)}", len({*axes, *stacked}) == len(shape))
        if not stacked:
            return settled
        return Stacked(settled._replace(axis=remove_axes(axes, stacked)), stacked)

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; the entries that are kept are not rounded."""
        w = jnp.asarray(w)
        if self.of == "entries":
            return self._onto(((w,),), self._units(w))[0]
        check_floating("TopK", w)
        axes, k = self._axes(w), self._count(w)
        return automatic(lambda w, k: _largest_units(w, k, axes), w, k) if w.size else w

    def _onto(self, terms: Terms, units: Units) -> Parts:
        parts = tuple(weights for weights, *_ in terms)
        for part in parts:
            check_floating("TopK", part)
        # Magnitudes are compared by their bits.
        dtype = _numerics.widest(*(part.dtype for part in parts))
        terms = tuple((own[0].astype(dtype), *own[1:]) for own in terms)
        k = self._count_of(units.size(parts), dtype)

        def largest(_: Any, terms: Terms, k: jax.Array) -> Parts:
            return _largest_of_units(terms, k, units)

        kept = automatic(largest, parts[0], terms, k, like=parts)
        return tuple(new.astype(part.dtype) for new, part in zip(kept, parts, strict=True))

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units in which all of `k` is used; of units, whether it is."""
        units = self._units(w)
        if self.of == "entries":
            return units.count((w != 0,)) >= self._count(w)
        return jnp.sum(units.count((w != 0,)) > 0, dtype=jnp.int32) >= self._count(w)

    def _count(self, w: jax.Array) -> jax.Array:
        units = self._units(w)
        count = units.size((w,)) if self.of == "entries" else math.prod(units.shape((w,)))
        return self._count_of(count, w.dtype)

    def _count_of(self, size: int, dtype: jnp.dtype) -> jax.Array:
        if not _is_fraction(self.k):
            return value(self.k, jnp.dtype(jnp.int32))
        share = value(self.k, _numerics.compute_dtype(dtype)) * size
        return jnp.maximum(jnp.round(share), 1).astype(jnp.int32)

    def __str__(self) -> str:
        """How the report shows it: what is counted only if it is units."""
        text = super().__str__()
        return text.replace(", 'entries'", "").replace(", 'units'", " units")

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The set in symbols."""
        size = " n" if _is_fraction(self.k) else ""
        if self.of == "units":
            return f"{{ w : at most {{k}}{size} units u ≠ 0 }}"
        return f"{{ w : ‖u‖₀ ≤ {{k}}{size} }}"

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The nonzero entries of each unit, or units, counted."""
        del memory
        units, high = self._units(w), self._count(w)
        counts = units.count((w != 0,))
        if self.of == "units":
            return Gauge("nonzero units", jnp.sum(counts > 0), None, high)
        return Gauge("nonzeros", counts, None, high)


top_k = TopK


def _is_fraction(k: Number) -> bool:
    """Whether a number is a share of the entries; what is not known yet has no type."""
    return not (isinstance(k, (str, Arg)) or is_schedule(k) or _is_integer(k))


def _is_integer(k: Number) -> bool:
    """Whether a number counts entries; what is no number at all is checked elsewhere."""
    kind = getattr(k, "dtype", None)
    return isinstance(k, int) if kind is None else jnp.issubdtype(kind, jnp.integer)


def _magnitude(w: jax.Array) -> jax.Array:
    """Integers in the order of the magnitudes: the bits without the sign."""
    kind = jnp.dtype(f"uint{8 * w.dtype.itemsize}")
    bits = lax.bitcast_convert_type(lax.stop_gradient(w), kind)
    return bits & jnp.asarray(jnp.iinfo(kind).max // 2, kind)


def _greatest(bits: int, start: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The greatest number of so many bits up to which a condition holds, from zeros `start`."""

    def decide(i, found):
        # Without jit, i is a Python number.
        larger = found | (jnp.ones((), found.dtype) << jnp.asarray(bits - 1 - i, found.dtype))
        return jnp.where(holds(larger), larger, found)

    return lax.fori_loop(0, bits, decide, start)


def _are_largest(terms: Terms, k: jax.Array, units: Units) -> Parts:
    """Which entries are among the first `k` by magnitude, or need not be dropped."""

    def magnitudes(after: jax.Array | None) -> Parts:
        return tuple(map(_magnitude, totals(terms, after)))

    parts = totals(terms)
    dtype = magnitudes(None)[0].dtype
    zeros = vary_like(jnp.zeros(units.shape(parts), jnp.int32), parts[0])

    def at_least(least: jax.Array) -> jax.Array:
        return units.count(tuple(m >= least for m in magnitudes(least)))

    bits = 8 * dtype.itemsize - 1
    least = _greatest(bits, zeros.astype(dtype), lambda least: at_least(least) >= k)
    excess = jnp.where(least > 0, at_least(least) - k, 0)
    # One less, so that zeros wrap around and are kept with their sign. Compared with zero
    # itself, the CPU would take subnormal numbers for zeros.
    least = jnp.maximum(least, 1) - 1

    def split(end: jax.Array) -> tuple[Parts, Parts]:
        """The entries above the least magnitude, and of those that are at it all before `end`."""
        lowered = [m - 1 for m in magnitudes(end)]
        places = _places(parts, units, end if len(parts) > 1 else None)
        first = ((m == least) & (place < end) for m, place in zip(lowered, places, strict=True))
        return tuple(m > least for m in lowered), tuple(first)

    def first_of_equal() -> jax.Array:
        size = units.size(parts)
        room = units.count(split(zeros + size)[1]) - excess
        return _greatest(size.bit_length(), zeros, lambda end: units.count(split(end)[1]) <= room)

    end = lax.cond(jnp.any(excess > 0), first_of_equal, lambda: zeros + units.size(parts))
    both = zip(*split(end), parts, strict=True)
    return tuple(above | first | jnp.isnan(part) for above, first, part in both)


def _places(parts: Parts, units: Units, after: jax.Array | None) -> Parts:
    """The place of each entry in its unit, part after part."""
    places, start = [], 0
    for part, axes in zip(parts, units.axes, strict=True):
        # Zero, but not known to be so before the loop.
        place = in_turn(jnp.ones((1,) * part.ndim, jnp.int32), after) - 1
        for a in axes:
            own = tuple(n if b == a else 1 for b, n in enumerate(part.shape))
            place = place * part.shape[a] + lax.broadcasted_iota(jnp.int32, own, a)
        places.append(place + start)
        start += math.prod(part.shape[a] for a in axes)
    return tuple(places)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _largest(terms: Terms, k: jax.Array, units: Units) -> Parts:
    """The first `k` entries of each unit by magnitude, and zeros."""
    kept = _are_largest(terms, k, units)
    return tuple(
        jnp.where(keep, part, jnp.zeros((), part.dtype))
        for keep, part in zip(kept, totals(terms), strict=True)
    )


@_largest.defjvp
def _largest_jvp(units, primals, tangents):
    y = _largest(*primals, units)
    room = units.count(tuple(part != 0 for part in y)) < primals[1]
    dparts = totals(tangents[0])
    return y, tuple(_where_free(a, room, da) for a, da in zip(y, dparts, strict=True))


# Compiled by itself, here and below, so that calls outside jit find their program again.
_largest_of_units = jax.jit(_largest, static_argnums=2)


@functools.partial(jax.jit, static_argnums=2)
def _largest_units(w: jax.Array, k: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The first `k` units by norm, and zeros."""
    return _largest_norms(w, k, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _largest_norms(w: jax.Array, k: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    norms = _numerics.norm(w.astype(_numerics.compute_dtype(w.dtype)), axes)
    # A unit counts as zero only if it is: a norm of subnormal entries may be 0.
    some = jnp.any(_magnitude(w) > 0, axis=axes, keepdims=True)
    norms = lax.bitcast_convert_type(
        jnp.maximum(_magnitude(norms), some.astype(_magnitude(norms).dtype)), norms.dtype
    )
    (kept,) = _are_largest(((norms,),), k, Units.one((norms,)))
    return jnp.where(kept, w, jnp.zeros((), w.dtype))


@_largest_norms.defjvp
def _largest_norms_jvp(axes, primals, tangents):
    y = _largest_norms(*primals, axes)
    some = jnp.any(y != 0, axis=axes, keepdims=True)
    room = jnp.sum(some, dtype=jnp.int32) < primals[1]
    return y, jnp.where(some | room, tangents[0], jnp.zeros((), y.dtype))


def _where_free(y: jax.Array, room: jax.Array, dy: jax.Array) -> jax.Array:
    """What of a tangent stays: all in units with room for more nonzeros, else along nonzeros."""
    return jnp.where((y != 0) | room, dy, jnp.zeros((), dy.dtype))


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class NM(LineSet):
    """At most `n` of each `m` consecutive entries are not zero, such as 2 of 4.

    ``{w : ||group||_0 <= n}`` for each group of `m` entries. Not convex. The projection keeps the
    `n` entries of largest magnitude in each group as they are and sets the others to zero, exactly,
    which is a nearest point. Of equal magnitudes the first ones are kept. NaN and infinity count
    and stay as in `TopK`.

    A. Mishra et al., "Accelerating sparse deep neural networks", 2021, describe 2:4 sparsity,
    which some accelerators multiply at twice the speed.

    At zeros small steps are lost, as in `TopK`. `straight_through` with a `decay` is the SR-STE of
    A. Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch",
    ICLR 2021: dropped entries are trained, and pulled towards zero.

    Cost:
        One pass, with ``m`` comparisons for each entry.

    Args:
        n: How many entries to keep of each group: an integer from 1 to `m`, a JAX scalar or a
            schedule.
        m: The size of a group; it has to divide the length of the axis.
        axis: The one axis along which groups run, or `"fan_in"` where that is one.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `n` or `m` is out of range, or an axis is repeated; on a leaf, if `axis`
            is not one axis of it, or `m` does not divide its length.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.nm(2, 4)(jnp.array([1.0, -3.0, 2.0, 0.5, 0.1, 0.0, 0.0, 0.2]))
        Array([ 0. , -3. ,  2. ,  0. ,  0.1,  0. ,  0. ,  0.2], dtype=float32)
        >>> import jax
        >>> def loss(w):
        ...     return jnp.sum(oc.straight_through(w, oc.nm(1, 2), decay=0.25))
        >>> jax.grad(loss)(jnp.array([3.0, -2.0]))
        Array([1. , 0.5], dtype=float32)
    """

    formula = "{ w : at most {n} of each {m} consecutive entries of u ≠ 0 }"

    n: Number = number(2, low=1, whole=True)
    m: int = 4
    axis: Axis = 0

    def __post_init__(self):
        if isinstance(self.m, bool) or not isinstance(self.m, int):
            raise TypeError(f"NM: m={shown(self.m)} is not an int; write the size of a group.")
        if self.m < 1:
            raise ValueError(f"NM: m={self.m} is not allowed; write an int of at least 1.")
        check_number("NM", "n", self.n, Limits(low=1, high=self.m))
        if _is_fraction(self.n):
            raise TypeError(f"NM: n={shown(self.n)} is not an integer; write how many to keep.")
        super().__post_init__()

    def _limits(self, field: dataclasses.Field) -> Limits | None:
        """A group has no more than `m` entries."""
        found = super()._limits(field)
        return found and found._replace(high=self.m)

    def _check(self, path: str | None, shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
        axis = super()._check(path, shape, axes)
        if shape[axis] % self.m:
            raise ValueError(
                f"NM on {describe(path, shape)}: m={self.m} does not divide the {shape[axis]} "
                f"entries along axis {axis}; write another m or axis, or leave this leaf free "
                "with a rule that maps its path to None."
            )
        return axis

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; the entries that are kept are not rounded."""
        w = jnp.asarray(w)
        _, axes = self._widen(w)
        axis = self._check(None, w.shape, axes)
        n = value(self.n, jnp.dtype(jnp.int32))
        return automatic(lambda w, n: _largest_of_groups(w, n, self.m, axis), w, n)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The groups in which all of `n` is used."""
        axis = self._check(None, w.shape, self._widen(w)[1])
        n = value(self.n, jnp.dtype(jnp.int32))
        full = functools.partial(_are_full, m=self.m, axis=axis)
        return automatic(full, w, n, spec=PartitionSpec())

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The nonzeros of each group, counted."""
        del memory
        axis = self._check(None, w.shape, self._widen(w)[1])
        counts = jnp.sum(_grouped(w, self.m, axis) != 0, axis=axis + 1)
        return Gauge("nonzeros of each group", counts, None, value(self.n, jnp.dtype(jnp.int32)))


nm = NM


def _grouped(w: jax.Array, m: int, axis: int) -> jax.Array:
    """The same entries, with an axis of groups and one of the entries of a group for `axis`."""
    return w.reshape(*w.shape[:axis], w.shape[axis] // m, m, *w.shape[axis + 1 :])


def _are_full(w: jax.Array, n: jax.Array, m: int, axis: int) -> jax.Array:
    """The groups with `n` nonzeros or more."""
    return jnp.sum(_grouped(w, m, axis) != 0, axis=axis + 1, dtype=jnp.int32) >= n


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _largest_in_groups(w: jax.Array, n: jax.Array, m: int, axis: int) -> jax.Array:
    """The first `n` entries of each group by magnitude, and zeros."""
    kept = (_rank_in_group(w, m, axis) < n) | jnp.isnan(w)
    return jnp.where(kept, w, jnp.zeros((), w.dtype))


@_largest_in_groups.defjvp
def _largest_in_groups_jvp(m, axis, primals, tangents):
    y = _largest_in_groups(*primals, m, axis)
    room = jnp.repeat(~_are_full(y, primals[1], m, axis), m, axis=axis)
    return y, _where_free(y, room, tangents[0])


_largest_of_groups = jax.jit(_largest_in_groups, static_argnums=(2, 3))


def _rank_in_group(w: jax.Array, m: int, axis: int) -> jax.Array:
    """How many entries of its group come before each, by magnitude and then by place."""
    magnitude = _grouped(_magnitude(w), m, axis)
    mine, other = (jnp.expand_dims(magnitude, axis + side) for side in (2, 1))
    shape = (*(1,) * (axis + 1), m, m, *(1,) * (w.ndim - 1 - axis))
    place = [lax.broadcasted_iota(jnp.int32, shape, axis + side) for side in (1, 2)]
    # A zero less one wraps around: nothing comes before it, and it is kept with its sign.
    before = (other > mine - 1) & ((place[1] < place[0]) | (other != mine))
    return jnp.sum(before, axis=axis + 2, dtype=jnp.int32).reshape(w.shape)
