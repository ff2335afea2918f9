"""What sets of norms share: how the norm of a unit becomes the factor that projects it."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_constraints import _numerics
from optax_constraints._axes import LeafLayout
from optax_constraints._constraint import Constraint, difference
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import (
    fields_of,
    limits_of,
    relative_to,
)
from optax_constraints._numerics import is_readable
from optax_constraints._text import describe, shown
from optax_constraints.sets._common import InParts, Parts, Units, UnitSet, widen


class Prepared(NamedTuple):
    """What an update of a leaf has to know of its units."""

    norm: jax.Array
    factor: jax.Array
    """What takes the sum of weights and update into the set. If others wait for it and not for
    the norm, XLA's CPU backend need not write down both."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NormSet(InParts, UnitSet):
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
        for field in fields_of(type(self)) if self.axis_name is not None else ():
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
        names = (f.name for f in fields_of(type(self)) if limits_of(f))
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
        length, one = self._of_all(norms[0]), self._one(self._size(parts, units))
        return length if one == 1 else length / one

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

    def prepare(self, params: jax.Array, updates: jax.Array, memory: Any = ()) -> Prepared:
        """The norm and the factor of each unit of the sum."""
        return self._prepared((params,), (updates,), self._units(params), memory)

    def prepare_parts(self, params: Parts, updates: Parts, memory: Any) -> Prepared:
        """The norm and the factor of the vector."""
        return self._prepared(params, updates, Units.one(params), memory)

    def _prepared(self, params: Parts, updates: Parts, units: Units, memory: Any) -> Prepared:
        total = self._limited(params, updates, units)
        norm = self._norms(total, units, _numerics.plain_norm)
        known = memory if self.remembers else jax.lax.stop_gradient(norm)
        return Prepared(norm, self._scale(norm, known))

    def _limited(self, params: Parts, updates: Parts, units: Units) -> Parts:
        size = self._size(params, units)
        return tuple(_limited_sum(p, u, size) for p, u in zip(params, updates, strict=True))

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
        known = self.prepare(params, updates, memory) if prepared is None else prepared
        size = self._size((params,), self._units(params))
        return _scaled_update(params, updates, size, known.factor), memory

    def update_parts(
        self, params: Parts, updates: Parts, memory: Any, prepared: Any
    ) -> tuple[Parts, Any]:
        """The update of a vector, as for one leaf."""
        known = self.prepare_parts(params, updates, memory) if prepared is None else prepared
        size, pairs = self._size(params, Units.one(params)), zip(params, updates, strict=True)
        return tuple(_scaled_update(p, u, size, known.factor) for p, u in pairs), memory

    def taken(
        self, params: jax.Array, updates: jax.Array, prepared: Any, memory: Any = ()
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """From the norms of the sum."""
        del memory
        units = self._units(params)
        (total,) = self._limited((params,), (updates,), units)
        norm, scale = prepared
        unit = self._one(self._size((params,), units))
        lengths = norm * unit * jnp.abs(1 - scale)
        at_bound = self._reaches(norm * scale, norm.dtype)
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


def _scaled_update(params: jax.Array, updates: jax.Array, size: int, scale: jax.Array) -> jax.Array:
    total = _limited_sum(_numerics.read_again(params), updates, size)
    target = (total * scale).astype(params.dtype)
    return difference(target, params, updates)


def _limited_sum(params: jax.Array, updates: jax.Array, size: int) -> jax.Array:
    """The weights after an update, with entries of limited size in units of `size` entries."""
    wide = params.astype(_numerics.compute_dtype(params.dtype))
    moved = updates.astype(wide.dtype)
    most, total = _square_limit(wide.dtype, size), wide + moved
    # The sum comes last: XLA's CPU backend fuses an addition, but not a clip, with the
    # optimizer's arithmetic and keeps the result for both passes.
    # What is no number is left to it, too.
    return jax.lax.clamp(-most, total, most) + (total - total)


def _tolerance(norm: jax.Array) -> float:
    """The rounding of a sum of squares: a norm that is this near to a bound is at it."""
    return 4 * _numerics.eps(norm.dtype)


def _over(norm: jax.Array, bound: jax.Array) -> tuple[jax.Array, Any]:
    """How many times `bound` a norm is, NaN if infinite; and 0 for a bound of 0, else 1."""
    tiny = jnp.finfo(norm.dtype).tiny
    if is_readable(bound):  # by NumPy, for which there is nothing to compile
        known = np.asarray(bound)
        least, one = np.maximum(known, tiny), (known > 0).astype(norm.dtype)
    else:
        least, one = jnp.maximum(bound, tiny), (bound > 0).astype(norm.dtype)
    return norm / least + (norm - norm), one


def at_most(norm: jax.Array, bound: jax.Array) -> jax.Array:
    """The factor that takes `norm` down to `bound`.

    The choice stands under the division: around it, XLA's CPU backend would no longer fuse
    the factor with the weights and keep one more copy of them.
    """
    ratio, one = _over(norm, bound)
    inside = ratio <= 1 + _tolerance(norm)
    return one / jax.lax.select(inside, jnp.ones_like(ratio), ratio)


def _is_zero(norm: jax.Array) -> jax.Array:
    """Whether a unit counts as zero: its norm is subnormal, and has no inverse."""
    return norm < jnp.finfo(norm.dtype).tiny


def at_least(norm: jax.Array, bound: jax.Array) -> jax.Array:
    """The factor that takes `norm` up to `bound`; a unit of zeros has no direction: 1."""
    ratio = norm / jnp.maximum(bound, jnp.finfo(norm.dtype).tiny)
    return 1 / jnp.where((ratio >= 1 - _tolerance(norm)) | _is_zero(norm), 1, ratio)


def exactly(norm: jax.Array, bound: jax.Array) -> jax.Array:
    """The factor that takes `norm` to `bound`; a unit of zeros has no direction: 1."""
    ratio, one = _over(norm, bound)
    # Only the value snaps to 1: the derivative there is that of w / ||w||.
    error = jnp.where(jnp.abs(ratio - 1) <= _tolerance(norm), 1 - ratio, 0)
    return one / jnp.where(_is_zero(norm), 1, ratio + jax.lax.stop_gradient(error))


def _square_limit(dtype: jnp.dtype, size: int) -> Any:
    """A power of two of which twice can be squared and summed `size` times."""
    return dtype.type(2.0 ** ((int(jnp.finfo(dtype).maxexp) - size.bit_length() - 3) // 2))
