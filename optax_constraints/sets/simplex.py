"""Sets given by a sum over each unit: simplexes, l1 balls, planes and half spaces.

A unit whose sum misses its value only by the rounding of that sum (8 machine epsilons of the
dtype it was taken in, times the sum of the magnitudes) is allowed, and comes back bit for bit.
What was moved is corrected once more by what its own sum still misses, so that it is allowed.
A unit with an infinite entry becomes NaN. So does, for planes and half spaces, one whose sum is
beyond the range of the dtype.

At an allowed unit the derivative is that of the inside of the set: for balls and half spaces the
identity, for a simplex the projection onto the plane of its sum.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from optax_constraints import _numerics
from optax_constraints._axes import Axis, LeafLayout, settle_axis
from optax_constraints._config import builtin
from optax_constraints._numbers import Number, number, value
from optax_constraints._text import describe, shown
from optax_constraints.sets._common import InParts, Parts, Terms, Units, UnitSet, totals, widen

_MAX = sys.float_info.max


def _sum(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, axis=axis, keepdims=True)


def _size(x: jax.Array, axis: tuple[int, ...]) -> int:
    """How many entries a unit has."""
    return math.prod(x.shape[a] for a in axis)


def _tolerance(x: jax.Array) -> float:
    """The rounding of a sum, relative to the sum of the magnitudes."""
    return 8 * _numerics.eps(x.dtype)


# Simplexes and l1 balls: a threshold for each unit.


def _excess(parts: Parts, total: jax.Array, units: Units) -> jax.Array:
    """By how much the sum passes `total`; near to it, without the rounding of large sums."""
    return units.sum(_each(lambda x: x - total / units.size(parts), parts))


def _each(function: Callable[..., jax.Array], *parts: Parts) -> Parts:
    return tuple(map(function, *parts))


def _apart(threshold: jax.Array, excess: jax.Array) -> jax.Array:
    """The threshold, on the CPU only once the excess is known.

    XLA's CPU backend would otherwise spread the threshold over an array of the size of the
    leaf, for both sums to read, and take three times as long.
    """
    return lax.platform_dependent(
        threshold,
        excess,
        cpu=lambda threshold, excess: jnp.minimum(threshold, threshold + jnp.abs(excess)),
        default=lambda threshold, excess: threshold,
    )


def _wide(terms: Terms, after: jax.Array | None = None) -> Parts:
    """What the terms sum to, in the dtype of their sums."""
    parts = totals(terms, after)
    dtype = _numerics.compute_dtype(*(part.dtype for part in parts))
    return _each(lambda x: x.astype(dtype), parts)


def _shrink(
    read: Callable[[jax.Array | None], Parts],
    total: jax.Array,
    free: jax.Array,
    finite: jax.Array,
    units: Units,
) -> Parts:
    """``max(x - threshold, 0)`` with the sum `total` in each unit.

    Units that are `free` stay as they are, and those that are not `finite` become NaN.

    Newton's method for the sum as a function of the threshold, which is convex, decreasing and
    linear between entries. From below, the iterates rise to the root, and they are there when a
    step leaves the active entries as they were, or passes the root by rounding. The excess times
    the number of active entries falls to a quarter or less in each step, so there are few.
    Thresholds count from the largest entry: what is nearer to it than `total` is all that
    matters, whatever the size of the weights.
    """
    parts = read(None)
    size = units.size(parts)
    top = jnp.where(free, 0, units.max(parts))

    def below_top(after: jax.Array | None) -> Parts:
        return _each(lambda x: x - top, read(after))

    lowest = jnp.maximum(-total, (units.sum(below_top(None)) - total) / size)
    threshold = jnp.where(free, 0, lowest)

    def step(state):
        threshold, rest, active, done = state
        threshold = jnp.where(done, threshold, threshold + rest)
        z = below_top(threshold)
        excess = _excess(_each(lambda z: jnp.maximum(z - threshold, 0), z), total, units)
        cut = _apart(threshold, excess)
        now = units.count(_each(lambda z: z > cut, below_top(cut)))
        rest = jnp.where(done, rest, excess / jnp.maximum(now, 1).astype(excess.dtype))
        return threshold, rest, now, done | (now >= active) | (excess <= 0)

    none = jnp.zeros_like(threshold)
    more = jnp.full_like(threshold, size + 1, jnp.int32)
    # The last step's correction stays apart: added to the threshold, it would round away.
    threshold, rest, _, _ = lax.while_loop(
        lambda state: ~jnp.all(state[-1]), step, (threshold, none, more, free)
    )
    rest = jnp.where(finite, rest, jnp.nan)
    least = jnp.where(free, -jnp.inf, jnp.maximum(rest, 0))
    z = _each(lambda z: z - threshold, below_top(threshold))
    return _each(lambda z: jnp.where(z <= least, 0, z - rest), z)


def _mean_off(dx: Parts, total: jax.Array, active: Parts, units: Units) -> Parts:
    """Shifts the active entries by the same amount to the sum `total`; all others are 0."""
    moved = units.sum(_each(lambda d, a: jnp.where(a, d, 0), dx, active))
    shift = (moved - total) / jnp.maximum(units.count(active), 1).astype(moved.dtype)
    return _each(lambda d, a: jnp.where(a, d - shift, 0), dx, active)


def _in_simplex(parts: Parts, total: jax.Array, units: Units) -> jax.Array:
    near = jnp.abs(_excess(parts, total, units)) <= _tolerance(parts[0]) * total
    return near & (units.min(parts) >= 0)


# Compiled by itself, so that calls outside jit find the program they made before.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)
def _onto_simplex(terms: Terms, total: jax.Array, units: Units) -> Parts:
    parts = _wide(terms)
    finite = (units.max(parts) < jnp.inf) & (units.min(parts) > -jnp.inf)
    free = _in_simplex(parts, total, units)
    return _shrink(functools.partial(_wide, terms), total, free, finite, units)


@_onto_simplex.defjvp
def _onto_simplex_jvp(units, primals, tangents):
    (terms, total), (dterms, dtotal) = primals, tangents
    y = _onto_simplex(terms, total, units)
    # At a point of the set along its plane, as inside, also where an entry is zero.
    inside = _in_simplex(_wide(terms), total, units)
    return y, _mean_off(_wide(dterms), dtotal, _each(lambda y: (y > 0) | inside, y), units)


def _in_l1_ball(parts: Parts, radius: jax.Array, units: Units) -> jax.Array:
    return _excess(_each(jnp.abs, parts), radius, units) <= _tolerance(parts[0]) * radius


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)
def _onto_l1_ball(terms: Terms, radius: jax.Array, units: Units) -> Parts:
    def magnitudes(after: jax.Array | None) -> Parts:
        return _each(jnp.abs, _wide(terms, after))

    parts = _wide(terms)
    finite = units.max(magnitudes(None)) < jnp.inf
    shrunk = _shrink(magnitudes, radius, _in_l1_ball(parts, radius, units), finite, units)
    return _each(jnp.copysign, shrunk, parts)


@_onto_l1_ball.defjvp
def _onto_l1_ball_jvp(units, primals, tangents):
    (terms, radius), (dterms, dradius) = primals, tangents
    y, dx = _onto_l1_ball(terms, radius, units), _wide(dterms)
    sign, inside = _each(jnp.sign, y), _in_l1_ball(_wide(terms), radius, units)
    active = _each(lambda y: y != 0, y)
    outside = _mean_off(_each(jnp.multiply, sign, dx), dradius, active, units)
    return y, _each(lambda d, s, o: jnp.where(inside, d, s * o), dx, sign, outside)


def _on_face(u: Parts, free: Parts, start: jax.Array, units: Units) -> jax.Array:
    """The threshold above which `u` sums to 0, with all that is `free` and what is above it.

    Newton's method as in `_shrink`: from a `start` below the root the iterates rise, and are
    there when no entry leaves the sum.
    """
    size = jnp.full_like(start, units.size(u) + 1, jnp.int32)

    def moved(u: Parts, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        inside = _each(lambda u, free: free | (u > threshold), u, free)
        now = units.count(inside)
        rest = units.sum(_each(lambda u, i: jnp.where(i, u - threshold, 0), u, inside))
        rest = rest / jnp.maximum(now, 1).astype(rest.dtype)
        return threshold + jnp.where(now > 0, rest, 0), now

    fixed, start = lax.stop_gradient((u, start))

    def step(state):
        threshold, active, done = state
        further, now = moved(fixed, threshold)
        # What has settled stays: by rounding, an entry at the threshold could come and go.
        done = done | (now >= active)
        return jnp.where(done, threshold, further), now, done

    first = start, size, jnp.zeros_like(size, bool)
    settled = lax.while_loop(lambda state: ~jnp.all(state[-1]), step, first)[0]
    # One more step, against rounding, and for the derivative, which loops have not in reverse.
    return moved(u, settled)[0]


class _ThresholdSet(InParts, UnitSet):
    """What simplexes and l1 balls share."""

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; sums are taken in float32 or wider."""
        w = jnp.asarray(w)
        return self._onto(((w,),), self._units(w))[0]

    def _onto(self, terms: Terms, units: Units) -> Parts:
        parts = tuple(weights for weights, *_ in terms)
        wide = _each(functools.partial(widen, type(self).__name__), parts)
        if not units.size(parts):
            return parts
        new = self._shrunk(terms, _numerics.widest(*(part.dtype for part in wide)), units)
        return _each(lambda new, w: new.astype(w.dtype), new, parts)

    def _shrunk(self, terms: Terms, dtype: jnp.dtype, units: Units) -> Parts:
        """The projection in a dtype in which sums are taken."""
        raise NotImplementedError


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Simplex(_ThresholdSet):
    """Each unit has no negative entry and sums to `total`.

    ``{w : w >= 0, sum(unit) = total}``, convex; with ``total=1`` the weights of averages and
    mixtures. The projection ``max(unit - threshold, 0)`` is the nearest point, exact up to
    rounding, and usually sparse.

    The threshold comes from Newton's method, without a sort: C. Michelot, "A finite algorithm
    for finding the projection of a point onto the canonical simplex of R^n", J. Optim. Theory
    Appl. 50, 1986; L. Condat, "Fast projection onto the simplex and the l1 ball", Math.
    Program. 158, 2016. Two sums over the weights a step, for all units at once; about 7 steps
    for random weights, about ``12 + log2(size of a unit)`` at most in float32.

    Args:
        total: The sum of each unit, at least 0.
        axis: The axes along which one unit runs, as for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `total` is negative, infinite or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.simplex()(jnp.array([[0.5, 0.25], [1.0, 0.75], [-1.0, 0.0]]))
        Array([[0.25, 0.25],
               [0.75, 0.75],
               [0.  , 0.  ]], dtype=float32)
    """

    convex: ClassVar[bool] = True

    total: Number = number(1.0, low=0, high=_MAX)
    axis: Axis = 0

    def _shrunk(self, terms: Terms, dtype: jnp.dtype, units: Units) -> Parts:
        return _onto_simplex(terms, value(self.total, dtype), units)

    def _along_parts(
        self, w: Parts, v: Parts, units: Units, memory: Any, slack: Any, rounding: float
    ) -> Parts:
        # Entries that are zero may only grow, and what the others lose they gain.
        free = _each(lambda w: w > slack, w)
        level = _on_face(v, free, units.sum(v) / units.size(v), units)
        return _each(lambda d, f: jnp.where(f, d - level, jnp.maximum(d - level, 0)), v, free)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units with an entry of 0."""
        wide, axis = self._widen(w)
        return jnp.any(wide <= 0, axis=axis, keepdims=True)


simplex = Simplex


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class L1Ball(_ThresholdSet):
    """The magnitudes of each unit sum to at most `radius`: ``{w : ||unit||_1 <= radius}``.

    Convex; the projection ``sign(unit) * max(|unit| - threshold, 0)`` is the nearest point,
    exact up to rounding, and usually sparse.

    Costs what `Simplex` costs where a unit is outside, and one sum where none is. Method:
    J. Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions",
    ICML 2008, with the threshold of `Simplex`.

    Args:
        radius: The bound, at least 0.
        axis: The axes along which one unit runs, as for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `radius` is negative or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.l1_ball()(jnp.array([[0.5, 0.25], [-1.0, -0.5], [0.0, 0.125]]))
        Array([[ 0.25 ,  0.25 ],
               [-0.75 , -0.5  ],
               [ 0.   ,  0.125]], dtype=float32)
    """

    convex: ClassVar[bool] = True

    radius: Number = number(1.0, low=0)
    axis: Axis = 0

    sign_preserving: ClassVar[bool] = True

    def _shrunk(self, terms: Terms, dtype: jnp.dtype, units: Units) -> Parts:
        return _onto_l1_ball(terms, value(self.radius, dtype), units)

    def _along_parts(
        self, w: Parts, v: Parts, units: Units, memory: Any, slack: Any, rounding: float
    ) -> Parts:
        total = units.sum(_each(jnp.abs, w))
        near = 2 * rounding + _tolerance(total)
        at_bound = total >= value(self.radius, total.dtype) * (1 - near) - slack
        # Of an entry that is zero any move is one away from it.
        sign = _each(lambda w, d: jnp.sign(jnp.where(jnp.abs(w) > slack, w, d)), w, v)
        free = _each(lambda w: jnp.abs(w) > slack, w)
        growth = _each(jnp.multiply, sign, v)
        outwards = at_bound & (units.sum(growth) > 0)
        level = _on_face(growth, free, jnp.zeros_like(total), units)

        def along(d: jax.Array, s: jax.Array, g: jax.Array, f: jax.Array) -> jax.Array:
            kept = jnp.where(f, g - level, jnp.maximum(g - level, 0))
            return jnp.where(outwards, s * kept, d)

        return _each(along, v, sign, growth, free)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units whose magnitudes sum to the radius, up to rounding."""
        wide, axis = self._widen(w)
        bound = value(self.radius, wide.dtype) * (1 - 2 * _numerics.eps(w.dtype))
        return _sum(jnp.abs(wide), axis) >= bound


l1_ball = L1Ball


# Planes and half spaces: a step along a normal.


def _above(
    x: jax.Array, normal: jax.Array | None, point: jax.Array, axis: tuple[int, ...]
) -> jax.Array:
    """How many normals each unit lies above the plane; no normal stands for ones."""
    if normal is None:
        return _sum(x - point, axis) / _size(x, axis)
    return _sum((x - point) * normal, axis) / _sum(jnp.square(normal), axis)


def _is_near(
    x: jax.Array, normal: jax.Array | None, above: jax.Array, axis: tuple[int, ...], slack: float
) -> jax.Array:
    """Whether `above` is the rounding of its sum, which is `slack` relative to what it sums."""
    if normal is None:
        scale = _sum(jnp.abs(x), axis) / _size(x, axis)
    else:
        scale = _sum(jnp.abs(x * normal), axis) / _sum(jnp.square(normal), axis)
    return jnp.abs(above) <= slack * scale


def _lower(x: jax.Array, normal: jax.Array | None, steps: jax.Array) -> jax.Array:
    """``x`` after some steps against the normal; to the bit for none.

    The choice keeps compilers from fusing product and difference in one place and not in
    another, where the product is then rounded.
    """
    if normal is None:
        return x - steps
    return x - jnp.where(steps == 0, 0, steps * normal)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
@functools.partial(jax.jit, static_argnums=(3, 4))
def _onto_plane(
    x: jax.Array,
    normal: jax.Array | None,
    point: jax.Array,
    axis: tuple[int, ...],
    half: bool = False,
) -> jax.Array:
    """The nearest point of a plane, or of the half space below it.

    Args:
        x: The weights.
        normal: The normal, of any length; None for ones.
        point: Any point of the plane; the nearest to zero makes for the least rounding.
        axis: The axes of a unit.
        half: Whether what lies below the plane stays.
    """
    steps = _above(x, normal, point, axis)
    stays = _is_near(x, normal, steps, axis, _tolerance(x))
    stays = stays | (steps < 0) if half else stays
    # A unit whose sum is not finite becomes NaN.
    finite = jnp.isfinite(steps)
    steps, stays = jnp.where(finite, steps, jnp.nan), stays & finite
    moved = _lower(x, normal, jnp.where(stays, 0, steps))
    rest = _above(moved, normal, point, axis)
    return _lower(moved, normal, jnp.where(stays, 0, rest))


@_onto_plane.defjvp
def _onto_plane_jvp(axis, half, primals, tangents):
    def formula(x, normal, point):
        steps = _above(x, normal, point, axis)
        return x - (steps if normal is None else steps * normal)

    # Also on the plane, where the projection changes nothing.
    _, dy = jax.jvp(formula, primals, tangents)
    y = _onto_plane(*primals, axis, half)
    if half:
        stays = jnp.all(y == primals[0], axis=axis, keepdims=True)
        dy = jnp.where(stays, tangents[0], dy)
    return y, dy


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class SumTo(UnitSet):
    """Each unit sums to `value`: ``{w : sum(unit) = value}``.

    A plane, so convex; the projection adds the same number to all entries of a unit, and is
    the nearest point, exact up to rounding. Three sums over the weights, and one pass to add.

    Args:
        value: The sum of each unit.
        axis: The axes along which one unit runs, as for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `value` is infinite or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.sum_to(1.0)(jnp.array([[0.5, 1.0], [0.0, 2.0]]))
        Array([[0.75, 0.  ],
               [0.25, 1.  ]], dtype=float32)
    """

    convex: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    value: Number = number(low=-_MAX, high=_MAX)
    axis: Axis = 0

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; sums are taken in float32 or wider."""
        w = jnp.asarray(w)
        wide, axis = self._widen(w)
        mean = value(self.value, wide.dtype) / max(_size(wide, axis), 1)
        return _onto_plane(wide, None, mean, axis).astype(w.dtype)


sum_to = SumTo


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class CenterAround(UnitSet):
    """The mean of each unit is `ref_value`: ``{w : mean(unit) = ref_value}``.

    A plane, so convex; the projection ``w - mean(w) + ref_value`` is the nearest point, exact
    up to rounding. Costs what `SumTo` costs.

    Args:
        ref_value: The mean of each unit.
        axis: The axes along which one unit runs, as for `MaxNorm`; the whole tensor by default.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `ref_value` is infinite or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.center_around(1.0)(jnp.array([[0.5, 1.0], [0.0, 2.5]]))
        Array([[0.5, 1. ],
               [0. , 2.5]], dtype=float32)
        >>> oc.center_around(0.0, axis=0)(jnp.array([[0.5, 1.0], [0.0, 2.5]]))
        Array([[ 0.25, -0.75],
               [-0.25,  0.75]], dtype=float32)
    """

    convex: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    ref_value: Number = number(low=-_MAX, high=_MAX)
    axis: Axis = None

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; means are taken in float32 or wider."""
        w = jnp.asarray(w)
        wide, axis = self._widen(w)
        mean = value(self.ref_value, wide.dtype)
        return _onto_plane(wide, None, mean, axis).astype(w.dtype)


center_around = CenterAround


class _NormalSet(UnitSet):
    """What the sets with a normal share."""

    normal: Any
    offset: Number

    def __post_init__(self):
        name = type(self).__name__
        object.__setattr__(self, "normal", _check_normal(name, self.normal))
        super().__post_init__()

    def settle(self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None) -> Self:
        """This constraint with `axis` as axes of one leaf, whose units the normal must fit."""
        self._unit_axes(path, shape, layout)
        return cast(Self, super().settle(path, shape, layout))

    def _unit_axes(
        self, path: str | None, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> tuple[int, ...]:
        """The axes of a unit; raises if the normal does not fit it."""
        name = type(self).__name__
        axis = settle_axis(name, self.axis, shape, path, layout)
        unit = tuple(shape[a] for a in axis)
        if self.normal.shape != unit:
            raise ValueError(
                f"{name} on {describe(path, shape)}: a unit along axis={self.axis!r} has shape "
                f"{unit}, and the normal has shape {self.normal.shape}; write a normal of shape "
                f"{unit}, or another axis."
            )
        return axis

    def _plane(self, wide: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The normal, with 1 as its largest entry, and the nearest point to zero."""
        axis = self._unit_axes(None, wide.shape)
        beside = tuple(n if a in axis else 1 for a, n in enumerate(wide.shape))
        normal = jnp.asarray(self.normal, wide.dtype).reshape(beside)
        largest = jnp.max(jnp.abs(normal))
        normal = normal / largest
        offset = value(self.offset, wide.dtype) / largest
        return normal, normal * (offset / _sum(jnp.square(normal), axis))


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Hyperplane(_NormalSet):
    """The inner product of each unit with `normal` is `offset`.

    ``{w : <normal, unit> = offset}``, convex; the projection moves each unit along the normal,
    and is the nearest point, exact up to rounding. Costs what `SumTo` costs.

    Args:
        normal: An array of the shape of one unit: the lengths of the leaf's axes in `axis`, in
            the leaf's order. Not zero; its length does not matter but for `offset`.
        offset: The inner product.
        axis: The axes along which one unit runs, as for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `normal` is zero, or a number is infinite or NaN, or an axis is repeated;
            when bound or called, if `normal` does not have the shape of a unit.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.hyperplane([1.0, -1.0])(jnp.array([[0.5, 1.0], [0.5, 2.0]]))
        Array([[0.5, 1.5],
               [0.5, 1.5]], dtype=float32)
    """

    convex: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    normal: Any
    offset: Number = number(0.0, low=-_MAX, high=_MAX)
    axis: Axis = 0

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; sums are taken in float32 or wider."""
        w = jnp.asarray(w)
        wide, axis = self._widen(w)
        return _onto_plane(wide, *self._plane(wide), axis).astype(w.dtype)


hyperplane = Hyperplane


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class HalfSpace(_NormalSet):
    """The inner product of each unit with `normal` is at most `offset`.

    ``{w : <normal, unit> <= offset}``, convex; the projection moves each unit that is outside
    along the normal, and is the nearest point, exact up to rounding. Costs what `SumTo` costs.

    Args:
        normal: An array of the shape of one unit, as for `Hyperplane`.
        offset: The bound of the inner product.
        axis: The axes along which one unit runs, as for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `normal` is zero, or a number is infinite or NaN, or an axis is repeated;
            when bound or called, if `normal` does not have the shape of a unit.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.half_space([1.0, 1.0], 2.0)(jnp.array([[0.5, 1.0], [0.5, 2.0]]))
        Array([[0.5, 0.5],
               [0.5, 1.5]], dtype=float32)
    """

    convex: ClassVar[bool] = True

    normal: Any
    offset: Number = number(0.0, low=-_MAX, high=_MAX)
    axis: Axis = 0

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; sums are taken in float32 or wider."""
        w = jnp.asarray(w)
        wide, axis = self._widen(w)
        return _onto_plane(wide, *self._plane(wide), axis, True).astype(w.dtype)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units that lie on the plane, up to rounding."""
        return self._reaches(w, 2 * _numerics.eps(w.dtype))

    def _reaches(
        self, w: jax.Array, rounding: float, slack: jax.typing.ArrayLike = 0.0
    ) -> jax.Array:
        wide, axis = self._widen(w)
        normal, point = self._plane(wide)
        above = _above(wide, normal, point, axis)
        near = _is_near(wide, normal, above, axis, rounding)
        return near | (above + slack > 0)

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        """Each unit on the plane without what leads above it."""
        del memory
        axis = self._axes(v)
        normal, _ = self._plane(v)
        near = self._reaches(w, 2 * _numerics.eps(w.dtype) + _tolerance(v), slack)
        up = jnp.where(near, _above(v, normal, 0 * normal, axis), 0)
        return _lower(v, normal, jnp.maximum(up, 0))


half_space = HalfSpace


def _check_normal(owner: str, normal: Any) -> Any:
    """The normal as an array, checked as far as it is concrete."""
    what = f"{owner}: normal={shown(normal)}"
    if not isinstance(normal, jax.Array):
        try:
            normal = np.asarray(normal)
        except ValueError:
            raise ValueError(f"{what} is ragged; write one number for each entry.") from None
    if not (
        jnp.issubdtype(normal.dtype, jnp.floating) or jnp.issubdtype(normal.dtype, jnp.integer)
    ):
        raise TypeError(f"{what} is not an array of real numbers.")
    if isinstance(normal, Tracer) or (
        isinstance(normal, jax.Array) and not normal.is_fully_addressable
    ):
        return normal
    entries = np.asarray(normal).astype(np.float64)
    if not np.all(np.isfinite(entries)):
        raise ValueError(f"{what} has an infinite entry or a NaN; write finite numbers.")
    if not np.any(entries):
        raise ValueError(f"{what} is zero and has no direction; write one that is not.")
    return normal
