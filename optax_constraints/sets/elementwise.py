"""Sets in which each entry is bounded by itself: exact in every dtype."""

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from optax_constraints import _numerics
from optax_constraints._args import Arg
from optax_constraints._axes import Axis, LeafLayout, check_axis, drop_axes, settle_axis
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint, own_arrays
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import check_number, is_schedule, number, value
from optax_constraints._sharding import automatic
from optax_constraints._text import describe, shown


class Elementwise(Constraint):
    """What the sets of this family share."""

    elementwise = True
    convex = True

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        """Without what leads out of the set from entries that are at a bound, to the bit."""
        if self.smooth:
            return super()._along(w, v, memory, slack)
        slack = slack.astype(w.dtype)
        lower, upper = self._bounds(w)
        if lower is not None:
            v = jnp.where(w <= lower + slack, jnp.maximum(v, 0), v)
        if upper is not None:
            v = jnp.where(w >= upper - slack, jnp.minimum(v, 0), v)
        return v

    def _bounds(self, w: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """The least and the largest weights in the set."""
        raise NotImplementedError


def as_array(owner: str, name: str, given: Any) -> np.ndarray | jax.Array:
    """A hyperparameter that is an array, from a list or an array of numbers."""
    try:
        array = given if isinstance(given, jax.Array) else np.asarray(given)
        if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError
    except (TypeError, ValueError):
        raise TypeError(
            f"{owner}: {name}={shown(given)} is not an array of real numbers."
        ) from None
    return array


def _check_bound(owner: str, constraint: Constraint, name: str) -> None:
    """Checks a hyperparameter that is a number or an array, and makes arrays of lists."""
    given = getattr(constraint, name)
    if not isinstance(given, (list, tuple)) and np.ndim(given) == 0:
        check_number(owner, name, given)
        return
    array = as_array(owner, name, given)
    if is_concrete(array) and np.any(np.isnan(np.asarray(array, np.float64))):
        raise ValueError(f"{owner}: {name}={shown(given)} has a NaN; write numbers.")
    object.__setattr__(constraint, name, array)


def check_broadcasts(
    owner: str, name: str, array: Any, path: str | None, shape: tuple[int, ...]
) -> None:
    """Raises if an array does not broadcast to a leaf."""
    own = np.shape(array)
    try:
        fits = np.broadcast_shapes(own, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{owner} on {describe(path, shape)}: {name} has shape {own}, which does not "
            f"broadcast to the weights; write a number, or an array of shape {shape}."
        )


def beside(array: jax.Array, w: jax.Array) -> jax.Array:
    """An array that broadcasts to the weights, with as many axes."""
    return array.reshape((1,) * (w.ndim - array.ndim) + array.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _clip(
    w: jax.Array, lower: jax.Array | None, upper: jax.Array | None, signed: bool = True
) -> jax.Array:
    """The nearest weights between two bounds; if `signed`, a zero keeps its sign."""
    clipped = w if lower is None else jnp.maximum(w, lower)
    clipped = clipped if upper is None else jnp.minimum(clipped, upper)
    if not signed or not jnp.issubdtype(w.dtype, jnp.floating):
        return clipped
    # By its bits: compared with zero, the CPU would take subnormal numbers for zeros.
    bits = jnp.dtype(f"uint{8 * w.dtype.itemsize}")
    sign = jnp.asarray(1 << (8 * w.dtype.itemsize - 1), bits)
    negative_zero = lax.bitcast_convert_type(w, bits) == sign
    return jnp.where(negative_zero & (clipped == 0), w, clipped)


@_clip.defjvp
def _clip_jvp(signed: bool, primals: Any, tangents: Any) -> Any:
    """Not that of `jnp.clip`, which is a half at a bound, but that of the inside."""
    (w, lower, upper), (dy, dlower, dupper) = primals, tangents
    if lower is not None:
        dy = jnp.where(w < lower, dlower, dy)
    if upper is not None:
        dy = jnp.where(w > upper, dupper, dy)
    return _clip(w, lower, upper, signed), dy


# Compiled by itself, for calls outside jit.
clipped = jax.jit(_clip, static_argnums=3, inline=True)


@builtin(in_keras=True)
@dataclasses.dataclass(frozen=True, eq=False)
class NonNeg(Elementwise):
    """No weight is negative: ``{w : w >= 0}``.

    Convex. The projection ``max(w, 0)`` is exact in every dtype, and NaN stays NaN. Integers are
    fine.

    The set is that of `keras.constraints.NonNeg`.

    Cost:
        None: it fuses with the optimizer's own pass over the weights.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.non_neg()(jnp.array([-1.0, 0.5]))
        Array([0. , 0.5], dtype=float32)
    """

    formula = "{ w : w ≥ 0 }"

    sign_preserving = True

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one array of any shape."""
        w = jnp.asarray(w)
        return clipped(w, jnp.zeros((), w.dtype), None)

    def aim(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """What an update leads to."""
        return clipped(w, jnp.zeros((), w.dtype), None, False), memory

    def _bounds(self, w: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        return jnp.zeros((), w.dtype), None

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The entries that are zero."""
        return w <= 0

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The entries."""
        del memory
        return Gauge("entries", w, 0.0)


non_neg = NonNeg


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Box(Elementwise):
    """Each weight lies in an interval: ``{w : lower <= w <= upper}``.

    Convex. The projection ``clip(w, lower, upper)`` is exact in every dtype, to the bounds as that
    dtype holds them.

    With numbers it is the weight clipping of M. Arjovsky et al., "Wasserstein GAN", ICML
    2017; with arrays of 0 and infinity it is a pattern of signs.

    Cost:
        None: it fuses with the optimizer's own pass over the weights.

    Args:
        lower: The lower bound: a number, a JAX scalar, a schedule, an array that broadcasts
            to the weights, or None for no bound.
        upper: The upper bound, likewise.

    Raises:
        TypeError: If a bound is no number and no array.
        ValueError: If a bound is NaN, both are None, or `lower` is above `upper`; at bind, if
            an array does not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.box(-0.01, upper=[1.0, 0.01])(jnp.array([-1.0, 1.0]))
        Array([-0.01,  0.01], dtype=float32)
    """

    lower: Any = number(None, array=True)
    upper: Any = number(None, array=True)

    def __post_init__(self):
        own_arrays(self)
        for name in ("lower", "upper"):
            if getattr(self, name) is not None:
                _check_bound("Box", self, name)
        if self.lower is None and self.upper is None:
            raise ValueError("Box: with neither lower nor upper it allows everything; write one.")
        shapes = [
            b.shape for b in (self.lower, self.upper) if isinstance(b, np.ndarray | jax.Array)
        ]
        try:
            np.broadcast_shapes(*shapes)
        except ValueError:
            raise ValueError(
                f"Box: lower has shape {shapes[0]} and upper {shapes[1]}, which do not broadcast; "
                "write two of the shape of the weights."
            ) from None
        self._check_order("Box")

    @property
    def sign_preserving(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the bounds are zeros and infinities, which say the signs."""
        bounds = [b for b in (self.lower, self.upper) if b is not None]
        return all(
            is_concrete(b) and np.all((np.asarray(b) == 0) | np.isinf(np.asarray(b)))
            for b in bounds
        )

    def _check_order(self, where: str) -> None:
        if (
            is_concrete(self.lower)
            and is_concrete(self.upper)
            and np.any(np.asarray(self.lower) > np.asarray(self.upper))
        ):
            raise ValueError(
                f"{where}: lower={shown(self.lower)} is above upper={shown(self.upper)}; swap them "
                "or widen the interval."
            )

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one array of any shape to which the bounds broadcast."""
        w = jnp.asarray(w)
        return clipped(w, *self._bounds(w))

    def aim(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """What an update leads to."""
        return clipped(w, *self._bounds(w), False), memory

    def _bounds(self, w: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """The bounds in the dtype and with the number of axes of the weights."""
        self._check_bounds(None, w.shape)
        lower, upper = (
            None if bound is None else beside(value(bound, w.dtype), w)
            for bound in (self.lower, self.upper)
        )
        return lower, upper

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint for one leaf, to which its bounds have to broadcast."""
        settled = cast(Box, super().settle(path, shape, layout))
        settled._check_bounds(path, shape)
        return settled

    def _check_bounds(self, path: str | None, shape: tuple[int, ...]) -> None:
        for name in ("lower", "upper"):
            if not isinstance(bound := getattr(self, name), (str, Arg)):
                check_broadcasts("Box", name, bound, path, shape)
        self._check_order(f"Box on {describe(path, shape)}" if path else "Box")

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The entries that are at one of their bounds."""
        lower, upper = self._bounds(w)
        none = jnp.zeros(w.shape, bool)
        return (none if lower is None else w <= lower) | (none if upper is None else w >= upper)

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The set in symbols, with the bounds there are."""
        low = "{ w : w" if self.lower is None else "{ w : {lower} ≤ w"
        return low + (" }" if self.upper is None else " ≤ {upper} }")

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The entries."""
        del memory
        return Gauge("entries", w, *self._bounds(w))


box = Box


def is_concrete(bound: Any) -> bool:
    """Whether this process can read the numbers of a bound."""
    if bound is None or callable(bound) or isinstance(bound, (Tracer, str, Arg)):
        return False
    return not isinstance(bound, jax.Array) or bound.is_fully_addressable


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Grid(Elementwise):
    """Each weight is one of the values: ``{w : w in values}``.

    Binary, ternary and fixed-point networks. Not convex. The projection takes the nearest value,
    and of two that are equally near the one of smaller magnitude, or the positive one. Its
    derivative is zero.

    In each dtype the values are rounded to multiples of its machine epsilon times the power of
    two above the largest: so their differences are exact, and an update leads from one to
    another to the bit. Binary, ternary and fixed-point values are such multiples.

    Small steps are lost: an update shorter than half a gap between values leads back to where it
    came from, and `project` warns of that. Let the optimizer train free weights, with the loss at
    `straight_through`, as in the second example.

    Cost:
        One comparison for each value, or a binary search for more than 32. It fuses with the
        optimizer's own pass over the weights.

    Args:
        values: The values, at least one.

    Raises:
        TypeError: If `values` is not an array of numbers.
        ValueError: If it is empty, has more than one axis, or holds a NaN or an infinity; on a
            leaf of a dtype whose range ends below a value.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.grid([-1, 0, 1])(jnp.array([-0.7, 0.2, 0.5, 9.0]))
        Array([-1.,  0.,  0.,  1.], dtype=float32)
        >>> import jax
        >>> def loss(w):
        ...     return jnp.sum((oc.straight_through(w, oc.grid([-1, 0, 1])) - target) ** 2)
        >>> w, target = jnp.array([-0.2, 0.3, 0.4]), jnp.array([1.0, 0.0, -1.0])
        >>> for _ in range(10):
        ...     w = w - 0.1 * jax.grad(loss)(w)
        >>> oc.constrain(w, oc.grid([-1, 0, 1]))
        Array([ 1.,  0., -1.], dtype=float32)
    """

    formula = "{ w : each entry ∈ {{values}} }"

    values: tuple[float, ...]

    convex = False

    @property
    def loses_steps(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether there are gaps between values."""
        return len(self.values) > 1

    def __post_init__(self):
        array = as_array("Grid", "values", self.values)
        if isinstance(array, Tracer):
            raise TypeError("Grid: values are traced; write concrete numbers.")
        array = np.asarray(array, np.float64)
        if array.ndim != 1 or not array.size or not np.all(np.isfinite(array)):
            raise ValueError(
                f"Grid: values={shown(self.values)} is not allowed; write a list of finite "
                "numbers, such as [-1, 0, 1]."
            )
        object.__setattr__(self, "values", tuple(float(v) for v in np.unique(array)))

    def _in_dtype(self, dtype: Any) -> np.ndarray:
        """The values that an update can reach exactly."""
        largest, info = max(abs(v) for v in self.values), jnp.finfo(dtype)
        end, tiny = float(info.max), float(info.tiny)
        if largest > end:
            raise ValueError(
                f"Grid: {largest:g} is beyond the range of {jnp.dtype(dtype)}, which ends at "
                f"{end:g}; write smaller values, or leave this leaf free."
            )
        if largest < tiny:
            return np.zeros(1)
        spacing = math.ldexp(_numerics.eps(dtype), math.ceil(math.log2(largest)))
        # The power of two above the largest may itself be beyond the range.
        most = end - end % spacing
        return np.unique(np.round(np.clip(self.values, -most, most) / spacing)) * spacing

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array of any shape."""
        w = jnp.asarray(w)
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise TypeError(
                f"Grid takes floating-point weights, and these are {w.dtype}; convert them first."
            )
        dtype = _numerics.compute_dtype(w.dtype)
        values = self._in_dtype(w.dtype)
        middle = (values[1:] / 2 + values[:-1] / 2).astype(dtype)
        # A weight in the middle goes to the smaller magnitude: below zero that is up.
        below = np.minimum(np.nextafter(middle, dtype.type(-np.inf)), -np.finfo(dtype).tiny)
        middle = np.where(middle > 0, middle, below)
        wide, values = w.astype(dtype), jnp.asarray(values, w.dtype)
        if len(middle) > 32:
            nearest = automatic(
                lambda wide, values, middle: values[jnp.searchsorted(middle, wide)],
                *(wide, values, jnp.asarray(middle)),
            )
        else:
            nearest = jnp.full(w.shape, values[0])
            for bound, upper in zip(middle, values[1:], strict=True):
                nearest = jnp.where(wide > bound, upper, nearest)
        nearest = nearest.astype(w.dtype)
        return jnp.where((nearest == w) | (w != w), w, nearest)

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The entries, and where the values are."""
        del memory
        return Gauge("entries", w, marks=self.values)


grid = Grid


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Scale(Constraint):
    """Multiplies the weights. Not a set: a second call multiplies once more.

    For what a training loop decides anew in each step, such as QK-clip (Kimi Team, "Kimi K2: Open
    agentic intelligence", 2025), which shrinks the projections of each attention head by a factor
    that the forward pass has measured: ``scale(arg("gamma"), axis=(0, 2))`` for a kernel (in,
    heads, depth) with one factor a head. A factor of 1 gives the weights back bit for bit.

    Since `constrain` and `violations` apply it like any other constraint, weights count as outside
    wherever the factor is not 1.

    Cost:
        None: it fuses with the optimizer's own pass over the weights.

    Args:
        factor: A number, a JAX scalar, a schedule, an array, or `arg`. An array of as many axes as
            the weights broadcasts to them; one of fewer axes has a number for each unit.
        axis: The axes along which one unit runs, as for `MaxNorm`. With None, arrays of fewer axes
            broadcast as in NumPy.

    Raises:
        TypeError: If `factor` is no number and no array, or `axis` is no axis.
        ValueError: If `factor` is NaN; on a leaf, if it does not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.scale([1.0, 0.5], axis=0)(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        Array([[1., 1.],
               [3., 2.]], dtype=float32)
    """

    formula = "w ↦ {factor} · w"

    factor: Any = number(array=True)
    axis: Axis = None

    def __post_init__(self):
        own_arrays(self)
        _check_bound("Scale", self, "factor")
        object.__setattr__(self, "axis", check_axis("Scale", self.axis))

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Multiplies one floating-point array; computes in float32 or wider."""
        w = jnp.asarray(w)
        wide = w.astype(_numerics.compute_dtype(w.dtype))
        factor = value(self.factor, wide.dtype)
        factor = factor.reshape(self._shape(None, w.shape, factor.shape))
        return automatic(lambda wide, factor: wide * factor, wide, factor).astype(w.dtype)

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint for one leaf, to which its factor has to broadcast."""
        axis = self.axis
        if axis is not None:
            axis = settle_axis("Scale", axis, shape, path, layout, of_units=False)
        settled = Constraint.settle(self._replace(axis=None), path, shape, layout)
        settled = cast(Scale, settled)._replace(axis=axis)
        if not isinstance(settled.factor, (str, Arg)) and not is_schedule(settled.factor):
            settled._shape(path, shape, np.shape(cast(Any, settled.factor)))
        return settled

    def _shape(
        self, path: str | None, shape: tuple[int, ...], own: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The shape with which a factor broadcasts to the weights."""
        if len(own) < len(shape) and own and self.axis is not None:
            units = drop_axes(
                range(len(shape)), settle_axis("Scale", self.axis, shape, path, of_units=False)
            )
            filled = (1,) * (len(units) - len(own)) + own
            if len(units) < len(own):
                raise ValueError(
                    f"Scale on {describe(path, shape)}: factor has shape {own}, and the units "
                    f"along axis={self.axis!r} are {tuple(shape[a] for a in units)}; write a "
                    "number for each of them, or an array of as many axes as the weights."
                )
            own = tuple(filled[units.index(a)] if a in units else 1 for a in range(len(shape)))
        check_broadcasts("Scale", "factor", np.empty(own, bool), path, shape)
        return (1,) * (len(shape) - len(own)) + own


scale = Scale
