"""Weight constraints for JAX: projections, rules by path, and the lift into Optax."""

from optax_constraints._constraint import Constraint as Constraint
from optax_constraints._constraint import deserialize as deserialize
from optax_constraints._constraint import get as get
from optax_constraints._constraint import register as register
from optax_constraints._constraint import register_builtin as _register_builtin
from optax_constraints._constraint import serialize as serialize
from optax_constraints._project import ProjectState as ProjectState
from optax_constraints._project import constrain as constrain
from optax_constraints._project import project as project
from optax_constraints._project import violations as violations
from optax_constraints._report import Report as Report
from optax_constraints._report import assert_feasible as assert_feasible
from optax_constraints._report import report as report
from optax_constraints._tangent import TangentState as TangentState
from optax_constraints._tangent import tangent as tangent
from optax_constraints.sets import NM as NM
from optax_constraints.sets import Box as Box
from optax_constraints.sets import CenterAround as CenterAround
from optax_constraints.sets import Compose as Compose
from optax_constraints.sets import DoublyStochastic as DoublyStochastic
from optax_constraints.sets import FixedNorm as FixedNorm
from optax_constraints.sets import Grid as Grid
from optax_constraints.sets import HalfSpace as HalfSpace
from optax_constraints.sets import Hyperplane as Hyperplane
from optax_constraints.sets import Intersection as Intersection
from optax_constraints.sets import L1Ball as L1Ball
from optax_constraints.sets import LowRank as LowRank
from optax_constraints.sets import Mask as Mask
from optax_constraints.sets import MaxNorm as MaxNorm
from optax_constraints.sets import MaxRMS as MaxRMS
from optax_constraints.sets import MaxSpectralNorm as MaxSpectralNorm
from optax_constraints.sets import MinMaxNorm as MinMaxNorm
from optax_constraints.sets import Monotone as Monotone
from optax_constraints.sets import NonNeg as NonNeg
from optax_constraints.sets import NuclearNormBall as NuclearNormBall
from optax_constraints.sets import Orthogonal as Orthogonal
from optax_constraints.sets import Part as Part
from optax_constraints.sets import PositiveSemidefinite as PositiveSemidefinite
from optax_constraints.sets import Radial as Radial
from optax_constraints.sets import Simplex as Simplex
from optax_constraints.sets import SkewSymmetric as SkewSymmetric
from optax_constraints.sets import Soft as Soft
from optax_constraints.sets import Stacked as Stacked
from optax_constraints.sets import SumTo as SumTo
from optax_constraints.sets import Symmetric as Symmetric
from optax_constraints.sets import TopK as TopK
from optax_constraints.sets import UnitNorm as UnitNorm
from optax_constraints.sets import ZeroDiagonal as ZeroDiagonal

box = Box
center_around = CenterAround
compose = Compose
doubly_stochastic = DoublyStochastic
fixed_norm = FixedNorm
grid = Grid
half_space = HalfSpace
hyperplane = Hyperplane
intersection = Intersection
l1_ball = L1Ball
low_rank = LowRank
mask = Mask
max_norm = MaxNorm
max_rms = MaxRMS
max_spectral_norm = MaxSpectralNorm
min_max_norm = MinMaxNorm
monotone = Monotone
nm = NM
non_neg = NonNeg
nuclear_norm_ball = NuclearNormBall
orthogonal = Orthogonal
part = Part
positive_semidefinite = PositiveSemidefinite
radial = Radial
simplex = Simplex
skew_symmetric = SkewSymmetric
soft = Soft
stacked = Stacked
sum_to = SumTo
symmetric = Symmetric
top_k = TopK
unit_norm = UnitNorm
zero_diagonal = ZeroDiagonal

for _cls in (Constraint, MaxNorm, MinMaxNorm, NonNeg, UnitNorm):
    _register_builtin(_cls, in_keras=True)
for _cls in (
    Box,
    CenterAround,
    Compose,
    DoublyStochastic,
    FixedNorm,
    Grid,
    HalfSpace,
    Hyperplane,
    Intersection,
    L1Ball,
    LowRank,
    Mask,
    MaxRMS,
    MaxSpectralNorm,
    Monotone,
    NM,
    NuclearNormBall,
    Orthogonal,
    Part,
    PositiveSemidefinite,
    Radial,
    Simplex,
    SkewSymmetric,
    Soft,
    Stacked,
    SumTo,
    Symmetric,
    TopK,
    ZeroDiagonal,
):
    _register_builtin(_cls)

__version__ = "0.1.0"
