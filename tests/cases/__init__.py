"""One entry for each set of the library, over which the tests of its promises run."""

import dataclasses

import jax
import jax.numpy as jnp

import optax_constraints as oc
from cases import (
    combinators,
    elementwise,
    linear,
    matrix,
    norm,
    operator,
    order,
    pattern,
    polyhedron,
    scaled,
    section,
    sequence,
    simplex,
    spectral,
)
from cases._case import DTYPES as DTYPES
from cases._case import Case as Case
from cases._case import bits as bits
from cases._case import derivatives as derivatives
from cases._case import float64 as float64
from cases._case import norms as norms

_FAMILIES = (
    *(norm, elementwise, pattern, simplex, section, linear, order, sequence, polyhedron),
    *(matrix, spectral, scaled, operator, combinators),
)
CASES = [case for family in _FAMILIES for case in family.CASES]


@dataclasses.dataclass(frozen=True, eq=False)
class Interval(oc.Constraint):
    """A user's own elementwise set: each entry in an interval."""

    elementwise = True
    low: float
    high: float

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        w = jnp.asarray(w)
        return jnp.clip(w, jnp.asarray(self.low, w.dtype), jnp.asarray(self.high, w.dtype))
