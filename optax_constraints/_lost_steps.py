"""Warnings of steps that a projection takes back, and of weights that it makes all the same."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_constraints import _numerics
from optax_constraints._constraint import Constraint
from optax_constraints._numerics import is_readable
from optax_constraints._text import warn
from optax_constraints._walk import Bindings


def warn_of_lost_steps(bound: Bindings, every: int = 1) -> None:
    """Warns of sets whose projection undoes small updates."""
    together = f"of {every} steps together that are " if every > 1 else ""
    found = ((leaf.path, leaf.constraint) for leaf in bound if leaf.constraint is not None)
    losing = [(path, constraint) for path, constraint in found if constraint.loses_steps]
    if losing:
        path, constraint = losing[0]
        more = f" and {len(losing) - 1} more" if len(losing) > 1 else ""
        warn(
            f"{_cut(constraint)} on {path!r}{more}: updates {together}shorter "
            "than half a gap between values are lost, since the projection leads back to where "
            "the weights were. Let the optimizer train these leaves free, take the loss at "
            "straight_through(params, rules), and write constrain(params, rules) for the weights "
            "to deploy."
        )


def _cut(constraint: Constraint) -> str:
    """How a warning names a set that may have many values."""
    text = str(constraint)
    return text if len(text) <= 60 else f"{text[:57]}..."


def warn_of_one_value(bound: Bindings, params: Any, new: Any) -> None:
    """Warns, where numbers can be read, of weights that a grid makes all the same."""
    before, after = jax.tree.leaves(params), jax.tree.leaves(new)
    for leaf in bound:
        if leaf.constraint is None or not leaf.constraint.loses_steps:
            continue
        both = [[leaves[place] for place in leaf.places] for leaves in (before, after)]
        sizes = [np.size(part) for part in both[0]]
        if sum(sizes) < 2 or not all(sizes) or not all(map(is_readable, both[0] + both[1])):
            continue
        (low, high), (least, most) = jax.device_get(_ranges(both))
        if least == most and low != high:
            warn(
                f"constrain: {_cut(leaf.constraint)} makes every entry of {leaf.path!r} {least:g}, "
                f"and they were from {low:.3g} to {high:.3g}. Scale the values to the weights, "
                "such as grid([-s, 0, s]) with s of the size of most of them."
            )


@jax.jit
def _ranges(both: Any) -> Any:
    """The least and the greatest entry, in float32 or wider, of each list of arrays."""
    dtype = _numerics.compute_dtype(*(part.dtype for part in jax.tree.leaves(both)))

    def ends(parts: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        wide = [part.astype(dtype) for part in parts]
        least = functools.reduce(jnp.minimum, map(jnp.min, wide))
        return least, functools.reduce(jnp.maximum, map(jnp.max, wide))

    return [ends(parts) for parts in both]
