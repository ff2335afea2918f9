"""Sets of sequences whose slopes do not fall, or do not rise."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from optax_constraints import _numerics
from optax_constraints._axes import Axis
from optax_constraints._config import builtin
from optax_constraints._gauge import Gauge
from optax_constraints._numerics import is_readable
from optax_constraints._sharding import automatic, vary_like
from optax_constraints._text import describe, shown
from optax_constraints.sets._active_set import Minimum, free_numbers
from optax_constraints.sets._common import LineSet
from optax_constraints.sets.isotonic import are_finite


class _Bent(LineSet):
    """What convex and concave sequences share."""

    convex: ClassVar[bool] = True
    sign: ClassVar[int]
    """1 if slopes do not fall, and -1 if they do not rise."""

    axis: Axis
    knots: Any

    def __post_init__(self):
        if self.knots is not None:
            object.__setattr__(self, "knots", _check_knots(type(self).__name__, self.knots))
        super().__post_init__()

    def _check(self, path: str | None, shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
        axis = super()._check(path, shape, axes)
        if self.knots is not None and len(self.knots) != shape[axis]:
            raise ValueError(
                f"{type(self).__name__} on {describe(path, shape)}: there are {len(self.knots)} "
                f"knots, and {shape[axis]} entries along axis {axis}; write a knot for each entry, "
                "or another axis."
            )
        return axis

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; computes in float32 or wider."""
        w = jnp.asarray(w)
        wide, axes = self._widen(w)
        axis = self._check(None, w.shape, axes)
        if not w.size:
            return w

        def onto(w: jax.Array, gaps: jax.Array) -> jax.Array:
            return _by_columns(lambda w: _onto_convex(w, gaps), axis, w)

        target = automatic(onto, self.sign * wide, self._gaps(wide.shape[axis], wide.dtype))
        return (self.sign * target).astype(w.dtype)

    def _gaps(self, n: int, dtype: jnp.dtype) -> jax.Array:
        """The distances between knots, with 1 as the largest."""
        if self.knots is None:
            return jnp.ones(max(n - 1, 0), dtype)
        gaps = jnp.diff(jnp.asarray(self.knots, dtype))
        return gaps / jnp.max(gaps, initial=jnp.finfo(dtype).tiny)

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        """The vector, with slopes that do not fall where those of the weights are equal."""
        del memory
        axis = self._check(None, w.shape, self._widen(w)[1])
        if w.shape[axis] < 3 or not w.size:
            return v
        rounding = 4 * _numerics.eps(w.dtype)

        def along(w: jax.Array, v: jax.Array, gaps: jax.Array, slack: jax.Array) -> jax.Array:
            def columns(w: jax.Array, v: jax.Array) -> jax.Array:
                return _fitted(v, gaps, _bends(w, gaps) <= _near(w, gaps, rounding, slack))

            return _by_columns(columns, axis, w, v)

        gaps = self._gaps(v.shape[axis], v.dtype)
        return self.sign * automatic(
            along, self.sign * w.astype(v.dtype), self.sign * v, gaps, slack
        )

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """By how much slopes rise (fall, for concave ones) from each knot to the next."""
        del memory
        wide, axes = self._widen(w)
        axis = self._check(None, w.shape, axes)
        columns = jnp.moveaxis(self.sign * wide, axis, 0).reshape(w.shape[axis], -1)
        bends = _bends(columns, self._gaps(w.shape[axis], wide.dtype))
        return Gauge("changes of slope", bends, 0.0)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units with two equal slopes, up to rounding."""
        wide, axes = self._widen(w)
        axis = self._check(None, w.shape, axes)
        rounding = 4 * _numerics.eps(w.dtype)

        def straight(w: jax.Array, gaps: jax.Array) -> jax.Array:
            w = jnp.moveaxis(w, axis, 0)
            columns = w.reshape(len(w), -1)
            near = _bends(columns, gaps) <= _near(columns, gaps, rounding, 0.0)
            found = jnp.any(near, axis=0).reshape(1, *w.shape[1:])
            return jnp.moveaxis(found, 0, axis)

        gaps = self._gaps(w.shape[axis], wide.dtype)
        return automatic(straight, self.sign * wide, gaps, spec=PartitionSpec())


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class ConvexSequence(_Bent):
    """Slopes between neighbouring entries of each unit do not fall.

    ``{w : (w[i] - w[i-1]) / (t[i] - t[i-1]) <= (w[i+1] - w[i]) / (t[i+1] - t[i])}`` for knots
    `t`: values of a convex, piecewise linear function. Convex; the projection is convex
    regression, the nearest point, within 1e-5 of the largest entry in float32 for up to 600
    entries, and usually within 1e-6.

    The result is straight between some of its knots. For given ones it is a least squares fit, by a
    recursion forth and back along the unit. Which ones they are finds an active-set method: where
    the slope of the fit falls a knot goes, and in each stretch that the weights would bend the knot
    that gains most comes (P. Groeneboom, G. Jongbloed and J. Wellner, "The support reduction
    algorithm for computing non-parametric function estimates in mixture models", Scand. J. Stat.
    35, 2008, for all stretches at once). It ends after ``64 + 4 n`` fits of `n` entries at the
    latest; `violations` shows what is left. Other knots compile nothing again.

    Slopes that are out of order by the rounding of 8 machine epsilons of the largest entry are in
    order. A unit with an entry that is not finite becomes NaN. The derivative is that of the fit
    with the knots found; at an allowed unit, the identity.

    Cost:
        Some 3 to 30 fits of all units at once, each of ``2 n`` steps in sequence for `n` entries.

    Args:
        axis: The one axis along which slopes are taken, or `"fan_in"` where that is one.
        knots: Where the entries stand: rising numbers, one for each entry. None for equal
            distances.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `knots` is no vector, does not rise, or has an infinite entry or a NaN; if
            an axis is repeated; on a leaf, if `axis` is not one axis of it, or there is not a
            knot for each entry.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.convex_sequence()(jnp.array([0.0, 4.0, 2.0, 8.0])).round()
        Array([1., 2., 3., 8.], dtype=float32)
    """

    formula = "{ w : (uᵢ - uᵢ₋₁) / (tᵢ - tᵢ₋₁) ≤ (uᵢ₊₁ - uᵢ) / (tᵢ₊₁ - tᵢ) }"

    sign = 1

    axis: Axis = 0
    knots: Any = None


convex_sequence = ConvexSequence


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class ConcaveSequence(_Bent):
    """Slopes between neighbouring entries of each unit do not rise.

    ``{w : (w[i] - w[i-1]) / (t[i] - t[i-1]) >= (w[i+1] - w[i]) / (t[i+1] - t[i])}``: values of a
    concave, piecewise linear function. What `ConvexSequence` says of the negative holds here.

    Cost:
        That of `ConvexSequence`: some 3 to 30 fits.

    Args:
        axis: The one axis along which slopes are taken, or `"fan_in"` where that is one.
        knots: Where the entries stand: rising numbers, one for each entry. None for equal
            distances.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: As for `ConvexSequence`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.concave_sequence(knots=[0.0, 1.0, 3.0])(jnp.array([0.0, -2.0, 3.0])).round(3)
        Array([-1.286, -0.071,  2.357], dtype=float32)
    """

    formula = "{ w : (uᵢ - uᵢ₋₁) / (tᵢ - tᵢ₋₁) ≥ (uᵢ₊₁ - uᵢ) / (tᵢ₊₁ - tᵢ) }"

    sign = -1

    axis: Axis = 0
    knots: Any = None


concave_sequence = ConcaveSequence


def _check_knots(owner: str, given: Any) -> Any:
    """The knots as an array, checked as far as they are concrete."""
    what = f"{owner}: knots={shown(given)}"
    if not isinstance(given, jax.Array):
        try:
            given = np.asarray(given)
        except ValueError:
            raise ValueError(f"{what} is ragged; write one number for each entry.") from None
    if not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)):
        raise TypeError(f"{what} is not an array of real numbers.")
    if given.ndim != 1:
        raise ValueError(f"{what} has shape {given.shape}; write one number for each entry.")
    if is_readable(given):
        entries = np.asarray(given).astype(np.float64)
        if not np.all(np.isfinite(entries)) or not np.all(np.diff(entries) > 0):
            raise ValueError(f"{what} does not rise; write finite numbers, each above the last.")
    return given


def _by_columns(function: Any, axis: int, *arrays: jax.Array) -> jax.Array:
    """Calls a function with the units as columns of matrices."""
    moved = [jnp.moveaxis(array, axis, 0) for array in arrays]
    columns = function(*(array.reshape(len(array), -1) for array in moved))
    return jnp.moveaxis(columns.reshape(moved[0].shape), 0, axis)


def _bends(w: jax.Array, gaps: jax.Array) -> jax.Array:
    """By how much slopes rise at each inner knot."""
    return jnp.diff(jnp.diff(w, axis=0) / gaps[:, None], axis=0)


def _near(w: jax.Array, gaps: jax.Array, rounding: float, slack: Any) -> jax.Array:
    """Rises that count as none, beside those of the arithmetic."""
    rounding += 8 * _numerics.eps(w.dtype)
    largest = jnp.max(jnp.abs(w), axis=0, keepdims=True)
    return (rounding * largest + slack) * _stiffness(gaps)


def _stiffness(gaps: jax.Array) -> jax.Array:
    """How much a change of one entry may change the rise at a knot."""
    return (1 / gaps[1:] + 1 / gaps[:-1])[:, None]


# Compiled by itself, so that calls outside jit find the program they made before.
@jax.jit
def _onto_convex(w: jax.Array, gaps: jax.Array) -> jax.Array:
    finite = are_finite(w)
    w = jnp.where(finite, w, 0)
    if len(w) > 2:
        # As numbers: XLA's CPU backend compiles `any` slowly.
        below = (_bends(w, gaps) < -_near(w, gaps, 0.0, 0.0)).astype(w.dtype)
        outside = jnp.max(below, axis=0, keepdims=True) > 0
        every = jnp.ones((len(w) - 2, w.shape[1]), bool)
        w = lax.cond(
            jnp.max(below) > 0,
            lambda w: jnp.where(outside, _fitted(w, gaps, every), w),
            lambda w: w,
            w,
        )
    return jnp.where(finite, w, jnp.nan)


def _fitted(w: jax.Array, gaps: jax.Array, held: jax.Array) -> jax.Array:
    """The nearest columns whose slopes do not fall at the inner knots where they are `held`."""
    # What is linear is far from the rounding of what is not, and sums are of numbers up to 1.
    middle = jnp.sum(w, axis=0, keepdims=True) / len(w)
    largest = jnp.max(jnp.abs(w), axis=0, keepdims=True)
    scale = lax.stop_gradient(_numerics.power_below(largest))
    x, held = (w - middle) / scale, jnp.pad(held, _ENDS)
    bent = _where_bent(*lax.stop_gradient((x, gaps)), held)
    return _fit(x, gaps, bent, held)[0] * scale + middle


_ENDS = (1, 1), (0, 0)


def _where_bent(w: jax.Array, gaps: jax.Array, held: jax.Array) -> jax.Array:
    """At which entries the slopes of the nearest columns change, with both ends."""
    eps = _numerics.eps(w.dtype)

    def best(bent: jax.Array) -> Minimum:
        _, slope, rise, change, size = _fit(w, gaps, bent)
        near = 4 * eps * (jnp.abs(slope) + jnp.abs(slope - rise))
        return Minimum(jnp.where(held, rise, 0), near, change, eps * size)

    start = vary_like((jnp.zeros_like(w), ~held), w)
    return free_numbers(best, start, 0, 64 + 4 * len(w), _best_of_stretches)[1]


def _best_of_stretches(wanted: jax.Array, slope: jax.Array) -> jax.Array:
    """Of each stretch of neighbouring entries that are wanted the one with the least slope."""
    slope = jnp.where(wanted, slope, jnp.inf)

    def least(last: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
        now = jnp.where(slope < jnp.inf, jnp.minimum(last, slope), jnp.inf)
        return now, now

    both_ways = jnp.stack([slope, slope[::-1]], axis=1)
    _, both = lax.scan(least, jnp.full_like(both_ways[0], jnp.inf), both_ways)
    return wanted & (slope <= jnp.minimum(both[:, 0], both[::-1, 1]))


def _fit(
    w: jax.Array, gaps: jax.Array, bent: jax.Array, held: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """The least squares fit that is straight but where it is `bent`.

    What the entries from one on cost at least is a quadratic function of that entry `x` and the
    slope `s` behind it, ``(a x^2 + 2 b x s + c s^2) / 2 - p x - q s``, found from the last entry
    to the first; the fit follows from the first to the last.

    Args:
        w: The weights, a column for each unit.
        gaps: The distances between entries.
        bent: Of each entry, whether the slope may change there, as it may at both ends.
        held: Where slopes may not fall, also by rounding.

    Returns:
        The fit, the slope behind each entry, by how much that is more than the one before, how the
        cost would change with that, and the magnitudes of which this is the sum.
    """

    # What goes with `x`, `(a, p)`, and what with `s`, `(b, q)`, change in the same way. With any
    # slope the cost is that with `(a c - b^2, p c - q b) / c`: kept, as differences would round.
    def before(cost: Any, entry: Any) -> tuple[Any, Any]:
        ap, bq, c, minors, other = cost
        gap, own, bent = entry
        bq = bq + ap * gap
        c = c + (cost[1][:1] + bq[:1]) * gap
        minors = minors + other * gap
        freed = jnp.where(bent, own + minors / c, ap + own)
        rest = bq, c, minors + c * own, other + own * bq[:1] - bq
        return (freed, *(jnp.where(bent, 0, x) for x in rest)), (bq, c)

    def after(state: Any, entry: Any) -> tuple[Any, Any]:
        x, last, (missed, much), (moment, lever) = state
        gap, w, bent, (b, q), c, held = entry
        own = (q - b * x) / c
        if held is not None:
            own = jnp.where(held, jnp.maximum(own, last), own)
        slope = jnp.where(bent, own, last)
        # The moment of what is missed, of the entries behind this one or of those before it: both
        # are the same but for rounding, which goes by the sum of the magnitudes.
        behind, size = b * x + c * slope - q, abs(b * x) + abs(c * slope) + abs(q)
        moment, lever = jnp.where(bent, 0, moment), jnp.where(bent, 0, lever)
        change = jnp.where(bent, 0, jnp.where(lever < size, moment, behind))
        missed, much = missed + (x - w), much + (abs(x) + abs(w))
        moments = moment + gap * missed, lever + gap * much
        out = x, slope, slope - last, change, jnp.minimum(lever, size)
        return (x + gap * slope, slope, (missed, much), moments), out

    gaps = jnp.pad(gaps, (0, 1))
    own = jnp.stack([jnp.ones_like(w), w], axis=1)
    nothing = 0 * own[0]
    # Behind the last entry any slope is right: `c` is what it is divided by.
    behind = nothing, nothing, nothing[:1] + 1, nothing, nothing
    entries = gaps, own, bent[:, None]
    ((a, p), *_), (bq, c) = lax.scan(before, behind, entries, reverse=True)
    zero = nothing[0]
    first = p / a, zero, (zero, zero), (zero, zero)
    return lax.scan(after, first, (gaps, w, bent, bq, c[:, 0], held))[1]
