"""Sets that bound the Euclidean norm of each unit: one slice of the weights along `axis`.

Every projection here multiplies a unit by one number, which is exactly 1 where the unit is
allowed: such a unit comes back bit for bit, in every dtype. A norm that passes its bound only
by the rounding of its own sum (4 machine epsilons of the dtype it was taken in) is allowed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp

from optax_constraints import _numerics
from optax_constraints._axes import Axis, LeafLayout
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint, difference
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import (
    Number,
    concrete,
    fields_of,
    is_number,
    limits_of,
    number,
    relative_to,
    value,
)
from optax_constraints._text import describe, shown
from optax_constraints.sets._common import InParts, Parts, Units, UnitSet, widen


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _NormSet(InParts, UnitSet):
    """What the sets of this family share: how a unit's norm becomes its factor."""

    axis_name: str | tuple[str, ...] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        names = self.axis_name
        if isinstance(names, (tuple, list)):
            object.__setattr__(self, "axis_name", tuple(names))
        for name in names if isinstance(names, (tuple, list)) else (names,):
            if name is not None and not isinstance(name, str):
                raise TypeError(
                    f"{type(self).__name__}: axis_name={shown(names)} is not a name; write that of "
                    "an axis of the mesh of jax.shard_map, such as 'model', or several."
                )

    def __repr__(self) -> str:
        """As of any dataclass, without what is hardly ever there."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "axis_name"]
        fields += ["axis_name"] if self.axis_name is not None else []
        values = (f"{name}={getattr(self, name)!r}" for name in fields)
        return f"{type(self).__name__}({', '.join(values)})"

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as values that JSON can hold; those of Keras if these do."""
        config = super().get_config()
        return {k: v for k, v in config.items() if (k, v) != ("axis_name", None)}

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint for one leaf, of which the sizes have to be known."""
        for field in fields_of(self) if self.axis_name is not None else ():
            if limits_of(field) and relative_to(given := getattr(self, field.name)) - {"init"}:
                raise ValueError(
                    f"{type(self).__name__} on {describe(path, shape)}: {field.name}={given!r} "
                    f"goes by sizes, and with axis_name={self.axis_name!r} those here are of the "
                    "part on one device; write a number."
                )
        return super().settle(path, shape, layout)

    def _scale(self, norm: jax.Array, at_init: jax.Array) -> jax.Array:
        """The factor of a unit with this norm, and with that norm at init."""
        raise NotImplementedError

    def _one(self, size: int) -> float:
        """What counts as a norm of 1 in a unit of so many entries."""
        del size
        return 1.0

    sign_preserving = True

    def _bound(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array:
        """The largest norm."""
        raise NotImplementedError

    def _along_parts(
        self, w: Parts, v: Parts, units: Units, memory: Any, slack: Any, rounding: float
    ) -> Parts:
        # Both sums in one pass. A norm whose square over- or underflows counts as zero.
        squares = self._over_devices(units.sum(tuple(map(jnp.square, w))))
        # A direction is the negative of a gradient: XLA's CPU backend would make an array of it.
        against = tuple(map(jnp.negative, v))
        inner = -self._over_devices(units.sum(tuple(map(jnp.multiply, w, against))))
        norm = jnp.sqrt(squares) / self._one(self._size(w, units))
        at_init: Any = memory if self.remembers and not isinstance(memory, tuple) else norm
        bound = self._bound(norm.dtype, at_init)
        known = (squares > 0) & (squares < jnp.inf)
        off = jnp.where(known, inner / jnp.where(known, squares, 1), 0)
        if not self.smooth:
            at_bound = norm >= bound * (1 - 2 * rounding - _tolerance(norm)) - slack
            off = jnp.where(at_bound, jnp.maximum(off, 0), 0)
        # The norm 0 is that of one point.
        return tuple(jnp.where(bound > 0, d - x * off, 0) for x, d in zip(w, v, strict=True))

    def _over_devices(self, total: jax.Array) -> jax.Array:
        """The sums of whole units, from those of their parts on the devices of `axis_name`."""
        if self.axis_name is None:
            return total
        self._devices()  # raises where there is no such axis
        return jax.lax.psum(total, self.axis_name)

    @property
    def remembers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only
        """Whether a bound is relative to the norm at init."""
        names = (f.name for f in fields_of(self) if limits_of(f))
        return any("init" in relative_to(getattr(self, name)) for name in names)

    def remember(self, w: jax.Array) -> Any:
        """The norm of each unit, if a bound is relative to it."""
        return self._norm(w) if self.remembers else ()

    def remember_parts(self, parts: Parts) -> Any:
        """The norm of the vector, if a bound is relative to it."""
        return self._norms(parts, Units.one(parts)) if self.remembers else ()

    def _norm(self, w: jax.Array) -> jax.Array:
        """The norm of each unit."""
        return self._norms((w,), self._units(w))

    def _norms(
        self, parts: Parts, units: Units, norm: Callable[..., jax.Array] = _numerics.norm
    ) -> jax.Array:
        wide = tuple(widen(type(self).__name__, part) for part in parts)
        norms = [norm(part, axis) for part, axis in zip(wide, units.axes, strict=True)]
        if len(norms) > 1:
            dtype = _numerics.widest(*(n.dtype for n in norms))
            together = jnp.stack([n.reshape(()).astype(dtype) for n in norms])
            norms = [norm(together, (0,)).reshape(())]
        norm, one = self._of_all(norms[0]), self._one(self._size(parts, units))
        return norm if one == 1 else norm / one

    def _of_all(self, norm: jax.Array) -> jax.Array:
        """The norms of whole units, from those of their parts on the devices of `axis_name`."""
        if self.axis_name is None:
            return norm
        self._devices()  # raises where there is no such axis
        largest = jax.lax.pmax(jax.lax.stop_gradient(norm), self.axis_name)
        some = largest > 0
        squares = jax.lax.psum(jnp.square(norm / jnp.where(some, largest, 1)), self.axis_name)
        # Where none is above 0 the squares are 0, or NaN.
        return jnp.where(some, largest * jnp.sqrt(jnp.where(some, squares, 1)), squares)

    def _size(self, parts: Parts, units: Units) -> int:
        """How many entries a unit has, on all devices of `axis_name`."""
        return units.size(parts) * self._devices()

    def _devices(self) -> int:
        """Over how many devices a unit is split."""
        if self.axis_name is None:
            return 1
        try:
            return jax.lax.psum(1, self.axis_name)
        except NameError:
            raise ValueError(
                f"{type(self).__name__}: axis_name={shown(self.axis_name)} is no axis here; it is "
                "for weights inside jax.shard_map over a mesh with that axis. Elsewhere leave it "
                "out: there norms are those of the whole."
            ) from None

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; norms are taken in float32 or wider.

        Bounds that are relative to init are relative to the norms that it has.
        """
        w = jnp.asarray(w)
        norm = self._norm(w)
        return _scaled(w, self._scale(norm, jax.lax.stop_gradient(norm)))

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Projects one array with the norms that it had at init."""
        if not self.remembers:
            return self(w), memory
        return _scaled(w, self._scale(self._norm(w), memory)), memory

    def advance_parts(self, parts: Parts, memory: Any) -> tuple[Parts, Any]:
        """Projects a vector with the norm that it had at init."""
        norm = self._norms(parts, Units.one(parts))
        scale = self._scale(norm, memory if self.remembers else jax.lax.stop_gradient(norm))
        return tuple(_scaled(part, scale) for part in parts), memory

    def prepare(self, params: jax.Array, updates: jax.Array, memory: Any = ()) -> jax.Array:
        """The norm of each unit of the sum."""
        del memory
        return self._norms_of_sum((params,), (updates,), self._units(params))

    def prepare_parts(self, params: Parts, updates: Parts, memory: Any) -> jax.Array:
        """The norm of the vector."""
        del memory
        return self._norms_of_sum(params, updates, Units.one(params))

    def _norms_of_sum(self, params: Parts, updates: Parts, units: Units) -> jax.Array:
        return self._norms(self._limited(params, updates, units), units, _numerics.plain_norm)

    def _limited(self, params: Parts, updates: Parts, units: Units) -> Parts:
        limit = _square_limit(self._size(params, units))
        return tuple(_limited_sum(p, u, limit) for p, u in zip(params, updates, strict=True))

    def _factor(self, norm: jax.Array, memory: Any) -> jax.Array:
        return self._scale(norm, memory if self.remembers else jax.lax.stop_gradient(norm))

    def update(
        self, params: jax.Array, updates: jax.Array, memory: Any = (), prepared: Any = None
    ) -> tuple[jax.Array, Any]:
        """The update of one leaf, without the second pass that huge and tiny norms need.

        Beside an optimizer, whatever waits for the norms keeps a copy of the leaf alive, and
        a second pass waits long. So entries count as `_square_limit` at most here, which is
        above 1e15 for a unit of up to 4 million weights in float32: beyond, the result is
        still in the set, with the signs of the sum, but not the nearest point. A sum whose
        square underflows, with a norm below 1e-19 or so, counts as zero. An infinite entry
        makes NaN of its unit, as it does without the limit.
        """
        norm = self.prepare(params, updates, memory) if prepared is None else prepared
        limit = _square_limit(self._size((params,), self._units(params)))
        return _scaled_update(params, updates, limit, self._factor(norm, memory)), memory

    def update_parts(
        self, params: Parts, updates: Parts, memory: Any, prepared: Any
    ) -> tuple[Parts, Any]:
        """The update of a vector, as for one leaf."""
        norm = self.prepare_parts(params, updates, memory) if prepared is None else prepared
        scale, limit = (
            self._factor(norm, memory),
            _square_limit(self._size(params, Units.one(params))),
        )
        pairs = zip(params, updates, strict=True)
        return tuple(_scaled_update(p, u, limit, scale) for p, u in pairs), memory

    def taken(
        self, params: jax.Array, updates: jax.Array, prepared: Any, memory: Any = ()
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """From the norms of the sum."""
        units = self._units(params)
        (total,) = self._limited((params,), (updates,), units)
        scale = self._factor(prepared, memory)
        unit = self._one(self._size((params,), units))
        lengths = prepared * unit * jnp.abs(1 - scale)
        at_bound = self._reaches(prepared * scale, prepared.dtype)
        return total, _numerics.norm(lengths, None).reshape(()), at_bound

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """The units whose norm is a bound, up to rounding; None if that is relative to init."""
        return self._reaches(self._norm(w), w.dtype)

    def _reaches(self, norm: jax.Array, dtype: jnp.dtype) -> jax.Array | None:
        """Whether a norm of allowed weights is at a bound, as far as their dtype can tell."""
        if self.remembers:
            return None
        return norm >= self._bound(norm.dtype, norm) * (1 - 2 * _numerics.eps(dtype))

    _gauged: ClassVar[str] = "norms"

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The norm of each unit; where bounds go by that at init, as a part of the largest."""
        norm = self._norm(w)
        at_init: Any = memory if self.remembers and not isinstance(memory, tuple) else norm
        low, high = self._least(norm.dtype, at_init), self._bound(norm.dtype, at_init)
        if not self.remembers:
            return Gauge(self._gauged, norm, low, high)
        largest = jnp.where(high > 0, high, 1)
        low = None if low is None else low / largest
        return Gauge(f"{self._gauged} / bound", norm / largest, low, jnp.minimum(high, 1))

    def _least(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array | None:
        """The least norm, if there is one above zero."""
        return self._bound(dtype, at_init) if self.smooth else None


def _scaled(w: jax.Array, scale: jax.Array) -> jax.Array:
    return (w.astype(_numerics.compute_dtype(w.dtype)) * scale).astype(w.dtype)


def _scaled_update(
    params: jax.Array, updates: jax.Array, limit: Callable[..., float], scale: jax.Array
) -> jax.Array:
    target = (_limited_sum(params, updates, limit) * scale).astype(params.dtype)
    return difference(target, params, updates)


def _limited_sum(params: jax.Array, updates: jax.Array, limit: Callable[..., float]) -> jax.Array:
    """The weights after an update, with entries of limited size."""
    wide = params.astype(_numerics.compute_dtype(params.dtype))
    moved, most = updates.astype(wide.dtype), limit(wide.dtype)
    total = wide + moved
    # The sum comes last: XLA's CPU backend fuses an addition, but not a clip, with the
    # optimizer's arithmetic and keeps the result for both passes.
    # What is no number is left to it, too.
    limited = (jax.lax.clamp(-most, x, most) for x in (wide, moved))
    return next(limited) + (next(limited) + (total - total))


def _tolerance(norm: jax.Array) -> float:
    """The rounding of a sum of squares: a norm that is this near to a bound is at it."""
    return 4 * _numerics.eps(norm.dtype)


def _over(norm: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many times `bound` a norm is, NaN if infinite; and 0 for a bound of 0, else 1."""
    tiny = jnp.finfo(norm.dtype).tiny
    return norm / jnp.maximum(bound, tiny) + (norm - norm), (bound > 0).astype(norm.dtype)


def _at_most(norm: jax.Array, bound: jax.Array) -> jax.Array:
    """The factor that takes `norm` down to `bound`.

    The choice stands under the division: around it, XLA's CPU backend would no longer fuse
    the factor with the weights and keep one more copy of them.
    """
    ratio, one = _over(norm, bound)
    return one / jnp.where(ratio <= 1 + _tolerance(norm), 1, ratio)


def _is_zero(norm: jax.Array) -> jax.Array:
    """Whether a unit counts as zero: its norm is subnormal, and has no inverse."""
    return norm < jnp.finfo(norm.dtype).tiny


def _at_least(norm: jax.Array, bound: jax.Array) -> jax.Array:
    """The factor that takes `norm` up to `bound`; a unit of zeros has no direction: 1."""
    ratio = norm / jnp.maximum(bound, jnp.finfo(norm.dtype).tiny)
    return 1 / jnp.where((ratio >= 1 - _tolerance(norm)) | _is_zero(norm), 1, ratio)


def _exactly(norm: jax.Array, bound: jax.Array) -> jax.Array:
    """The factor that takes `norm` to `bound`; a unit of zeros has no direction: 1."""
    ratio, one = _over(norm, bound)
    # Only the value snaps to 1: the derivative there is that of w / ||w||.
    error = jnp.where(jnp.abs(ratio - 1) <= _tolerance(norm), 1 - ratio, 0)
    return one / jnp.where(_is_zero(norm), 1, ratio + jax.lax.stop_gradient(error))


@builtin(in_keras=True)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaxNorm(_NormSet):
    """The norm of each unit is at most `max_value`: ``{w : ||unit||_2 <= max_value}``.

    Convex; the projection ``w * min(1, max_value / ||unit||)`` is the nearest point, exact up to
    rounding.

    The set is that of `keras.constraints.MaxNorm`; N. Srivastava et al., "Dropout", JMLR
    15, 2014, use it with dropout.

    Cost:
        Two passes: one to take the norms and one to scale.

    Args:
        max_value: The bound: a number of at least 0, a JAX scalar, a schedule, or a multiple of
            each unit's norm at init, such as `"2x init"`, which `project` keeps in its state.
        axis: The axes along which one unit runs: an int, several ints, None for the whole
            tensor, or `"fan_in"`. 0 for a Dense kernel (in, out); (0, 1, 2) for a Conv2D
            kernel (height, width, in, out).
        axis_name: Inside `jax.shard_map`, where weights are those of one device: the axis of
            the mesh, or axes, over which a unit is split. Norms are then summed over them, as
            one all-reduce of a number for each unit; without it they are those of the part.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `max_value` is negative or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.max_norm(1.0)(jnp.array([[3.0, 0.3], [4.0, 0.4]]))
        Array([[0.6, 0.3],
               [0.8, 0.4]], dtype=float32)
    """

    formula = "{ w : ‖u‖₂ ≤ {max_value} }"

    max_value: Number = number(2, low=0, init=True)
    axis: Axis = 0

    convex = True

    def _scale(self, norm: jax.Array, at_init: jax.Array) -> jax.Array:
        return _at_most(norm, self._bound(norm.dtype, at_init))

    def _bound(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array:
        return value(self.max_value, dtype, at_init)


max_norm = MaxNorm


@builtin
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaxRMS(_NormSet):
    """The root mean square of each unit is at most `max_value`: ``{w : rms(unit) <= max_value}``.

    Convex: a ball, whose radius grows with the size of a unit, so that one bound serves layers of
    all widths. The projection ``w * min(1, max_value / rms(unit))`` is the nearest point, exact up
    to rounding.

    Cost:
        Two passes: one to take the norms and one to scale.

    Args:
        max_value: The bound, a number of at least 0, a JAX scalar, a schedule, or `"2x init"`.
        axis: The axes along which one unit runs, as for `MaxNorm`; by default all of them.
        axis_name: As for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `max_value` is negative or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.max_rms(1.0)(jnp.array([3.0, 4.0, 0.0, 0.0]))
        Array([1.2, 1.6, 0. , 0. ], dtype=float32)
    """

    formula = "{ w : rms(u) ≤ {max_value} }"

    max_value: Number = number(low=0, init=True)
    axis: Axis = None

    convex = True

    _gauged = "root mean squares"

    def _one(self, size: int) -> float:
        return math.sqrt(max(size, 1))

    def _scale(self, norm: jax.Array, at_init: jax.Array) -> jax.Array:
        return _at_most(norm, self._bound(norm.dtype, at_init))

    def _bound(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array:
        return value(self.max_value, dtype, at_init)


max_rms = MaxRMS


@builtin(in_keras=True)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MinMaxNorm(_NormSet):
    """The norm of each unit lies in an interval.

    ``{w : min_value <= ||unit||_2 <= max_value}``, convex only for ``min_value = 0``. The
    projection scales each unit, and is the nearest point; a unit of zeros has no direction and
    stays zero.

    The set is that of `keras.constraints.MinMaxNorm`.

    Cost:
        Two passes: one to take the norms and one to scale.

    Args:
        min_value: The lower bound, at least 0, or a multiple of each unit's norm at init, such
            as `"0.5x init"`, which `project` keeps in its state.
        max_value: The upper bound, at least `min_value`, or a multiple as there.
        rate: How far to go in one step: the norm becomes ``rate * clip(norm, min_value,
            max_value) + (1 - rate) * norm``. With a rate below 1 the result is nearer to
            the set, not in it.
        axis: The axes along which one unit runs, as for `MaxNorm`.
        axis_name: As for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a bound is negative or NaN, `min_value` is above `max_value`, `rate`
            is outside [0, 1], or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.min_max_norm(0.5, 1.0)(jnp.array([[3.0, 0.15], [4.0, 0.2]]))
        Array([[0.6, 0.3],
               [0.8, 0.4]], dtype=float32)
    """

    formula = "{ w : {min_value} ≤ ‖u‖₂ ≤ {max_value} }"

    min_value: Number = number(0.0, low=0, init=True)
    max_value: Number = number(1.0, low=0, init=True)
    rate: Number = number(1.0, low=0, high=1)
    axis: Axis = 0

    def __post_init__(self):
        super().__post_init__()
        self._check_order("MinMaxNorm")

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint for one leaf, for which `min_value` must not be above `max_value`."""
        settled = cast(MinMaxNorm, super().settle(path, shape, layout))
        settled._check_order(f"MinMaxNorm on {describe(path, shape)}")
        return settled

    def _check_order(self, where: str) -> None:
        def above(init: float) -> bool:
            low, high = (concrete(bound, init) for bound in (self.min_value, self.max_value))
            return low is not None and high is not None and low > high

        if all(above(10.0**e) for e in range(-3, 4)):  # whatever the norm at init
            raise ValueError(
                f"{where}: min_value={self.min_value!r} is above max_value={self.max_value!r}; "
                "swap them or widen the interval."
            )

    @property
    def convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only
        """Whether there is no lower bound, and each step goes all the way."""
        return is_number(self.min_value, 0) and is_number(self.rate, 1)

    def _scale(self, norm: jax.Array, at_init: jax.Array) -> jax.Array:
        low = value(self.min_value, norm.dtype, at_init)
        scale = _at_most(norm, self._bound(norm.dtype, at_init)) * _at_least(norm, low)
        rate = value(self.rate, norm.dtype)
        return rate * scale + (1 - rate)

    def _bound(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array:
        return value(self.max_value, dtype, at_init)

    def _least(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array | None:
        return value(self.min_value, dtype, at_init)

    def _reaches(self, norm: jax.Array, dtype: jnp.dtype) -> jax.Array | None:
        high = super()._reaches(norm, dtype)
        low = value(self.min_value, norm.dtype) * (1 + 2 * _numerics.eps(dtype))
        return None if high is None else high | (norm <= low)


min_max_norm = MinMaxNorm


@builtin(in_keras=True)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class UnitNorm(_NormSet):
    """The norm of each unit is 1: ``{w : ||unit||_2 = 1}``.

    Not convex. The projection divides each unit by its norm, and is the nearest point; a unit of
    zeros has no direction and stays zero.

    The set is that of `keras.constraints.UnitNorm`.

    Cost:
        Two passes: one to take the norms and one to scale.

    Args:
        axis: The axes along which one unit runs, as for `MaxNorm`.
        axis_name: As for `MaxNorm`.

    Raises:
        TypeError: If `axis` has the wrong type.
        ValueError: If an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.unit_norm()(jnp.array([[3.0, 0.0], [4.0, 0.0]]))
        Array([[0.6, 0. ],
               [0.8, 0. ]], dtype=float32)
    """

    formula = "{ w : ‖u‖₂ = 1 }"

    axis: Axis = 0

    smooth = True

    def _scale(self, norm: jax.Array, at_init: jax.Array) -> jax.Array:
        return _exactly(norm, self._bound(norm.dtype, at_init))

    def _bound(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array:
        del at_init
        return jnp.ones((), dtype)

    def _reaches(self, norm: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """All units but those of zeros."""
        del dtype
        return norm > 0


unit_norm = UnitNorm


@builtin
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FixedNorm(_NormSet):
    """The norm of each unit is `value`, or what it was at init: ``{w : ||unit||_2 = value}``.

    Not convex. The projection divides each unit by its norm and multiplies it by `value`, and is
    the nearest point; a unit of zeros has no direction and stays zero. With `"init"` the norms are
    taken when `project` is initialised and kept in its state, so that they do not drift, however
    long the training; a unit of zeros at init stays zero for good. Without that state, as in
    `constrain(params, rules)`, weights count as those at init.

    Cost:
        Two passes: one to take the norms and one to scale.

    Args:
        value: The norm: a number of at least 0, a JAX scalar, a schedule, or `"init"`, or a
            multiple of it, such as `"2x init"`.
        axis: The axes along which one unit runs, as for `MaxNorm`; by default all of them.
        axis_name: As for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `value` is negative or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.fixed_norm(10.0)(jnp.array([[3.0], [4.0]]))
        Array([[6.],
               [8.]], dtype=float32)
    """

    formula = "{ w : ‖u‖₂ = {value} }"

    value: Number = number(low=0, init=True)
    axis: Axis = None

    smooth = True

    def _scale(self, norm: jax.Array, at_init: jax.Array) -> jax.Array:
        return _exactly(norm, self._bound(norm.dtype, at_init))

    def _bound(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array:
        return value(self.value, dtype, at_init)

    def _reaches(self, norm: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """All units but those of zeros."""
        del dtype
        return norm > 0


fixed_norm = FixedNorm


@builtin
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FixedRMS(FixedNorm):
    """The root mean square of each unit is `value`, or what it was: ``{w : rms(unit) = value}``.

    Not convex. A sphere as for `FixedNorm`, whose radius grows with the size of a unit, so that one
    value serves layers of all widths. The projection is the nearest point; a unit of zeros has no
    direction and stays zero.

    Cost:
        Two passes: one to take the norms and one to scale.

    Args:
        value: The root mean square: a number of at least 0, a JAX scalar, a schedule, or
            `"init"`, or a multiple of it, such as `"2x init"`.
        axis: The axes along which one unit runs, as for `MaxNorm`; by default all of them.
        axis_name: As for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `value` is negative or NaN, or an axis is repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.fixed_rms(1.0)(jnp.array([3.0, 4.0, 0.0, 0.0]))
        Array([1.2, 1.6, 0. , 0. ], dtype=float32)
    """

    formula = "{ w : rms(u) = {value} }"

    _gauged = "root mean squares"

    def _one(self, size: int) -> float:
        return math.sqrt(max(size, 1))


fixed_rms = FixedRMS


def _square_limit(size: int) -> Callable[[Any], float]:
    """For a dtype, a power of two of which twice can be squared and summed `size` times."""
    return lambda dtype: 2.0 ** ((int(jnp.finfo(dtype).maxexp) - size.bit_length() - 3) // 2)
