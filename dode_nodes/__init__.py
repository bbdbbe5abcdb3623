"""D-ODE solvers: few-step samplers distilled from many-step ones, one λ per network evaluation.

Imports no host. Inside ComfyUI the pack's root module brings the nodes; see ``dode_nodes.hosts``.
"""

from .distill import distill
from .errors import DodeError, IneligibleSampler, TableError
from .groups import Group, Progress
from .refine import Plan, plan_refinement, refine
from .sample import sample_dode
from .table import LambdaRow, LambdaTable, Match
from .teacher import Targets, run_teacher

__version__ = "0.1.0"

__all__ = [
    "DodeError",
    "Group",
    "IneligibleSampler",
    "LambdaRow",
    "LambdaTable",
    "Match",
    "Plan",
    "Progress",
    "TableError",
    "Targets",
    "distill",
    "plan_refinement",
    "refine",
    "run_teacher",
    "sample_dode",
]
