"""D-ODE solvers: few-step samplers distilled from many-step ones, one λ per network evaluation.

Imports no host, and its own modules only when they are asked for: a host may load it with all its extensions and never
use it. Inside ComfyUI the pack's root module brings the nodes; see ``dode_nodes.hosts``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import DodeError as DodeError
    from .errors import IneligibleSampler as IneligibleSampler
    from .errors import TableError as TableError
    from .fit.distill import distill as distill
    from .fit.latents import Group as Group
    from .fit.latents import Latents as Latents
    from .fit.pipeline import Pipeline as Pipeline
    from .fit.progress import Progress as Progress
    from .fit.recipe import Recipe as Recipe
    from .fit.refine import Refinement as Refinement
    from .fit.refine import refine as refine
    from .fit.scope import Plan as Plan
    from .fit.scope import plan_refinement as plan_refinement
    from .fit.teacher import Targets as Targets
    from .fit.teacher import Teacher as Teacher
    from .fit.teacher import plan_teacher as plan_teacher
    from .fit.teacher import run_teacher as run_teacher
    from .sampling.sample import sample_dode as sample_dode
    from .tables.row import LambdaRow as LambdaRow
    from .tables.row import Match as Match
    from .tables.table import LambdaTable as LambdaTable

__version__ = "0.1.0"

_HOMES = {
    "errors": ["DodeError", "IneligibleSampler", "TableError"],
    "fit.distill": ["distill"],
    "fit.latents": ["Group", "Latents"],
    "fit.pipeline": ["Pipeline"],
    "fit.progress": ["Progress"],
    "fit.recipe": ["Recipe"],
    "fit.refine": ["Refinement", "refine"],
    "fit.scope": ["Plan", "plan_refinement"],
    "fit.teacher": ["Targets", "Teacher", "plan_teacher", "run_teacher"],
    "sampling.sample": ["sample_dode"],
    "tables.row": ["LambdaRow", "Match"],
    "tables.table": ["LambdaTable"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """What this package offers, from the module that it lives in."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
