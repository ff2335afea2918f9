"""The intersection of convex sets."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from optax_constraints import _numerics
from optax_constraints._axes import settle_axis
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint, axis_names, tangent_at
from optax_constraints._text import as_int, shown
from optax_constraints.sets.combinators import Several


@builtin
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Intersection(Several):
    """Weights lie in all of several convex sets: ``{w : w in A, w in B}``.

    Convex; the projection is the nearest point that they share. By the method of R. L. Dykstra (J.
    P. Boyle and R. L. Dykstra, "A method for finding projections onto the intersection of convex
    sets in Hilbert spaces", 1986): the sets are projected onto in turn, each time with what the
    same set took away the last time added again. Rounds have momentum, which starts anew when a
    round goes back (A. Chambolle, P. Tan and S. Vaiter, "Accelerated alternating descent methods
    for Dykstra-like problems", J. Math. Imaging Vis. 59, 2017; B. O'Donoghue and E. Candes,
    "Adaptive restart for accelerated gradient schemes", Found. Comput. Math. 15, 2015).

    It ends when nothing changes any more, as far as the dtype can tell, or after `iterations`
    rounds. Near the sets, as in training, some ten rounds do. Far away, or where sets meet at
    a flat angle, 200 may not: then the last set holds up to rounding and the others do not yet.
    `violations` of each set shows by how much, and that of the intersection how far another
    call would go. For 50 entries that sum to 1 in [0, 0.3], the sum is
    off by 2e-5 after 200 rounds from normal weights of scale 1, and by up to 6% from scale 30.
    Name first the set that takes away most, and give it more `iterations`.

    If the sets share no point the result means nothing. The derivative takes all `iterations`,
    unless the weights are allowed.

    Cost:
        Some ten rounds of all the projections in training. Each set needs memory for two leaves.

    Args:
        *constraints: Two or more convex ones, of anything that `get` accepts.
        iterations: How many rounds there are at most.

    Raises:
        TypeError: If `iterations` is not an int.
        ValueError: If there are fewer than two constraints, or one is not convex; if
            `iterations` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> both = oc.intersection(oc.center_around(1.0), oc.non_neg())
        >>> both(jnp.array([3.0, 2.0, -3.0])).round(4)
        Array([2., 1., 0.], dtype=float32)
    """

    formula = "{constraints: ∩ }"

    constraints: tuple[Constraint, ...]
    iterations: int = 200

    def __init__(self, *constraints: Any, iterations: int = 200):
        """Takes the constraints as they are named in a rule."""
        self._take(constraints)
        for constraint in self.constraints:
            if not constraint.convex:
                raise ValueError(
                    f"Intersection: {constraint} is not known to be convex, so that the nearest "
                    "point of an intersection cannot be found (Soft, and a rate below 1, are no "
                    "projections either); write Compose, or set convex = True in a class of your "
                    "own."
                )
            if names := axis_names(constraint):
                raise ValueError(
                    f"Intersection: {constraint} sums over {names[0]!r}, an axis of a mesh, and "
                    "devices would take different numbers of rounds; project outside of "
                    "jax.shard_map, without axis_name."
                )
        try:
            count = as_int(iterations)
        except TypeError:
            raise TypeError(
                f"Intersection: iterations={shown(iterations)} is not an int; write a number of "
                "rounds."
            ) from None
        if not 1 <= count <= 10**9:
            raise ValueError(
                f"Intersection: iterations={count} is not allowed; write a number of at least 1."
            )
        object.__setattr__(self, "iterations", count)

    convex = True

    @property
    def smooth(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all of them are planes, which a smooth convex set is."""
        return all(c.smooth for c in self.constraints)

    @property
    def has_tangent(self) -> bool:
        """Whether all of them have."""
        return all(c.has_tangent for c in self.constraints)

    def tangent(
        self,
        w: jax.typing.ArrayLike,
        v: jax.typing.ArrayLike,
        memory: Any = (),
        *,
        slack: jax.typing.ArrayLike = 0.0,
    ) -> jax.Array:
        """What the cones of all of them share, by the method that projects onto the sets.

        An entry or a unit counts as at a bound if it is near to it by 64 machine epsilons of the
        largest weight.
        """
        w, v = jnp.asarray(w), jnp.asarray(v)
        wide = v.astype(_numerics.compute_dtype(w.dtype, v.dtype))
        largest = jnp.max(jnp.abs(w), initial=0).astype(wide.dtype)
        slack = jnp.maximum(slack, 64 * _numerics.eps(w.dtype) * largest)
        along = _nearest_of_cones(self, self._each(memory), w, wide, slack)
        return along.astype(v.dtype)

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Projects one floating-point array; computes in float32 or wider."""
        wide = w.astype(_numerics.compute_dtype(w.dtype))
        return _nearest_of_all(self, self._each(memory), wide).astype(w.dtype), memory


intersection = Intersection


# Compiled by itself, so that calls outside jit find the program they made before.
@jax.jit
def _nearest_of_cones(
    intersection: Intersection, memory: Any, w: jax.Array, v: jax.Array, slack: jax.Array
) -> jax.Array:
    def onto(constraint: Constraint, own: Any) -> Callable[[jax.Array], jax.Array]:
        return lambda v: tangent_at(constraint, w, v, own, slack)

    return dykstra(intersection, memory, v, onto=onto)


# Compiled by itself, so that calls outside jit find the program they made before.
@jax.jit
def _nearest_of_all(intersection: Intersection, memory: Any, w: jax.Array) -> jax.Array:
    x = dykstra(intersection, memory, jax.lax.stop_gradient(w))
    if intersection.smooth:
        return _on_flats(intersection, memory, w, x)
    # Allowed points, and what counts as allowed: there the rounds have nothing to do.
    slack = 64 * _numerics.eps(w.dtype) * jnp.max(jnp.abs(w), initial=0)
    allowed = jnp.all(jnp.abs(x - w) <= slack)
    return jax.lax.cond(allowed, _on_flats, _by_rounds, intersection, memory, w, x)


@jax.custom_jvp
def _by_rounds(intersection: Intersection, memory: Any, w: jax.Array, x: jax.Array) -> jax.Array:
    """The projection `x` of `w`, whose derivative is that of all the rounds.

    Not of as many as the point needed: close to the set that may be few.
    """
    del intersection, memory, w
    return x


@_by_rounds.defjvp
def _by_rounds_jvp(primals: Any, tangents: Any) -> Any:
    all_rounds = functools.partial(dykstra, all_rounds=True)
    return _by_rounds(*primals), jax.jvp(all_rounds, primals[:3], tangents[:3])[1]


class _Rounds(NamedTuple):
    """What one round of Dykstra's method hands to the next."""

    x: jax.Array
    taken: tuple[jax.Array, ...]
    """What each set takes away; with `x` they make up the weights."""
    before: tuple[jax.Array, ...]
    """What they took away a round before."""
    pace: jax.Array
    """Nesterov's sequence for each unit, from which its momentum follows."""
    dual: jax.Array
    """The dual objective of each unit, which a round without momentum never lowers."""
    changed: jax.Array
    number: jax.Array


PLAIN_ROUNDS = 10
"""How many rounds go without momentum, which would only disturb where few are enough."""


def _advance(constraint: Constraint, own: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda w: constraint.advance(w, own)[0]


def dykstra(
    intersection: Intersection,
    memory: Any,
    w: jax.Array,
    all_rounds: bool = False,
    onto: Callable[[Constraint, Any], Callable[[jax.Array], jax.Array]] = _advance,
) -> jax.Array:
    """The last round's result, with what `onto` makes of each constraint as its projection."""
    constraints = intersection.constraints
    tolerance = _numerics.eps(w.dtype) / 2
    axes = _axes_of_units(constraints, w.shape)
    largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True, initial=0)
    # The dual objective is one of squares.
    unit = 1 / jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)

    def round_(last: _Rounds) -> _Rounds:
        pace = (1 + jnp.sqrt(1 + 4 * jnp.square(last.pace))) / 2
        momentum = (last.pace - 1) / pace
        ahead = [momentum * (q - p) for q, p in zip(last.taken, last.before, strict=True)]
        x, dual = last.x - sum(ahead), jnp.zeros_like(last.dual)
        changed, taken = jnp.any(x != x), []
        for constraint, own, q, step in zip(constraints, memory, last.taken, ahead, strict=True):
            before = q + step
            y = x + before
            x = onto(constraint, own)(y)
            # Increments settle before the point does, or after: both have to stand still.
            size = jnp.max(jnp.nan_to_num(jnp.abs(y)), axis=axes, keepdims=True, initial=0)
            limit = tolerance * size
            changed |= jnp.any(jnp.abs((y - x) - before) > limit)
            taken.append(y - x)
            dual -= jnp.sum(((y - x) * unit) * (x * unit), axis=axes, keepdims=True)
        total = sum(taken) * unit
        dual += jnp.sum((w * unit - total / 2) * total, axis=axes, keepdims=True)
        # Where it is NaN, too, there is no momentum.
        rises = (dual >= last.dual) & (last.number >= PLAIN_ROUNDS)
        pace = jnp.where(rises, pace, 1)
        return _Rounds(x, tuple(taken), last.taken, pace, dual, changed, last.number + 1)

    none = (jnp.zeros_like(w),) * len(constraints)
    zero = jnp.sum(none[0], axis=axes, keepdims=True)
    lowest = zero - jnp.finfo(w.dtype).max
    first = jnp.zeros((), jnp.int32)
    start = _Rounds(w, none, none, zero + 1, lowest, jnp.any(w == w), first)
    most = intersection.iterations
    if all_rounds:  # with a reverse mode
        return jax.lax.scan(lambda last, _: (round_(last), None), start, length=most)[0].x
    return jax.lax.while_loop(lambda last: (last.number < most) & last.changed, round_, start).x


def _axes_of_units(constraints: tuple[Constraint, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of what all constraints together project by itself."""
    axes: set[int] = set()
    for constraint in constraints:
        if constraint.unitwise:
            axes |= {*settle_axis(type(constraint).__name__, cast(Any, constraint).axis, shape)}
        elif not constraint.elementwise:
            return tuple(range(len(shape)))
    return tuple(sorted(axes))


@jax.custom_jvp
def _on_flats(intersection: Intersection, memory: Any, w: jax.Array, x: jax.Array) -> jax.Array:
    """The projection `x` of `w`, where each derivative is itself an orthogonal projection.

    So it is at allowed points, onto the tangent spaces of flat sets and the whole space for
    others. What they share is the null space of the sum of what they take away, and conjugate
    gradients find the nearest point of that.
    """
    del intersection, memory, w
    return x


@_on_flats.defjvp
def _on_flats_jvp(primals: Any, tangents: Any) -> Any:
    intersection, memory, _, x = primals
    dintersection, dmemory, dw, _ = tangents

    def taken(intersection: Intersection, memory: Any, x: jax.Array) -> jax.Array:
        """What the projections take from a point, in all."""
        parts = zip(intersection.constraints, memory, strict=True)
        return sum((x - c.advance(x, own)[0] for c, own in parts), start=jnp.zeros_like(x))

    def linear(v: jax.Array) -> jax.Array:
        return jax.jvp(functools.partial(taken, intersection, memory), (x,), (v,))[1]

    _, excess = jax.jvp(taken, (intersection, memory, x), (dintersection, dmemory, dw))

    def solve(linear: Any, b: jax.Array) -> jax.Array:
        # Not for b itself, of which the null space has a share in reverse mode.
        return _conjugate_gradients(linear, _conjugate_gradients(linear, linear(b)))

    share = jax.lax.custom_linear_solve(linear, excess, solve, symmetric=True)
    return _on_flats(*primals), dw - share


def _conjugate_gradients(linear: Callable[[jax.Array], jax.Array], b: jax.Array) -> jax.Array:
    """The least solution of a symmetric, semidefinite system that has one.

    Not `jax.scipy.sparse.linalg.cg`: once the residual is rounding, steps along the null space
    are unbounded. So this ends there, and returns the best that it has seen.
    """
    enough = (4 * _numerics.eps(b.dtype)) ** 2 * _dot(b, b)

    def going(state: Any) -> jax.Array:
        k, _, _, _, square, _, least = state
        return (k < 100) & (square > enough) & (square < 100 * least)

    def step(state: Any) -> Any:
        k, x, residual, direction, square, best, least = state
        image = linear(direction)
        length = _dot(direction, image)
        size = square / jnp.where(length > 0, length, 1)
        x, residual = x + size * direction, residual - size * image
        new = _dot(residual, residual)
        direction = residual + new / square * direction
        best = jnp.where(new < least, x, best)
        return k + 1, x, residual, direction, new, best, jnp.minimum(new, least)

    zero, square = jnp.zeros_like(b), _dot(b, b)
    start = jnp.zeros((), jnp.int32), zero, b, b, square, zero, square
    return jax.lax.while_loop(going, step, start)[5]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b)
