"""Sets given by linear equations, or one linear inequality, for each unit.

A unit whose sum misses its value only by the rounding of that sum (8 machine epsilons of the
dtype it was taken in, times the sum of the magnitudes) is allowed, and comes back bit for bit.
What was moved is corrected once more by what its own sum still misses, so that it is allowed.
A unit with an infinite entry becomes NaN, and so does one whose sum is beyond the range of the
dtype. At an allowed unit the derivative is that of the inside of the set.
"""

import dataclasses
import functools
import math
import sys
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
import numpy as np

from optax_constraints import _numerics
from optax_constraints._args import Arg
from optax_constraints._axes import Axis, LeafLayout, settle_axis
from optax_constraints._config import builtin
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import Number, check_number, number, value
from optax_constraints._numerics import is_readable
from optax_constraints._text import describe, shown
from optax_constraints.sets._common import UnitSet, sum_rounding

MAX = sys.float_info.max


def _sum(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, axis=axis, keepdims=True)


def _size(x: jax.Array, axis: tuple[int, ...]) -> int:
    """How many entries a unit has."""
    return math.prod(x.shape[a] for a in axis)


# Planes and half spaces: a step along a normal.


def _above(
    x: jax.Array, normal: jax.Array | None, offset: jax.Array, axis: tuple[int, ...]
) -> jax.Array:
    """How many normals each unit lies above the plane; no normal stands for ones."""
    # The sum is one of products at most: XLA's CPU backend is slow to sum what it cannot read.
    if normal is None:
        return (_sum(x, axis) - offset) / _size(x, axis)
    return (_sum(x * normal, axis) - offset) / _sum(jnp.square(normal), axis)


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
    offset: jax.Array,
    axis: tuple[int, ...],
    half: bool = False,
) -> jax.Array:
    """The nearest point of a plane, or of the half space below it.

    Args:
        x: The weights.
        normal: The normal, of any length; None for ones.
        offset: The inner product of the plane's points with the normal.
        axis: The axes of a unit.
        half: Whether what lies below the plane stays.
    """
    steps = _above(x, normal, offset, axis)
    stays = _is_near(x, normal, steps, axis, sum_rounding(x))
    stays = stays | (steps < 0) if half else stays
    # A unit whose sum is not finite becomes NaN.
    finite = jnp.isfinite(steps)
    steps, stays = jnp.where(finite, steps, jnp.nan), stays & finite
    moved = _lower(x, normal, jnp.where(stays, 0, steps))
    rest = _above(moved, normal, offset, axis)
    return _lower(moved, normal, jnp.where(stays, 0, rest))


@_onto_plane.defjvp
def _onto_plane_jvp(axis, half, primals, tangents):
    def formula(x, normal, offset):
        steps = _above(x, normal, offset, axis)
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

    A plane, so convex; the projection adds the same number to all entries of a unit, and is the
    nearest point, exact up to rounding.

    Cost:
        Three sums over the weights, and one pass to add.

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

    formula = "{ w : Σᵢ uᵢ = {value} }"

    convex: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    value: Number = number(low=-MAX, high=MAX)
    axis: Axis = 0

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; sums are taken in float32 or wider."""
        w = jnp.asarray(w)
        wide, axis = self._widen(w)
        total = value(self.value, wide.dtype)
        return _onto_plane(wide, None, total, axis).astype(w.dtype)

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The sums of units."""
        del memory
        wide, axis = self._widen(w)
        total = value(self.value, wide.dtype)
        return Gauge("sums", _sum(wide, axis), total, total)


sum_to = SumTo


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class CenterAround(UnitSet):
    """The mean of each unit is `ref_value`: ``{w : mean(unit) = ref_value}``.

    A plane, so convex; the projection ``w - mean(w) + ref_value`` is the nearest point, exact up to
    rounding.

    Cost:
        Three sums over the weights, and one pass to add.

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

    formula = "{ w : mean(u) = {ref_value} }"

    convex: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    ref_value: Number = number(low=-MAX, high=MAX)
    axis: Axis = None

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; means are taken in float32 or wider."""
        w = jnp.asarray(w)
        wide, axis = self._widen(w)
        total = value(self.ref_value, wide.dtype) * _size(wide, axis)
        return _onto_plane(wide, None, total, axis).astype(w.dtype)

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The means of units."""
        del memory
        wide, axis = self._widen(w)
        mean = value(self.ref_value, wide.dtype)
        return Gauge("means", jnp.mean(wide, axis=axis), mean, mean)


center_around = CenterAround


class _NormalSet(UnitSet):
    """What the sets with a normal share."""

    normal: Any
    offset: Number

    def __post_init__(self):
        name = type(self).__name__
        object.__setattr__(self, "normal", check_normal(name, self.normal))
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
        check_unit(name, "normal", self.normal, self.axis, unit, path, shape)
        return axis

    def _plane(self, wide: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The normal, with 1 as its largest entry, and the offset."""
        axis = self._unit_axes(None, wide.shape)
        beside = tuple(n if a in axis else 1 for a, n in enumerate(wide.shape))
        normal = jnp.asarray(self.normal, wide.dtype).reshape(beside)
        largest = jnp.max(jnp.abs(normal))
        return normal / largest, value(self.offset, wide.dtype) / largest

    def _products(self, w: jax.Array) -> jax.Array:
        """The inner product of each unit with the normal."""
        wide, axis = self._widen(w)
        beside = tuple(n if a in axis else 1 for a, n in enumerate(wide.shape))
        return _sum(wide * jnp.asarray(self.normal, wide.dtype).reshape(beside), axis)


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Hyperplane(_NormalSet):
    """The inner product of each unit with `normal` is `offset`.

    ``{w : <normal, unit> = offset}``, convex; the projection moves each unit along the normal, and
    is the nearest point, exact up to rounding.

    Cost:
        Three sums over the weights, and one pass to add.

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

    formula = "{ w : ⟨{normal}, u⟩ = {offset} }"

    convex: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    normal: Any
    offset: Number = number(0.0, low=-MAX, high=MAX)
    axis: Axis = 0

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; sums are taken in float32 or wider."""
        w = jnp.asarray(w)
        wide, axis = self._widen(w)
        return _onto_plane(wide, *self._plane(wide), axis).astype(w.dtype)

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The inner products of units with the normal."""
        del memory
        offset = value(self.offset, jnp.dtype(jnp.float32))
        return Gauge("inner products", self._products(w), offset, offset)


hyperplane = Hyperplane


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class HalfSpace(_NormalSet):
    """The inner product of each unit with `normal` is at most `offset`.

    ``{w : <normal, unit> <= offset}``, convex; the projection moves each unit that is outside along
    the normal, and is the nearest point, exact up to rounding.

    Cost:
        Three sums over the weights, and one pass to add.

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

    formula = "{ w : ⟨{normal}, u⟩ ≤ {offset} }"

    convex: ClassVar[bool] = True

    normal: Any
    offset: Number = number(0.0, low=-MAX, high=MAX)
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
        normal, offset = self._plane(wide)
        above = _above(wide, normal, offset, axis)
        near = _is_near(wide, normal, above, axis, rounding)
        return near | (above + slack > 0)

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        """Each unit on the plane without what leads above it."""
        del memory
        axis = self._axes(v)
        normal, _ = self._plane(v)
        near = self._reaches(w, 2 * _numerics.eps(w.dtype) + sum_rounding(v), slack)
        up = jnp.where(near, _above(v, normal, jnp.zeros((), v.dtype), axis), 0)
        return _lower(v, normal, jnp.maximum(up, 0))

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The inner products of units with the normal."""
        del memory
        offset = value(self.offset, jnp.dtype(jnp.float32))
        return Gauge("inner products", self._products(w), None, offset)


half_space = HalfSpace


def check_normal(owner: str, normal: Any) -> Any:
    """The normal as an array, checked as far as it is concrete."""
    what = f"{owner}: normal={shown(normal)}"
    normal = check_array(what, normal)
    entries = readable(normal)
    if entries is not None and not np.any(entries):
        raise ValueError(f"{what} is zero and has no direction; write one that is not.")
    return normal


def check_array(what: str, given: Any, finite: bool = True) -> Any:
    """Something as an array of real numbers, checked as far as it is concrete."""
    if not isinstance(given, jax.Array):
        try:
            given = np.asarray(given)
        except ValueError:
            raise ValueError(f"{what} is ragged; write one number for each entry.") from None
    if not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)):
        raise TypeError(f"{what} is not an array of real numbers.")
    entries = readable(given)
    if entries is not None and finite and not np.all(np.isfinite(entries)):
        raise ValueError(f"{what} has an infinite entry or a NaN; write finite numbers.")
    if entries is not None and np.any(np.isnan(entries)):
        raise ValueError(f"{what} has a NaN; write numbers.")
    return given


def check_bound(owner: str, name: str, given: Any) -> Any:
    """A bound, which may be None or an array, checked as far as it is concrete."""
    if given is None:
        return None
    if isinstance(given, (list, tuple)) or np.ndim(given) > 0:
        return check_array(f"{owner}: {name}={shown(given)}", given, finite=False)
    check_number(owner, name, given)
    return given


def check_unit(
    owner: str,
    name: str,
    array: Any,
    axis: Axis,
    unit: tuple[int, ...],
    path: str | None,
    shape: tuple[int, ...],
) -> None:
    """Raises if a hyperparameter is an array, and not of the shape of a unit."""
    own = () if array is None or isinstance(array, (str, Arg)) else np.shape(array)
    if own not in ((), unit) or (name == "normal" and array is not None and own != unit):
        raise ValueError(
            f"{owner} on {describe(path, shape)}: a unit along axis={axis!r} has shape {unit}, "
            f"and the {name} has shape {own}; write a {name} of shape {unit}, or another axis."
        )


def readable(given: Any) -> np.ndarray | None:
    """The numbers of a hyperparameter in float64; None if they are not known yet."""
    if isinstance(given, (str, Arg)) or callable(given) or not is_readable(given):
        return None
    return np.asarray(given).astype(np.float64)
