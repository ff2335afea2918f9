"""Least squares with numbers that may not be negative, for all units at once."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_constraints._sharding import vary_like


class Minimum(NamedTuple):
    """What a quadratic has where some numbers are free and all others zero."""

    numbers: jax.Array
    near: jax.Array
    """How far below zero a number may be, from rounding."""
    slopes: jax.Array
    """Along the numbers that are zero."""
    noise: jax.Array
    """How far below zero a slope may be."""


QUICK = 16
"""How many steps exchange all that is wrong at once."""

PATIENT = 32
"""After how many steps slopes count for more and more noise, lest rounding goes in circles."""


def free_numbers(
    solve: Callable[[jax.Array], Minimum],
    start: tuple[jax.Array, jax.Array],
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
        solve: From which numbers are free to the minimum.
        start: The numbers at first, and which are free.
        axis: The axis of the numbers of one unit.
        limit: How many steps there are at most.
        enter: Which of those that would lower the function enter.

    Returns:
        The numbers, and which are free.
    """

    def step(state):
        i, (numbers, free), _ = state
        new, near, slopes, noise = solve(free)
        noise = noise * jnp.square(jnp.maximum(i / PATIENT, 1)).astype(noise.dtype)
        negative = free & (new < -near)
        wanted = ~free & (slopes < -noise)
        way = jnp.where(negative, numbers - new, 1)
        share = jnp.where(negative, numbers / way, 2)
        least = jnp.min(share, axis=axis, keepdims=True)
        careful = (i >= QUICK) & (least < 2)
        leaving = negative & (~careful | (share <= least))
        entering = enter(wanted, slopes) & ~careful
        numbers = jnp.where(careful, numbers + least * (new - numbers), new)
        free = (free & ~leaving) | entering
        # As a number: XLA's CPU backend compiles `any` of a matrix slowly.
        wrong = jnp.max((negative | wanted).astype(new.dtype))
        return i + 1, (jnp.where(free, jnp.maximum(numbers, 0), 0), free), wrong

    first = 0, start, vary_like(jnp.ones((), start[0].dtype), start[1])
    return lax.while_loop(lambda s: (s[0] < limit) & (s[2] > 0), step, first)[1]
