"""Sets that bound the Euclidean norm of each unit: one slice of the weights along `axis`.

Every projection here multiplies a unit by one number, which is exactly 1 where the unit is
allowed: such a unit comes back bit for bit, in every dtype. A norm that passes its bound only
by the rounding of its own sum (4 machine epsilons of the dtype it was taken in) is allowed.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from optax_constraints import _numerics
from optax_constraints._axes import Axis, check_axis, settle_axis
from optax_constraints._constraint import Constraint, Number, check_number, number


class _NormSet(Constraint):
    """What the sets of this family share: how a unit's norm becomes its factor."""

    unitwise = True
    axis: Axis

    def __post_init__(self):
        object.__setattr__(self, "axis", check_axis(type(self).__name__, self.axis))

    def _scale(self, norm: jax.Array) -> jax.Array:
        """The factor of a unit with this norm."""
        raise NotImplementedError

    def _widen(self, w: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """The weights in the dtype of their norms, and the axes of a unit."""
        name = type(self).__name__
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise TypeError(
                f"{name} takes floating-point weights, and these are {w.dtype}: a norm of "
                "integers has no nearest integers. Convert them to float first."
            )
        axis = settle_axis(name, self.axis, w.shape)
        return w.astype(_numerics.compute_dtype(w.dtype)), axis

    def _norm(self, w: jax.Array) -> jax.Array:
        return _numerics.norm(*self._widen(w))

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; norms are taken in float32 or wider."""
        w = jnp.asarray(w)
        wide, axis = self._widen(w)
        return (wide * self._scale(_numerics.norm(wide, axis))).astype(w.dtype)


def _value(number: Number, dtype: jnp.dtype) -> jax.Array:
    """A hyperparameter as an array."""
    if callable(number):
        raise TypeError(
            "A constraint with a schedule has no numbers yet; write constraint.at(step)(w), or "
            "use project or constrain, which know the step."
        )
    return jnp.asarray(number, dtype)


def _tolerance(norm: jax.Array) -> float:
    """The rounding of a sum of squares: a norm that is this near to a bound is at it."""
    return 4 * _numerics.eps(norm.dtype)


def _at_most(norm: jax.Array, bound: Number) -> jax.Array:
    """The factor that takes `norm` down to `bound`.

    The choice stands under the division: around it, XLA's CPU backend would no longer fuse
    the factor with the weights and keep one more copy of them.
    """
    ratio = norm / jnp.maximum(_value(bound, norm.dtype), jnp.finfo(norm.dtype).tiny)
    return 1 / jnp.where(ratio <= 1 + _tolerance(norm), 1, ratio)


def _is_zero(norm: jax.Array) -> jax.Array:
    """Whether a unit counts as zero: its norm is subnormal, and has no inverse."""
    return norm < jnp.finfo(norm.dtype).tiny


def _at_least(norm: jax.Array, bound: Number) -> jax.Array:
    """The factor that takes `norm` up to `bound`; a unit of zeros has no direction: 1."""
    ratio = norm / jnp.maximum(_value(bound, norm.dtype), jnp.finfo(norm.dtype).tiny)
    return 1 / jnp.where((ratio >= 1 - _tolerance(norm)) | _is_zero(norm), 1, ratio)


@dataclasses.dataclass(frozen=True, eq=False)
class MaxNorm(_NormSet):
    """The norm of each unit is at most `max_value`: ``{w : ||unit||_2 <= max_value}``.

    Convex; the projection ``w * min(1, max_value / ||unit||)`` is the nearest point, exact
    up to rounding. One pass to take the norms and one to scale.

    The set is that of `keras.constraints.MaxNorm`; N. Srivastava et al., "Dropout", JMLR
    15, 2014, use it with dropout.

    Args:
        max_value: The bound, a number of at least 0, a JAX scalar or a schedule.
        axis: The axes along which one unit runs: an int, several ints, None for the whole
            tensor, or `"fan_in"`. 0 for a Dense kernel (in, out); (0, 1, 2) for a Conv2D
            kernel (height, width, in, out).

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

    max_value: Number = number(2)
    axis: Axis = 0

    def __post_init__(self):
        check_number("MaxNorm", "max_value", self.max_value, low=0)
        super().__post_init__()

    def _scale(self, norm: jax.Array) -> jax.Array:
        return _at_most(norm, self.max_value)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units whose norm is the bound, up to rounding."""
        return _reaches(self._norm(w), self.max_value, w.dtype)

    def update(
        self, params: jax.Array, updates: jax.Array, after: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The update of one leaf, without the second pass that huge norms need.

        Beside an optimizer, whatever waits for the norms keeps a copy of the leaf alive, and
        a second pass waits long. So entries count as `_square_limit` at most here, which is
        above 1e15 for a unit of up to 4 million weights in float32. Beyond, the result is
        still in the set, with the signs of the sum, but not the nearest point.
        """
        wide, axis = self._widen(params)
        limit = _square_limit(wide.dtype, math.prod(wide.shape[a] for a in axis))
        turn = limit if after is None else _wait(after, limit)
        # The sum comes last: XLA's CPU backend fuses an addition, but not a clip, with the
        # optimizer's arithmetic and keeps the result for both passes.
        wide = jnp.clip(wide, -limit, limit) + jnp.clip(updates.astype(wide.dtype), -turn, turn)
        norm = jnp.sqrt(_numerics.sum_of_squares(wide, axis))
        scale = self._scale(norm)
        target = (wide * scale).astype(params.dtype)
        dtype = jnp.promote_types(params.dtype, updates.dtype)
        after = scale[(0,) * scale.ndim] if scale.size else after
        return target.astype(dtype) - params.astype(dtype), after


@dataclasses.dataclass(frozen=True, eq=False)
class MinMaxNorm(_NormSet):
    """The norm of each unit lies in an interval.

    ``{w : min_value <= ||unit||_2 <= max_value}``, convex only for ``min_value = 0``. The
    projection scales each unit, and is the nearest point; a unit of zeros has no direction
    and stays zero. One pass to take the norms and one to scale.

    The set is that of `keras.constraints.MinMaxNorm`.

    Args:
        min_value: The lower bound, at least 0.
        max_value: The upper bound, at least `min_value`.
        rate: How far to go in one step: the norm becomes ``rate * clip(norm, min_value,
            max_value) + (1 - rate) * norm``. With a rate below 1 the result is nearer to
            the set, not in it.
        axis: The axes along which one unit runs, as for `MaxNorm`.

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

    min_value: Number = number(0.0)
    max_value: Number = number(1.0)
    rate: Number = number(1.0)
    axis: Axis = 0

    def __post_init__(self):
        low = check_number("MinMaxNorm", "min_value", self.min_value, low=0)
        high = check_number("MinMaxNorm", "max_value", self.max_value, low=0)
        check_number("MinMaxNorm", "rate", self.rate, low=0, high=1)
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"MinMaxNorm: min_value={self.min_value!r} is above "
                f"max_value={self.max_value!r}; swap them or widen the interval."
            )
        super().__post_init__()

    def _scale(self, norm: jax.Array) -> jax.Array:
        scale = _at_most(norm, self.max_value) * _at_least(norm, self.min_value)
        rate = _value(self.rate, norm.dtype)
        return rate * scale + (1 - rate)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units whose norm is one of the bounds, up to rounding."""
        norm = self._norm(w)
        low = norm <= _value(self.min_value, norm.dtype) * (1 + 2 * _numerics.eps(w.dtype))
        return low | _reaches(norm, self.max_value, w.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class UnitNorm(_NormSet):
    """The norm of each unit is 1: ``{w : ||unit||_2 = 1}``.

    Not convex. The projection divides each unit by its norm, and is the nearest point; a
    unit of zeros has no direction and stays zero. One pass to take the norms and one to
    scale.

    The set is that of `keras.constraints.UnitNorm`.

    Args:
        axis: The axes along which one unit runs, as for `MaxNorm`.

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

    axis: Axis = 0

    def _scale(self, norm: jax.Array) -> jax.Array:
        # Only the value snaps to 1: the derivative at a unit vector is that of w / ||w||.
        error = jnp.where(jnp.abs(norm - 1) <= _tolerance(norm), 1 - norm, 0)
        norm = norm + jax.lax.stop_gradient(error)
        return 1 / jnp.where(_is_zero(norm), 1, norm)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """All units but those of zeros."""
        return self._norm(w) > 0


def _reaches(norm: jax.Array, bound: Number, dtype: jnp.dtype) -> jax.Array:
    """Whether a norm is at or above a bound, as far as `dtype` can tell."""
    return norm >= _value(bound, norm.dtype) * (1 - 2 * _numerics.eps(dtype))


@functools.partial(jax.jit, static_argnums=1)
def _wait(after: jax.Array, limit: float) -> jax.Array:
    """The limit or half of it: either will do, but on the CPU it is not known before `after`.

    XLA's CPU backend drops optimization barriers, and keeps candidates of many leaves at once
    if nothing orders them.
    """
    return jax.lax.platform_dependent(
        after,
        cpu=lambda after: jnp.where(after >= 0, limit, limit / 2),
        default=lambda after: jnp.full((), limit, jnp.result_type(limit)),
    )


def _square_limit(dtype: jnp.dtype, size: int) -> float:
    """A power of two: twice it can be squared and summed `size` times without overflow."""
    return 2.0 ** ((int(jnp.finfo(dtype).maxexp) - size.bit_length() - 3) // 2)
