"""Sets that bound the Euclidean norm of each unit: one slice of the weights along `axis`.

Every projection here multiplies a unit by one number, which is exactly 1 where the unit is
allowed: such a unit comes back bit for bit, in every dtype. A norm that passes its bound only
by the rounding of its own sum (4 machine epsilons of the dtype it was taken in) is allowed.
"""

import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp

from optax_constraints import _numerics
from optax_constraints._axes import Axis, LeafLayout
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint
from optax_constraints._numbers import (
    Number,
    concrete,
    is_number,
    number,
    value,
)
from optax_constraints._text import describe
from optax_constraints.sets._norms import NormSet, at_least, at_most, exactly


@builtin(in_keras=True)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaxNorm(NormSet):
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
        return at_most(norm, self._bound(norm.dtype, at_init))

    def _bound(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array:
        return value(self.max_value, dtype, at_init)


max_norm = MaxNorm


@builtin
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaxRMS(NormSet):
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
        return at_most(norm, self._bound(norm.dtype, at_init))

    def _bound(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array:
        return value(self.max_value, dtype, at_init)


max_rms = MaxRMS


@builtin(in_keras=True)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MinMaxNorm(NormSet):
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
        scale = at_most(norm, self._bound(norm.dtype, at_init)) * at_least(norm, low)
        rate = value(self.rate, norm.dtype)
        return rate * scale + (1 - rate)

    def _bound(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array:
        return value(self.max_value, dtype, at_init)

    def _least(self, dtype: jnp.dtype, at_init: jax.Array) -> jax.Array | None:
        return value(self.min_value, dtype, at_init)

    def _reaches(self, norm: jax.Array, dtype: jnp.dtype) -> jax.Array | None:
        high = super()._reaches(norm, dtype)
        if high is None:
            return None
        low = value(self.min_value, norm.dtype) * (1 + 2 * _numerics.eps(dtype))
        return high | (norm <= low)


min_max_norm = MinMaxNorm


@builtin(in_keras=True)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class UnitNorm(NormSet):
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
        return exactly(norm, self._bound(norm.dtype, at_init))

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
class FixedNorm(NormSet):
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
        return exactly(norm, self._bound(norm.dtype, at_init))

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
