"""The sets: one family a file, without Optax and without paths."""

from optax_constraints.sets.combinators import Compose as Compose
from optax_constraints.sets.combinators import Intersection as Intersection
from optax_constraints.sets.combinators import Part as Part
from optax_constraints.sets.combinators import Soft as Soft
from optax_constraints.sets.combinators import Stacked as Stacked
from optax_constraints.sets.elementwise import Box as Box
from optax_constraints.sets.elementwise import Grid as Grid
from optax_constraints.sets.elementwise import Mask as Mask
from optax_constraints.sets.elementwise import NonNeg as NonNeg
from optax_constraints.sets.elementwise import ZeroDiagonal as ZeroDiagonal
from optax_constraints.sets.matrix import DoublyStochastic as DoublyStochastic
from optax_constraints.sets.matrix import PositiveSemidefinite as PositiveSemidefinite
from optax_constraints.sets.matrix import Radial as Radial
from optax_constraints.sets.matrix import SkewSymmetric as SkewSymmetric
from optax_constraints.sets.matrix import Symmetric as Symmetric
from optax_constraints.sets.norm import FixedNorm as FixedNorm
from optax_constraints.sets.norm import MaxNorm as MaxNorm
from optax_constraints.sets.norm import MaxRMS as MaxRMS
from optax_constraints.sets.norm import MinMaxNorm as MinMaxNorm
from optax_constraints.sets.norm import UnitNorm as UnitNorm
from optax_constraints.sets.simplex import CenterAround as CenterAround
from optax_constraints.sets.simplex import HalfSpace as HalfSpace
from optax_constraints.sets.simplex import Hyperplane as Hyperplane
from optax_constraints.sets.simplex import L1Ball as L1Ball
from optax_constraints.sets.simplex import Simplex as Simplex
from optax_constraints.sets.simplex import SumTo as SumTo
