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
from optax_constraints._report import report as report
from optax_constraints.sets import MaxNorm as MaxNorm
from optax_constraints.sets import MinMaxNorm as MinMaxNorm
from optax_constraints.sets import NonNeg as NonNeg
from optax_constraints.sets import Stacked as Stacked
from optax_constraints.sets import UnitNorm as UnitNorm

max_norm = MaxNorm
min_max_norm = MinMaxNorm
non_neg = NonNeg
stacked = Stacked
unit_norm = UnitNorm

for _cls in (Constraint, MaxNorm, MinMaxNorm, NonNeg, UnitNorm):
    _register_builtin(_cls, in_keras=True)
_register_builtin(Stacked)

__version__ = "0.1.0"
