"""Units that rise up to a peak, and fall behind it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from optax_constraints import _numerics
from optax_constraints._axes import Axis
from optax_constraints._config import builtin
from optax_constraints._sharding import automatic
from optax_constraints._text import describe, shown
from optax_constraints.sets._common import LineSet
from optax_constraints.sets.isotonic import are_finite, instead, isotonic


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Unimodal(LineSet):
    """The entries of each unit rise up to a peak, and fall behind it.

    ``{w : unit[0] <= ... <= unit[peak] >= ... >= unit[n - 1]}``. For a given `peak` the set is
    convex, and the projection is the nearest point, up to rounding. Both sides of the peak are
    sorted as by `Monotone`, and cut off at the height at which the sum of what is cut off raises
    the peak to just that height. Without a `peak` each entry may be the peak, and the set is not
    convex. The projection then tries all of them and keeps the nearest point, the first of equally
    near ones. Order is exact, to the bit. Also known as unimodal regression (Q. Stout, "Unimodal
    regression via prefix isotonic regression", Comput. Stat. Data Anal. 53, 2008).

    A unit with an entry that is not finite becomes NaN. The derivative is that for the peak found;
    at an allowed unit, the identity.

    Cost:
        That of `Monotone`, and without a peak `n` times that for units of `n` entries. The `n` fits
        run one after the other, and only if a unit is outside.

    Args:
        axis: The one axis along which entries have an order, or `"fan_in"` where that is one.
        peak: The place of the largest entry, counted from 0, or from the end if negative; None
            for any.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an axis is repeated; on a leaf, if `axis` is not one axis of it, or there is
            no entry at `peak`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.unimodal()(jnp.array([0.0, 2.0, 1.0, 3.0, 1.0]))
        Array([0. , 1.5, 1.5, 3. , 1. ], dtype=float32)
        >>> oc.unimodal(peak=0)(jnp.array([0.0, 2.0, 1.0, 3.0, 1.0]))
        Array([1.5, 1.5, 1.5, 1.5, 1. ], dtype=float32)
    """

    axis: Axis = 0
    peak: int | None = None

    def __post_init__(self):
        if isinstance(self.peak, bool) or not isinstance(self.peak, (int, type(None))):
            raise TypeError(
                f"Unimodal: peak={shown(self.peak)} is not an int; write the place of the largest "
                "entry, or None for any."
            )
        super().__post_init__()

    @property
    def convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the peak is given."""
        return self.peak is not None

    def _check(self, path: str | None, shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
        axis = super()._check(path, shape, axes)
        n = shape[axis]
        if self.peak is not None and n and not -n <= self.peak < n:
            raise ValueError(
                f"Unimodal on {describe(path, shape)}: peak={self.peak} is none of the {n} entries "
                f"along axis {axis}; write one from 0 to {n - 1}, or None for any."
            )
        return axis

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; computes in float32 or wider."""
        w = jnp.asarray(w)
        wide, axes = self._widen(w)
        axis = self._check(None, w.shape, axes)
        if not w.size:
            return w
        n = w.shape[axis]
        peak = None if self.peak is None else self.peak % n

        def onto(w: jax.Array) -> jax.Array:
            moved = jnp.moveaxis(w, axis, 0)
            new = _onto_unimodal(moved.reshape(n, -1), peak)
            return jnp.moveaxis(new.reshape(moved.shape), 0, axis)

        return automatic(onto, wide).astype(w.dtype)

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        """The vector, in order where neighbours are equal, for a peak that is given."""
        del memory
        axis = self._check(None, w.shape, self._widen(w)[1])
        n = w.shape[axis]
        if n < 2 or not w.size:
            return v
        peak = (self.peak or 0) % n
        rounding = 4 * _numerics.eps(w.dtype)

        def along(w: jax.Array, v: jax.Array, slack: jax.Array) -> jax.Array:
            a, b = (jnp.moveaxis(x, axis, 0) for x in (w, v))
            columns = a.reshape(n, -1)
            largest = jnp.max(jnp.abs(columns), axis=0, keepdims=True)
            apart = jnp.abs(jnp.diff(columns, axis=0)) > rounding * largest + slack
            new = _ordered(b.reshape(n, -1), jnp.full((1, 1), peak), apart)
            return jnp.moveaxis(new.reshape(b.shape), 0, axis)

        return automatic(along, w.astype(v.dtype), v, slack)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units with two equal neighbours."""
        axis = self._check(None, w.shape, self._widen(w)[1])

        def tied(w: jax.Array) -> jax.Array:
            return jnp.any(jnp.diff(w, axis=axis) == 0, axis=axis, keepdims=True)

        return automatic(tied, w, spec=PartitionSpec())

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The set in symbols."""
        if self.peak is None:
            return "{ w : u₁ ≤ … ≤ uₚ ≥ … ≥ uₙ for some p }"
        return "{ w : u[0] ≤ … ≤ u[{peak}] ≥ … ≥ u[n - 1] }"


unimodal = Unimodal


# Compiled by itself, so that calls outside jit find the program they made before.
@functools.partial(jax.jit, static_argnums=1)
def _onto_unimodal(w: jax.Array, peak: int | None) -> jax.Array:
    finite = are_finite(w)
    w = jnp.where(finite, w, 0)
    rises = jnp.diff(w, axis=0)
    if peak is None:
        place = np.arange(len(w), dtype=w.dtype)[:, None]
        highest = w == jnp.max(w, axis=0, keepdims=True)
        first = jnp.min(jnp.where(highest, place, len(w)), axis=0, keepdims=True)
        wrong = jnp.where(place[1:] <= first, rises < 0, rises > 0)
        allowed = jnp.sum(wrong.astype(w.dtype), axis=0, keepdims=True) == 0
        new = lax.cond(jnp.all(allowed), lambda w: w, _onto_any, w)
    else:
        sign = jnp.where(jnp.arange(len(rises)) < peak, 1, -1)[:, None].astype(w.dtype)
        allowed = jnp.all(sign * rises >= 0, axis=0, keepdims=True)
        new = _ordered(w, jnp.full((1, 1), peak), None)
    return jnp.where(finite, jnp.where(allowed, w, new), jnp.nan)


def _onto_any(w: jax.Array) -> jax.Array:
    """The nearest columns that rise to some peak each and fall behind it."""
    fixed = lax.stop_gradient(w)
    # Squares of huge and of tiny numbers are none. A power of two, so that nothing rounds.
    scale = _numerics.power_of_two(jnp.max(jnp.abs(fixed), axis=0, keepdims=True))
    scaled = fixed * scale

    def better(peak: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        near, where, nearest = best
        peak = jnp.asarray(peak, jnp.int32)
        new = _ordered(scaled, jnp.broadcast_to(peak, (1, 1)), None)
        distance = jnp.sum(jnp.square(new - scaled), axis=0, keepdims=True)
        closer = distance < near
        near, where = jnp.where(closer, distance, near), jnp.where(closer, peak, where)
        return near, where, jnp.where(closer, new, nearest)

    start = jnp.full_like(scale, jnp.inf), jnp.zeros_like(scale, jnp.int32), scaled
    _, peak, nearest = lax.fori_loop(0, len(w), better, start)
    # The fit for that peak is compiled only for its derivative.
    return instead(nearest / scale, _ordered(w, peak, None))


def _ordered(w: jax.Array, peak: jax.Array, apart: jax.Array | None) -> jax.Array:
    """The nearest columns that rise to a peak and fall behind it.

    With `apart`, only neighbours that are not so have an order.
    """
    place = np.arange(len(w), dtype=np.int32)[:, None]
    before, is_peak = place < peak, place == peak
    sides = jnp.where(before, 0, jnp.where(is_peak, 1, 2))
    runs = sides
    linked = ~is_peak
    if apart is not None:
        steps = jnp.cumsum(apart.astype(jnp.int32), axis=0)
        steps = jnp.concatenate([jnp.zeros_like(steps[:1]), steps])
        linked &= steps == jnp.sum(jnp.where(is_peak, steps, 0), axis=0, keepdims=True)
        runs = 3 * steps + sides
    sign = jnp.where(place > peak, -1, 1).astype(w.dtype)
    sides_sorted = sign * isotonic(sign * w, 0, runs)
    own = jnp.sum(jnp.where(is_peak, w, 0), axis=0, keepdims=True)
    top = _top(own, sides_sorted, linked)
    return jnp.where(is_peak, top, jnp.where(linked, jnp.minimum(sides_sorted, top), sides_sorted))


def _top(own: jax.Array, others: jax.Array, linked: jax.Array) -> jax.Array:
    """What an entry becomes to which others are cut off: it rises by what they lose in all.

    Newton's method from below: what is above it only falls, and where none does it is there.
    """

    def mean(own: jax.Array, others: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
        above = linked & (others > level)
        # As numbers: XLA's CPU backend compiles sums of integers slowly.
        count = jnp.sum(above.astype(own.dtype), axis=0, keepdims=True)
        excess = jnp.where(above, others - own, 0)
        return own + jnp.sum(excess, axis=0, keepdims=True) / (count + 1), count

    fixed = lax.stop_gradient((own, others))

    def step(state):
        level, last = state
        further, count = mean(*fixed, level)
        # What has settled stays: by rounding, an entry at the level could come and go.
        going = count < last
        return jnp.where(going, further, level), jnp.where(going, count, 0)

    start = fixed[0], jnp.full_like(own, len(others) + 1)
    level = lax.while_loop(lambda state: jnp.max(state[1]) > 0, step, start)[0]
    # Of a loop there is no derivative in reverse.
    return instead(level, mean(own, others, level)[0])
