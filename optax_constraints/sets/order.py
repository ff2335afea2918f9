"""Sets that order the entries of a unit."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_constraints import _numerics
from optax_constraints._axes import Axis
from optax_constraints._config import builtin
from optax_constraints._gauge import Gauge
from optax_constraints._sharding import automatic
from optax_constraints._text import shown
from optax_constraints.sets._common import (
    UnitSet,
)
from optax_constraints.sets.isotonic import isotonic, runs_of
from optax_constraints.sets.lattice import along_lattice, onto_lattice


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Monotone(UnitSet):
    """The entries of each unit are sorted: ``{w : unit[0] <= unit[1] <= ...}``.

    Convex; the projection is isotonic regression, exact up to rounding, and what it returns is
    sorted to the bit. A unit with an entry that is not finite becomes NaN.

    Two sorted halves merge by pooling: where ``sum(max(left - v, 0)) == sum(max(v - right, 0))``,
    whatever is above ``v`` on the left and below it on the right becomes ``v``. So pairs of
    entries merge into sorted fours, eights and so on, all units at once. Up to eights ``v`` has a
    closed form, and above it is found by Newton's method on masked sums.

    The pooling of neighbours that are out of order is that of M. Ayer et al., "An empirical
    distribution function for sampling with incomplete information", Annals of Mathematical
    Statistics 26, 1955.

    With several axes a unit is a lattice, in which entries are sorted along each of them: the
    intersection of the sets for one axis, and isotonic regression for a partial order. Dykstra's
    method with momentum projects along one axis after the other, as in `Intersection`, until
    nothing changes any more, or 1,000 times. Lattices as near to the set as in training take a
    few rounds to come to the nearest point up to rounding (1e-6 of the largest entry); 40 x 30
    entries of pure noise take some hundreds. What is returned is sorted to the bit also if the
    rounds have not been enough. Calibrated lattices are those of M. Gupta et al., "Monotonic
    calibrated interpolated look-up tables", JMLR 17, 2016. The derivative takes entries that are
    equal within 64 machine epsilons of the largest for one pool.

    Cost:
        ``log2(n)`` levels for units of `n` entries. Each level is one pass over the weights, and
        from the fourth on six to nine. Only the levels run one after the other. Along several axes,
        as many rounds of this as Dykstra's method needs: a few in training.

    Args:
        axis: The axis along which entries are sorted, or `"fan_in"`; several axes, or None, for
            lattices.
        increasing: Whether they increase; False for decreasing entries.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an axis is repeated; on a leaf, if it has no such axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.monotone()(jnp.array([1.0, 3.0, 2.0, 4.0]))
        Array([1. , 2.5, 2.5, 4. ], dtype=float32)
        >>> oc.monotone(axis=(0, 1))(jnp.array([[0.0, 3.0], [1.0, 2.0]]))
        Array([[0. , 2.5],
               [1. , 2.5]], dtype=float32)
    """

    axis: Axis = 0
    increasing: bool = True

    convex = True

    def __post_init__(self):
        if not isinstance(self.increasing, bool):
            raise TypeError(
                f"Monotone: increasing={shown(self.increasing)} is not a bool; write True or False."
            )
        super().__post_init__()

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; computes in float32 or wider."""
        w = jnp.asarray(w)
        wide, axes = self._widen(w)
        if not w.size:
            return w
        sign = 1 if self.increasing else -1
        if len(axes) == 1:
            target = automatic(lambda w: isotonic(w, axes[0]), sign * wide)
        else:
            target = automatic(lambda w: onto_lattice(w, axes), sign * wide)
        return (sign * target).astype(w.dtype)

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        """The vector, sorted where neighbours are equal, by pooling within them."""
        del memory
        axes = self._axes(w)
        many = len(axes) > 1
        if not w.size:
            return v
        sign = 1 if self.increasing else -1
        rounding = (64 if many else 4) * _numerics.eps(w.dtype)

        def along(w: jax.Array, v: jax.Array, slack: jax.Array) -> jax.Array:
            largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
            if many:
                slack = rounding * largest + slack
                return along_lattice(w, v, slack, axes)
            axis = axes[0]
            return isotonic(v, axis, runs_of(w, axis, rounding * largest + slack))

        return sign * automatic(along, sign * w.astype(v.dtype), sign * v, slack)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units with two equal neighbours."""
        axes = self._widen(w)[1]

        def tied(w: jax.Array) -> jax.Array:
            any_ = functools.partial(jnp.any, axis=axes, keepdims=True)
            return functools.reduce(
                jnp.logical_or, (any_(jnp.diff(w, axis=axis) == 0) for axis in axes)
            )

        return automatic(tied, w, spec=PartitionSpec())

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The set in symbols."""
        less = "≤" if self.increasing else "≥"
        if isinstance(self.axis, int) or (isinstance(self.axis, tuple) and len(self.axis) == 1):
            return f"{{ w : u₁ {less} u₂ {less} … {less} uₙ }}"
        return f"{{ w : uᵢ {less} uⱼ where i ≤ j }}"

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The steps from each entry of a unit to the next, upwards in an allowed one."""
        del memory
        wide, axes = self._widen(w)
        steps = [jnp.diff(wide, axis=axis).ravel() for axis in axes]
        return Gauge("steps", (1 if self.increasing else -1) * jnp.concatenate(steps), 0.0)


monotone = Monotone
