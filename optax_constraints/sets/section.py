"""Boxes cut by a plane, or by a half space, in each unit.

What is allowed, and what is not finite, is as for simplexes. At an allowed unit the derivative
is that of the inside of the set: of the plane, or with an inequality the identity.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_constraints import _numerics
from optax_constraints._axes import Axis, LeafLayout, settle_axis
from optax_constraints._config import builtin
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import Number, number, value
from optax_constraints._sharding import vary_like
from optax_constraints._text import describe, shown
from optax_constraints.sets._common import (
    InParts,
    Parts,
    Terms,
    Units,
    UnitSet,
    each,
    in_compute_dtype,
    sum_rounding,
    widen,
)
from optax_constraints.sets.linear import (
    MAX,
    check_bound,
    check_normal,
    check_unit,
    readable,
)


class _Section(NamedTuple):
    """Numbers that say where a section is, each for one entry or for all of them."""

    lower: Parts
    upper: Parts
    normal: Parts
    offset: jax.Array


def _clipped(x: Parts, steps: jax.Array, section: _Section) -> Parts:
    """Units after some steps against the normal, and back in the box."""
    return each(
        lambda x, a, low, high: jnp.clip(x - steps * a, low, high),
        x,
        section.normal,
        section.lower,
        section.upper,
    )


def _beyond(x: Parts, section: _Section, units: Units) -> jax.Array:
    """By how much inner products pass the offset; near to it, without the rounding of sums."""
    share = section.offset / units.size(x)
    return units.sum(each(lambda x, a: x * a - share, x, section.normal))


def _between(x: Parts, section: _Section) -> Parts:
    return each(lambda x, low, high: (low < x) & (x < high), x, section.lower, section.upper)


def _weight(active: Parts, section: _Section, units: Units) -> jax.Array:
    """The sum of squares of the normal over some entries."""
    a = section.normal[0]
    if a.ndim == 0:  # the same for all: counts cost less than sums
        return units.count(active).astype(a.dtype) * jnp.square(a)
    return units.sum(each(lambda i, a: jnp.where(i, a * a, 0), active, section.normal))


def _extremes(x: Parts, section: _Section, units: Units) -> Parts:
    """Units with the same extremes of all that is monotone in an entry.

    They have two entries if bounds and normal are the same for all, so that what needs several
    extremes reads the weights twice.
    """
    if any(part.ndim for field in section[:3] for part in field):
        return x

    def ends(part: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        if not part.size or not axes:
            return part
        both = [end(part, axis=axes, keepdims=True) for end in (jnp.min, jnp.max)]
        return jnp.concatenate(both, axes[0])

    return tuple(map(ends, x, units.axes))


def _step(beyond: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.where(weight > 0, beyond / jnp.where(weight > 0, weight, 1), 0)


def _halfway(low: jax.Array, high: jax.Array) -> jax.Array:
    """The number with as many floating-point numbers below it, from `low`, as above it."""
    kind = jnp.dtype(f"int{8 * low.dtype.itemsize}")

    def ordered(bits: jax.Array) -> jax.Array:  # and back
        return jnp.where(bits < 0, bits ^ jnp.iinfo(kind).max, bits)

    a, b = (ordered(lax.bitcast_convert_type(x, kind)) for x in (low, high))
    return lax.bitcast_convert_type(ordered((a & b) + ((a ^ b) >> 1)), low.dtype)


def _is_in_section(x: Parts, section: _Section, units: Units, half: bool) -> jax.Array:
    size = units.sum(each(lambda x, a: jnp.abs(x * a), x, section.normal))
    beyond, near = _beyond(x, section, units), sum_rounding(x[0]) * size
    fits = beyond <= near if half else jnp.abs(beyond) <= near
    ends = _extremes(x, section, units)
    away = each(lambda x, low, high: jnp.maximum(low - x, x - high), ends, *section[:2])
    return fits & (units.max(away) <= 0)


def _is_below(x: Parts, section: _Section, units: Units) -> jax.Array:
    """Whether the nearest points of the box are below the plane already."""
    inner = _clipped(x, jnp.zeros((), x[0].dtype), section)
    size = units.sum(each(lambda x, a: jnp.abs(x * a), inner, section.normal))
    return _beyond(inner, section, units) <= sum_rounding(x[0]) * size


def _bracket(x: Parts, section: _Section, units: Units) -> tuple[tuple, tuple, jax.Array]:
    """Numbers of steps on both sides of the root, and at most how far beyond the plane that is.

    And the largest sum of the magnitudes of products on the plane.

    There every entry is at its bound. And no entry takes more of the product than all others
    leave, which on a simplex says nearly where the root is.
    """

    def ends(low: jax.Array, high: jax.Array, a: jax.Array) -> Any:
        """The least product of an entry, and the largest."""
        one, other = (jnp.where(a == 0, 0, end * a) for end in (low, high))
        return jnp.minimum(one, other), jnp.maximum(one, other)

    least, most = zip(*each(ends, *section[:3]), strict=True)
    offset = jnp.where(jnp.isfinite(section.offset), section.offset, 0)
    over, under = _total(most, x, units) - offset, offset - _total(least, x, units)

    def meets(x: jax.Array, product: jax.Array, a: jax.Array, none: float) -> jax.Array:
        """After how many steps an entry has that product."""
        inverse = 1 / jnp.where(a == 0, 1, a)
        return x * inverse - jnp.where(a == 0, none, product * jnp.square(inverse))

    def taken(x: jax.Array, least: jax.Array, most: jax.Array, a: jax.Array) -> jax.Array:
        return meets(x, jnp.where(least + under <= most, least + under, jnp.inf), a, jnp.inf)

    def left(x: jax.Array, least: jax.Array, most: jax.Array, a: jax.Array) -> jax.Array:
        return meets(x, jnp.where(most - over >= least, most - over, -jnp.inf), a, -jnp.inf)

    extremes = _extremes(x, section, units)
    first = each(lambda x, most, a: meets(x, most, a, -jnp.inf), extremes, most, section.normal)
    last = each(lambda x, least, a: meets(x, least, a, jnp.inf), extremes, least, section.normal)
    low = units.max(each(taken, extremes, least, most, section.normal))
    high = units.min(each(left, extremes, least, most, section.normal))
    # A little outside, against rounding.
    low, high = jnp.maximum(low, units.min(first)), jnp.minimum(high, units.max(last))
    margin = sum_rounding(x[0]) * jnp.maximum(jnp.abs(low), jnp.abs(high))
    margin = jnp.where(margin < jnp.inf, margin, 0)
    signed = (jnp.maximum(-end, 0) for end in least), (jnp.maximum(end, 0) for end in most)
    rest = functools.reduce(jnp.minimum, [_total(tuple(ends), x, units) for ends in signed])
    return (low - margin, over), (high + margin, under), jnp.abs(offset) + 2 * rest


def _total(beside: Parts, x: Parts, units: Units) -> jax.Array:
    """The sum over each unit of what stands beside the units, for one entry or for all."""

    def spread(b: jax.Array, part: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        own = b.shape or (1,) * part.ndim
        return jnp.broadcast_to(b, [n if a in axes else own[a] for a, n in enumerate(part.shape)])

    return units.sum(tuple(map(spread, beside, x, units.axes)))


def _multiplier(
    read: Callable[[jax.Array | None], Parts], section: _Section, done: jax.Array, units: Units
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Two numbers of steps against the normal, between which units meet the plane.

    What is left to go where the two are one number, and would be lost in it; and what can be
    beyond the plane by rounding.

    Newton's method for the inner product as a function of the steps, which falls and is linear
    between the points where an entry meets a bound. It is there when a step leaves the active
    entries as they were, and nearly nothing beyond the plane. What is known to lie on either
    side of the root safeguards it, and after some steps each third one halves how many
    floating-point numbers there are in between, so that the loop ends.
    """
    x = read(None)
    weight = _total(each(jnp.square, section.normal), x, units)
    start = _step(_beyond(x, section, units), weight)
    (low, over), (high, under), most = _bracket(x, section, units)
    start = jnp.maximum(jnp.minimum(start, high), low)
    start = jnp.where(done | ~jnp.isfinite(start), 0, start)
    low, high = (jnp.where(done | jnp.isnan(end), 0, end) for end in (low, high))
    over, under = (far + jnp.zeros_like(start) for far in (over, under))
    size = units.sum(each(lambda x, a: jnp.abs(x * a), x, section.normal))
    noise = sum_rounding(x[0]) * jnp.minimum(size, most)
    noise = jnp.where(noise < jnp.inf, noise, 0)

    def step(state):
        (low, over), (high, under), now, before, weight, done, count = state
        x = _clipped(read(now), now, section)
        beyond = _beyond(x, section, units)
        active = _weight(_between(x, section), section, units)
        newton = now + _step(beyond, active)
        little = jnp.abs(beyond) <= noise
        gone = (active == weight) & (little | (jnp.abs(beyond) <= jnp.abs(before) / 1000))
        there = gone | (beyond == 0) | ((active == 0) & little)
        # The root is nearer than the next number: it lies between the two beside it.
        near = ~there & (active > 0) & (newton == now)
        # The end that stays counts half in the secant, so that it does not stay for long.
        is_low, is_high = ~done & (there | (beyond > 0)), ~done & (there | (beyond < 0))
        low, over = (
            jnp.where(is_low, now, low),
            jnp.where(is_low, beyond, jnp.where(is_high & (before < 0), over / 2, over)),
        )
        high, under = (
            jnp.where(is_high, now, high),
            jnp.where(is_high, -beyond, jnp.where(is_low & (before > 0), under / 2, under)),
        )
        secant = low + (high - low) * (over / (over + under))
        further = jnp.where((low < newton) & (newton < high), newton, secant)
        halve = ~((low < further) & (further < high)) | ((count > 12) & (count % 3 == 0))
        further = jnp.where(halve, _halfway(low, high), further)
        closed = ~((low < further) & (further < high))
        beside = 4 * _numerics.eps(now.dtype) * jnp.abs(now)
        low, high = (
            jnp.where(near & ~done, now + d, end) for d, end in ((-beside, low), (beside, high))
        )
        done = done | there | near | closed
        return (
            (low, over),
            (high, under),
            jnp.where(done, now, further),
            beyond,
            active,
            done,
            count + 1,
        )

    inf = jnp.full_like(start, jnp.inf)
    state = (low, over), (high, under), start, inf, weight + 0 * start, done
    (low, _), (high, _), _, beyond, active, *_ = lax.while_loop(
        lambda state: ~jnp.all(state[-2]), step, (*vary_like(state, x[0]), 0)
    )
    # One of them, if no steps lead to the other side, as rounding may have it.
    low, high = jnp.where(low > -inf, low, high), jnp.where(high < inf, high, low)
    rest = jnp.where(done | (low < high), 0, _step(beyond, active))
    return low, high, rest, noise / 8


def _movable(
    x: jax.Array,
    y: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    a: jax.Array,
    low: jax.Array,
    high: jax.Array,
    beyond: jax.Array,
) -> jax.Array:
    """Whether an entry can change so that less is beyond the plane.

    Where no number of steps is right, as it would need more bits, also an entry that is between
    its bounds for some number from `low` to `high`.
    """
    first, last = x - low * a, x - high * a
    near = sum_rounding(x) * (jnp.abs(x) + jnp.abs(first))
    between = (jnp.maximum(first, last) > lower - near) & (jnp.minimum(first, last) < upper + near)
    between = jnp.where(low < high, between, (lower < y) & (y < upper))
    up = beyond * a > 0
    return between & ((up & (y > lower)) | (~up & (y < upper)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
@functools.partial(jax.jit, static_argnums=(2, 3))
def _onto_section(terms: Terms, section: _Section, units: Units, half: bool) -> Parts:
    x = in_compute_dtype(terms)
    finite = units.max(each(jnp.abs, _extremes(x, section, units))) < jnp.inf
    free = _is_in_section(x, section, units, half)
    below = _is_below(x, section, units) if half else jnp.zeros_like(free)
    read = functools.partial(in_compute_dtype, terms)
    low, high, rest, noise = _multiplier(read, section, free | below | ~finite, units)

    def project(x: jax.Array, a: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
        y = jnp.clip(x - low * a, lower, upper)
        inside = (lower < y) & (y < upper)
        y = jnp.where(inside, jnp.clip(y - rest * a, lower, upper), y)
        return jnp.where(free, x, jnp.where(finite, y, jnp.nan))

    def left(y: Parts) -> jax.Array:
        return jnp.where(free | below, 0, _beyond(y, section, units))

    def correct(state):
        y, beyond, wrong, count = state
        movable = functools.partial(_movable, low=low, high=high, beyond=beyond)
        active = each(lambda *entry: movable(*entry) & wrong, x, y, *section[:3])
        steps = _step(beyond, _weight(active, section, units))
        y = each(jnp.where, active, _clipped(y, steps, section), y)
        beyond = left(y)
        return y, beyond, jnp.abs(beyond) > noise, count + 1

    y = each(project, x, section.normal, section.lower, section.upper)
    beyond = left(y)
    wrong = (jnp.abs(beyond) > noise) | (low < high)
    y, *_ = lax.while_loop(
        lambda state: (state[-1] < 4) & jnp.any(state[-2]), correct, (y, beyond, wrong, 0)
    )
    return y


@_onto_section.defjvp
def _onto_section_jvp(units, half, primals, tangents):
    (terms, section), (dterms, dsection) = primals, tangents
    x, y = in_compute_dtype(terms), _onto_section(terms, section, units, half)
    free = _is_in_section(x, section, units, half)
    stays = free | _is_below(x, section, units) if half else jnp.zeros_like(free)
    active = each(lambda i: i | free, _between(y, section))

    def formula(x: Parts, section: _Section) -> Parts:
        bound = each(lambda y, low, high: jnp.where(y <= low, low, high), y, *section[:2])
        x = each(jnp.where, active, x, bound)
        steps = _step(_beyond(x, section, units), _weight(active, section, units))
        steps = jnp.where(stays, 0, steps)
        return each(lambda i, x, a: jnp.where(i, x - steps * a, x), active, x, section.normal)

    return y, jax.jvp(formula, (x, section), (in_compute_dtype(dterms), dsection))[1]


def _reaches(
    w: Parts, section: _Section, units: Units, rounding: float, slack: jax.typing.ArrayLike
) -> jax.Array:
    """Which units are at the plane, up to rounding."""
    size = units.sum(each(lambda w, a: jnp.abs(w * a), w, section.normal))
    near = (2 * rounding + sum_rounding(size)) * size + slack
    return _beyond(w, section, units) >= -near


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _along_section(
    w: Parts,
    v: Parts,
    section: _Section,
    slack: jax.typing.ArrayLike,
    units: Units,
    half: bool,
    rounding: float,
) -> Parts:
    """The tangent part: of what is at a bound one side, of all others everything.

    The cone is a section, too.
    """
    # What the projection leaves of an entry at a bound can be the rounding of the sum.
    size = units.sum(each(lambda w, a: jnp.abs(w * a), w, section.normal))
    near = slack + 2 * _numerics.eps(size.dtype) * size
    lower = each(lambda w, b: jnp.where(w <= b + near, 0, -jnp.inf), w, section.lower)
    upper = each(lambda w, b: jnp.where(w >= b - near, 0, jnp.inf), w, section.upper)
    lower, upper = (each(lambda b, v: b.astype(v.dtype), bound, v) for bound in (lower, upper))
    offset = jnp.zeros_like(size)
    if half:
        offset = jnp.where(_reaches(w, section, units, rounding, slack), offset, jnp.inf)
    cone = _Section(lower, upper, section.normal, offset)
    return _onto_section(tuple((part,) for part in v), cone, units, half)


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class BoxSection(InParts, UnitSet):
    """Entries lie in an interval, and the inner product of each unit with `normal` is `value`.

    ``{w : lower <= w <= upper, <normal, unit> = value}``, or ``<= value`` with
    ``equality=False``. Convex: where a plane, or a half space, meets a box. The projection
    ``clip(unit - m * normal, lower, upper)``, with one number `m` a unit, is the nearest point,
    exact up to rounding, and never outside the interval.

    With a sum of 1 and a cap it is the capped simplex, of portfolios and of choices of `k` among
    `n`; the projection is known as the continuous quadratic knapsack problem. Newton's method finds
    `m`: R. Cominetti, W. Mascarenhas, P. Silva, "A Newton's method for the continuous quadratic
    knapsack problem", Math. Program. Comput. 6, 2014. Entries are as near as the rounding of the
    largest weight.

    Cost:
        4 to 20 Newton steps for random weights, each two sums over the weights, for all units at
        once. At most about 100 steps in float32. Some fifteen passes come before and after.

    Args:
        lower: The lower bound: a number, a JAX scalar, a schedule, text, an array of the shape
            of one unit, or None for no bound. The dtype of the weights rounds it.
        upper: The upper bound, likewise.
        normal: An array of the shape of one unit, as for `Hyperplane`; None for ones.
        value: The inner product.
        axis: The axes along which one unit runs, as for `MaxNorm`.
        equality: Whether the inner product is `value`, or at most that.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is NaN, `lower` is above `upper`, `normal` is zero, or an axis is
            repeated; when bound or called, if an array does not have the shape of a unit, or if
            nothing between the bounds has that inner product. What is not known until it runs
            is not checked: the result is then the point of the box that is nearest to the plane.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.box_section(0.0, 0.5)(jnp.array([[1.0, 0.5], [0.75, 0.25], [-1.0, 0.25]]))
        Array([[0.5 , 0.5 ],
               [0.5 , 0.25],
               [0.  , 0.25]], dtype=float32)
    """

    convex: ClassVar[bool] = True

    lower: Any = number(array=True)
    upper: Any = number(array=True)
    normal: Any = None
    value: Number = number(1.0, low=-MAX, high=MAX)
    axis: Axis = 0
    equality: bool = True

    def __post_init__(self):
        name = type(self).__name__
        if not isinstance(self.equality, bool):
            raise TypeError(f"{name}: equality={shown(self.equality)} is not True or False.")
        for bound in ("lower", "upper"):
            object.__setattr__(self, bound, check_bound(name, bound, getattr(self, bound)))
        if self.normal is not None:
            object.__setattr__(self, "normal", check_normal(name, self.normal))
        super().__post_init__()
        self._check_numbers(name, ())

    def settle(self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None) -> Self:
        """This constraint for one leaf, whose units its arrays must fit."""
        self._unit(path, shape, layout)
        settled = cast(Self, super().settle(path, shape, layout))
        settled._unit(path, shape)
        return settled

    def _unit(
        self, path: str | None, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> tuple[int, ...]:
        """The shape of a unit; raises if an array does not fit it, or nothing is in the set."""
        name = type(self).__name__
        axis = settle_axis(name, self.axis, shape, path, layout)
        unit = tuple(shape[a] for a in axis)
        for field in ("lower", "upper", "normal"):
            check_unit(name, field, getattr(self, field), self.axis, unit, path, shape)
        self._check_numbers(f"{name} on {describe(path, shape)}", unit)
        return unit

    def _check_numbers(self, where: str, unit: tuple[int, ...]) -> None:
        """Raises if the interval is empty, or lies on one side of the plane, as far as is known."""
        lower, upper = (
            end if bound is None else readable(bound)
            for bound, end in ((self.lower, -np.inf), (self.upper, np.inf))
        )
        if lower is None or upper is None:
            return
        if np.any(lower > upper):
            raise ValueError(
                f"{where}: lower={shown(self.lower)} is above upper={shown(self.upper)}; swap them "
                "or widen the interval."
            )
        normal = 1.0 if self.normal is None else readable(self.normal)
        wanted = readable(self.value)
        if normal is None or wanted is None or not unit:
            return
        a, low, high = np.broadcast_arrays(np.broadcast_to(normal, unit), lower, upper)
        with np.errstate(invalid="ignore"):
            ends = [
                np.nansum(np.where(a == 0, 0, a * end))
                for end in (np.where(a > 0, low, high), np.where(a > 0, high, low))
            ]
        slack = 1e-6 * max(1.0, *(abs(end) for end in (wanted, *ends) if abs(end) < np.inf))
        if wanted < ends[0] - slack or (self.equality and wanted > ends[1] + slack):
            raise ValueError(
                f"{where}: nothing between lower={shown(self.lower)} and upper="
                f"{shown(self.upper)} has the inner product value={shown(self.value)}: with the "
                f"{math.prod(unit)} entries of a unit it is from {ends[0]:g} to {ends[1]:g}; "
                "write another value, or wider bounds."
            )

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; sums are taken in float32 or wider."""
        w = jnp.asarray(w)
        return self._onto(((w,),), self._units(w))[0]

    def _onto(self, terms: Terms, units: Units) -> Parts:
        parts = tuple(weights for weights, *_ in terms)
        wide = each(functools.partial(widen, type(self).__name__), parts)
        if not units.size(parts):
            return parts
        section = self._section(parts, _numerics.widest(*(part.dtype for part in wide)), units)
        new = _onto_section(terms, section, units, not self.equality)
        return each(lambda new, w: new.astype(w.dtype), new, parts)

    def _section(self, parts: Parts, dtype: jnp.dtype, units: Units) -> _Section:
        """The bounds as the weights' dtype has them, and the normal with 1 as its largest entry."""
        shape = parts[0].shape if len(parts) == 1 else (units.size(parts),)
        self._unit(None, shape)
        lower, upper = (
            _beside(jnp.asarray(end) if bound is None else value(bound, dtype), parts, units)
            for bound, end in ((self.lower, -jnp.inf), (self.upper, jnp.inf))
        )
        lower, upper = (
            each(lambda b, w: b.astype(w.dtype).astype(dtype), bound, parts)
            for bound in (lower, upper)
        )
        offset = value(self.value, dtype)
        if self.normal is None:
            return _Section(lower, upper, (jnp.ones((), dtype),) * len(parts), offset)
        normal = jnp.asarray(self.normal, dtype)
        largest = jnp.max(jnp.abs(normal))
        return _Section(lower, upper, _beside(normal / largest, parts, units), offset / largest)

    def _along_parts(
        self, w: Parts, v: Parts, units: Units, memory: Any, slack: Any, rounding: float
    ) -> Parts:
        # The cone is a section, too: of what is at a bound one side, of all others everything.
        section = self._section(w, v[0].dtype, units)
        return _along_section(w, v, section, slack, units, not self.equality, rounding)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units with an entry at one of its bounds, or that are at a bound of their product."""
        units = self._units(w)
        parts = (w.astype(_numerics.compute_dtype(w.dtype)),)
        section = self._section((w,), parts[0].dtype, units)
        inside = _between(parts, section)
        at_bound = units.count(each(jnp.logical_not, inside)) > 0
        if self.equality:
            return at_bound
        return at_bound | _reaches(parts, section, units, _numerics.eps(w.dtype), 0.0)

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The set in symbols."""
        low = "" if self.lower is None else "{lower} ≤ "
        high = "" if self.upper is None else " ≤ {upper}"
        product = "Σᵢ uᵢ" if self.normal is None else "⟨{normal}, u⟩"
        return f"{{ w : {low}u{high}, {product} {'=' if self.equality else '≤'} {{value}} }}"

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The entries."""
        del memory
        section = self._section((w,), _numerics.compute_dtype(w.dtype), self._units(w))
        return Gauge("entries", w, section.lower[0], section.upper[0])


box_section = BoxSection


def _beside(array: jax.Array, parts: Parts, units: Units) -> Parts:
    """An array of the shape of a unit, or a number, beside each of the parts of units."""
    if array.ndim == 0:
        return (array,) * len(parts)
    if len(parts) == 1:
        ((part, axes),) = zip(parts, units.axes, strict=True)
        return (array.reshape([n if a in axes else 1 for a, n in enumerate(part.shape)]),)
    ends = np.cumsum([part.size for part in parts])[:-1]
    pieces = zip(jnp.split(array, ends), parts, strict=True)
    return tuple(piece.reshape(part.shape) for piece, part in pieces)
