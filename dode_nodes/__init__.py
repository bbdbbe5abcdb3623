"""D-ODE solvers: few-step samplers distilled from many-step ones, one λ per network evaluation.

Imports no host. Inside ComfyUI the pack's root module brings the nodes; see ``dode_nodes.hosts``.
"""

from .errors import DodeError, IneligibleSampler, TableError
from .fit.distill import distill
from .fit.latents import Group, Latents
from .fit.pipeline import Pipeline, Recipe
from .fit.progress import Progress
from .fit.refine import Refinement, refine
from .fit.scope import Plan, plan_refinement
from .fit.teacher import Targets, Teacher, plan_teacher, run_teacher
from .sampling.sample import sample_dode
from .tables.row import LambdaRow, Match
from .tables.table import LambdaTable

__version__ = "0.1.0"

__all__ = [
    "DodeError",
    "Group",
    "IneligibleSampler",
    "LambdaRow",
    "LambdaTable",
    "Latents",
    "Match",
    "Pipeline",
    "Plan",
    "Progress",
    "Recipe",
    "Refinement",
    "TableError",
    "Targets",
    "Teacher",
    "distill",
    "plan_refinement",
    "plan_teacher",
    "refine",
    "run_teacher",
    "sample_dode",
]
