"""Least squares with numbers that may not be negative, for all units at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from optax_constraints._sharding import vary_like

Solve = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""From which numbers are free to their best values, and to the slope along each of the others."""

QUICK = 16
"""How many steps exchange all that is wrong at once."""


def free_numbers(
    solve: Solve,
    start: jax.Array,
    tolerances: tuple[jax.Array, jax.Array],
    axis: int,
    limit: int,
    enter: Callable[[jax.Array, jax.Array], jax.Array] = lambda wanted, slope: wanted,
) -> tuple[jax.Array, jax.Array]:
    """Which numbers are positive in the minimum of a convex quadratic over non-negative numbers.

    At first whatever is negative leaves and what would lower the function enters, all at once,
    as in block principal pivoting (J. Judice and F. Pires, 1994; J. Kim and H. Park, "Fast
    nonnegative matrix factorization", SIAM J. Sci. Comput. 33, 2011). That takes few steps, but
    may go in circles. So after `QUICK` steps it goes on as C. Lawson and R. Hanson do ("Solving
    Least Squares Problems", 1974): straight to the next minimum, until a number would be
    negative, and that one leaves. No step raises the function then, and so there is an end.

    Args:
        solve: The minimum, if some numbers are free and all others zero, and the slopes.
        start: Which are free at first.
        tolerances: How far below zero a number and a slope may be, from rounding.
        axis: The axis of the numbers of one unit.
        limit: How many steps there are at most.
        enter: Which of those that would lower the function enter.

    Returns:
        Their values, and which are free.
    """
    of_number, of_slope = tolerances

    def step(state):
        i, numbers, free, _ = state
        new, slope = solve(free)
        negative = free & (new < -of_number)
        wanted = ~free & (slope < -of_slope)
        way = jnp.where(negative, numbers - new, 1)
        share = jnp.where(negative, numbers / way, 2)
        least = jnp.min(share, axis=axis, keepdims=True)
        careful = (i >= QUICK) & (least < 2)
        leaving = negative & (~careful | (share <= least))
        entering = enter(wanted, slope) & ~careful
        numbers = jnp.where(careful, numbers + least * (new - numbers), new)
        free = (free & ~leaving) | entering
        # As a number: XLA's CPU backend compiles `any` of a matrix slowly.
        wrong = jnp.max((negative | wanted).astype(new.dtype))
        return i + 1, jnp.where(free, jnp.maximum(numbers, 0), 0), free, wrong

    numbers = jnp.zeros_like(of_number + of_slope) * jnp.ones_like(start, of_number.dtype)
    first = 0, numbers, start, vary_like(jnp.ones((), numbers.dtype), start)
    return lax.while_loop(lambda s: (s[0] < limit) & (s[3] > 0), step, first)[1:3]
