"""Sets given by a threshold for each unit: simplexes and l1 balls.

A unit whose sum misses its value only by the rounding of that sum (8 machine epsilons of the
dtype it was taken in, times the sum of the magnitudes) is allowed, and comes back bit for bit.
What was moved is corrected once more by what its own sum still misses, so that it is allowed.
A unit with an infinite entry becomes NaN.

At an allowed unit the derivative is that of the inside of the set: for balls the identity, for a
simplex the projection onto the plane of its sum.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from optax_constraints import _numerics
from optax_constraints._axes import Axis
from optax_constraints._config import builtin
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import Number, number, value
from optax_constraints.sets._common import (
    InParts,
    Parts,
    Terms,
    Units,
    UnitSet,
    each,
    in_compute_dtype,
    sum_rounding,
    widen,
)
from optax_constraints.sets.linear import (
    MAX,
)

# Simplexes and l1 balls: a threshold for each unit.


def _excess(parts: Parts, total: jax.Array, units: Units) -> jax.Array:
    """By how much the sum passes `total`; near to it, without the rounding of large sums."""
    return units.sum(each(lambda x: x - total / units.size(parts), parts))


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
        return each(lambda x: x - top, read(after))

    lowest = jnp.maximum(-total, (units.sum(below_top(None)) - total) / size)
    threshold = jnp.where(free, 0, lowest)

    def step(state):
        threshold, rest, active, done = state
        threshold = jnp.where(done, threshold, threshold + rest)
        z = below_top(threshold)
        excess = _excess(each(lambda z: jnp.maximum(z - threshold, 0), z), total, units)
        cut = _apart(threshold, excess)
        now = units.count(each(lambda z: z > cut, below_top(cut)))
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
    z = each(lambda z: z - threshold, below_top(threshold))
    return each(lambda z: jnp.where(z <= least, 0, z - rest), z)


def _mean_off(dx: Parts, total: jax.Array, active: Parts, units: Units) -> Parts:
    """Shifts the active entries by the same amount to the sum `total`; all others are 0."""
    moved = units.sum(each(lambda d, a: jnp.where(a, d, 0), dx, active))
    shift = (moved - total) / jnp.maximum(units.count(active), 1).astype(moved.dtype)
    return each(lambda d, a: jnp.where(a, d - shift, 0), dx, active)


def _in_simplex(parts: Parts, total: jax.Array, units: Units) -> jax.Array:
    near = jnp.abs(_excess(parts, total, units)) <= sum_rounding(parts[0]) * total
    return near & (units.min(parts) >= 0)


# Compiled by itself, so that calls outside jit find the program they made before.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)
def _onto_simplex(terms: Terms, total: jax.Array, units: Units) -> Parts:
    parts = in_compute_dtype(terms)
    finite = (units.max(parts) < jnp.inf) & (units.min(parts) > -jnp.inf)
    free = _in_simplex(parts, total, units)
    return _shrink(functools.partial(in_compute_dtype, terms), total, free, finite, units)


@_onto_simplex.defjvp
def _onto_simplex_jvp(units, primals, tangents):
    (terms, total), (dterms, dtotal) = primals, tangents
    y = _onto_simplex(terms, total, units)
    # At a point of the set along its plane, as inside, also where an entry is zero.
    inside = _in_simplex(in_compute_dtype(terms), total, units)
    return y, _mean_off(
        in_compute_dtype(dterms), dtotal, each(lambda y: (y > 0) | inside, y), units
    )


def _in_l1_ball(parts: Parts, radius: jax.Array, units: Units) -> jax.Array:
    return _excess(each(jnp.abs, parts), radius, units) <= sum_rounding(parts[0]) * radius


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)
def _onto_l1_ball(terms: Terms, radius: jax.Array, units: Units) -> Parts:
    def magnitudes(after: jax.Array | None) -> Parts:
        return each(jnp.abs, in_compute_dtype(terms, after))

    parts = in_compute_dtype(terms)
    finite = units.max(magnitudes(None)) < jnp.inf
    shrunk = _shrink(magnitudes, radius, _in_l1_ball(parts, radius, units), finite, units)
    return each(jnp.copysign, shrunk, parts)


@_onto_l1_ball.defjvp
def _onto_l1_ball_jvp(units, primals, tangents):
    (terms, radius), (dterms, dradius) = primals, tangents
    y, dx = _onto_l1_ball(terms, radius, units), in_compute_dtype(dterms)
    sign, inside = each(jnp.sign, y), _in_l1_ball(in_compute_dtype(terms), radius, units)
    active = each(lambda y: y != 0, y)
    outside = _mean_off(each(jnp.multiply, sign, dx), dradius, active, units)
    return y, each(lambda d, s, o: jnp.where(inside, d, s * o), dx, sign, outside)


def _on_face(u: Parts, free: Parts, start: jax.Array, units: Units) -> jax.Array:
    """The threshold above which `u` sums to 0, with all that is `free` and what is above it.

    Newton's method as in `_shrink`: from a `start` below the root the iterates rise, and are
    there when no entry leaves the sum.
    """
    size = jnp.full_like(start, units.size(u) + 1, jnp.int32)

    def moved(u: Parts, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        inside = each(lambda u, free: free | (u > threshold), u, free)
        now = units.count(inside)
        rest = units.sum(each(lambda u, i: jnp.where(i, u - threshold, 0), u, inside))
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
        wide = each(functools.partial(widen, type(self).__name__), parts)
        if not units.size(parts):
            return parts
        new = self._shrunk(terms, _numerics.widest(*(part.dtype for part in wide)), units)
        return each(lambda new, w: new.astype(w.dtype), new, parts)

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

    The threshold comes from Newton's method, without a sort: C. Michelot, "A finite algorithm for
    finding the projection of a point onto the canonical simplex of R^n", J. Optim. Theory Appl. 50,
    1986; L. Condat, "Fast projection onto the simplex and the l1 ball", Math. Program. 158, 2016.

    Cost:
        About 7 Newton steps for random weights, each two sums over the weights, for all units at
        once. At most about ``12 + log2(size of a unit)`` steps in float32.

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

    formula = "{ w : u ≥ 0, Σᵢ uᵢ = {total} }"

    convex: ClassVar[bool] = True

    total: Number = number(1.0, low=0, high=MAX)
    axis: Axis = 0

    def _shrunk(self, terms: Terms, dtype: jnp.dtype, units: Units) -> Parts:
        return _onto_simplex(terms, value(self.total, dtype), units)

    def _along_parts(
        self, w: Parts, v: Parts, units: Units, memory: Any, slack: Any, rounding: float
    ) -> Parts:
        # Entries that are zero may only grow, and what the others lose they gain.
        free = each(lambda w: w > slack, w)
        level = _on_face(v, free, units.sum(v) / units.size(v), units)
        return each(lambda d, f: jnp.where(f, d - level, jnp.maximum(d - level, 0)), v, free)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units with an entry of 0."""
        wide, axis = self._widen(w)
        return jnp.any(wide <= 0, axis=axis, keepdims=True)

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The entries."""
        del memory
        return Gauge("entries", w, 0.0)


simplex = Simplex


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class L1Ball(_ThresholdSet):
    """The magnitudes of each unit sum to at most `radius`: ``{w : ||unit||_1 <= radius}``.

    Convex; the projection ``sign(unit) * max(|unit| - threshold, 0)`` is the nearest point,
    exact up to rounding, and usually sparse.

    Method: J. Duchi et al., "Efficient projections onto the l1-ball for learning in high
    dimensions", ICML 2008, with the threshold of `Simplex`.

    Cost:
        That of `Simplex` if a unit is outside, and one sum over the weights if none is.

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

    formula = "{ w : ‖u‖₁ ≤ {radius} }"

    convex: ClassVar[bool] = True

    radius: Number = number(1.0, low=0)
    axis: Axis = 0

    sign_preserving: ClassVar[bool] = True

    def _shrunk(self, terms: Terms, dtype: jnp.dtype, units: Units) -> Parts:
        return _onto_l1_ball(terms, value(self.radius, dtype), units)

    def _along_parts(
        self, w: Parts, v: Parts, units: Units, memory: Any, slack: Any, rounding: float
    ) -> Parts:
        total = units.sum(each(jnp.abs, w))
        near = 2 * rounding + sum_rounding(total)
        at_bound = total >= value(self.radius, total.dtype) * (1 - near) - slack
        # Of an entry that is zero any move is one away from it.
        sign = each(lambda w, d: jnp.sign(jnp.where(jnp.abs(w) > slack, w, d)), w, v)
        free = each(lambda w: jnp.abs(w) > slack, w)
        growth = each(jnp.multiply, sign, v)
        outwards = at_bound & (units.sum(growth) > 0)
        level = _on_face(growth, free, jnp.zeros_like(total), units)

        def along(d: jax.Array, s: jax.Array, g: jax.Array, f: jax.Array) -> jax.Array:
            kept = jnp.where(f, g - level, jnp.maximum(g - level, 0))
            return jnp.where(outwards, s * kept, d)

        return each(along, v, sign, growth, free)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units whose magnitudes sum to the radius, up to rounding."""
        wide, axis = self._widen(w)
        bound = value(self.radius, wide.dtype) * (1 - 2 * _numerics.eps(w.dtype))
        return jnp.sum(jnp.abs(wide), axis=axis, keepdims=True) >= bound

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The sums of the magnitudes of units."""
        del memory
        wide, axis = self._widen(w)
        high = value(self.radius, wide.dtype)
        return Gauge("sums of magnitudes", jnp.sum(jnp.abs(wide), axis=axis), None, high)


l1_ball = L1Ball
