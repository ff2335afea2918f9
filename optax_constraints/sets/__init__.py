"""The sets: one family a file, without Optax and without paths."""

from optax_constraints.sets.combinators import Stacked as Stacked
from optax_constraints.sets.elementwise import NonNeg as NonNeg
from optax_constraints.sets.norm import MaxNorm as MaxNorm
from optax_constraints.sets.norm import MinMaxNorm as MinMaxNorm
from optax_constraints.sets.norm import UnitNorm as UnitNorm
