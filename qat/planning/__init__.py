"""Planning: how many bits each layer gets within a budget."""

from qat.planning.budget import UNITS, Budget, Solution, pareto, solve
from qat.planning.candidates import Candidate, PlannedLayer, integers, planned_layers, storage
from qat.planning.locks import FUSED, lock_groups
from qat.planning.picture import draw
from qat.planning.plan import Plan, plan
from qat.planning.rounding import ROUNDINGS
from qat.planning.scheme_yaml import write_scheme
from qat.planning.sensitivity import SIGNALS, sensitivity

__all__ = [
    "FUSED",
    "ROUNDINGS",
    "SIGNALS",
    "UNITS",
    "Budget",
    "Candidate",
    "Plan",
    "PlannedLayer",
    "Solution",
    "draw",
    "integers",
    "lock_groups",
    "pareto",
    "plan",
    "planned_layers",
    "sensitivity",
    "solve",
    "storage",
    "write_scheme",
]
