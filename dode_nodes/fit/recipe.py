"""What to fit and how, and what that may come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import DodeError
from ..sampling.solvers import Sampler
from ..sigmas import is_flow
from ..tables.gate import SETTINGS, checked
from ..tables.row import PREDICTIONS
from .latents import Latents
from .quality import start_schedule
from .race import MakeSigmas, schedule_from
from .scope import Plan
from .teacher import Teacher, TeacherRun, plan_teacher


@dataclass(frozen=True)
class Recipe:
    """What to fit, and how: the settings of a fit, made and checked once, where a user gives them.

    Attributes:
        solvers: the students' samplers, by name or as functions.
        predictions: which to try; of several, the one with the smaller held-out error is kept.
        teacher: what is followed.
        refine_budget: evaluations that refining a row may cost, as a multiple of ten for each of the row's on all
            latents; 0 for none, infinity for as much as pays. Of n schedules each gets 1/√n of it.
        settings: facts to keep in the rows.
        make_sigmas: the host's schedules, among which a refinement looks for a start, and the best stock setting is
            looked for; None for those given alone.
        or_stock: whether that setting becomes a row where none of the others comes as near on the held-out latents.

    Raises:
        DodeError: one of them is invalid.
    """

    solvers: Sequence[str | Sampler] = ("euler",)
    predictions: Sequence[str] = PREDICTIONS
    teacher: Teacher = field(default_factory=Teacher)
    refine_budget: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    make_sigmas: MakeSigmas | None = None
    or_stock: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "solvers", tuple(self.solvers))
        object.__setattr__(self, "predictions", tuple(self.predictions))
        object.__setattr__(self, "settings", checked(self.settings, SETTINGS, "settings"))
        if not self.solvers:
            raise DodeError("give at least one solver to distil")
        if not self.predictions or not set(self.predictions) <= set(PREDICTIONS):
            raise DodeError(f"predictions must be among {PREDICTIONS}, not {self.predictions}")
        if not self.refine_budget >= 0:
            raise DodeError(f"the refine budget must be a number of at least 0, not {self.refine_budget}")

    def teacher_run(self, latents: Latents, schedules: Sequence[Tensor]) -> TeacherRun:
        """That serves the students on these schedules; raises what ``plan_teacher`` does.

        It divides the steps of the schedule where fits begin if nobody says otherwise: with as many steps along others
        (simple, kl_optimal) it would end several times farther from the converged solution (docs/measurements.md).
        """
        along = [self._along(sigmas) for sigmas in schedules]
        return plan_teacher(latents, schedules, self.teacher, solvers=self.solvers, along=along)

    def _along(self, sigmas: Tensor) -> Tensor:
        """The steps that it divides, see ``usual_steps``; the student's own where the host's schedules are not known."""
        if self.make_sigmas is None:
            return sigmas
        flow = is_flow(sigmas) if self.teacher.flow is None else self.teacher.flow
        return usual_steps(sigmas, self.make_sigmas, flow=flow)

    @property
    def parts(self) -> dict[str, Any]:
        """What two fits have in common here if they find the same; see ``fit.key``. All but ``make_sigmas``, which
        follows from the model."""
        teacher = self.teacher
        return {
            "solvers": self.solvers,
            "predictions": self.predictions,
            "teacher": [teacher.solver, teacher.scale, teacher.flow],
            "refine_budget": float(self.refine_budget),
            "settings": self.settings,
            "or_stock": self.or_stock,
        }


def usual_steps(sigmas: Tensor, make_sigmas: MakeSigmas, *, flow: bool) -> Tensor:
    """As many steps as a student's, on the schedule where fits begin if nobody says otherwise; the student's own where
    that begins elsewhere."""
    usual = schedule_from(float(sigmas[0]), make_sigmas, start_schedule(flow=flow), len(sigmas) - 1)
    return sigmas if usual is None else usual


@dataclass(frozen=True)
class Cost:
    """What a pipeline may come to, at most, in evaluations of one latent.

    Attributes:
        teacher: its run.
        students: of greedy λ, by schedule.
        refining: by schedule that can be refined; empty without a budget.
        searching: of looking for the best stock setting, by schedule, where no refinement does that.
        unseen: of the figures on latents that nothing was fitted or chosen on, the teacher's run over them included.
    """

    teacher: int
    students: tuple[int, ...]
    refining: tuple[Plan, ...]
    searching: tuple[int, ...] = ()
    unseen: int = 0

    @property
    def total(self) -> int:
        """Of all."""
        refining = sum(plan.evaluations for plan in self.refining)
        return self.teacher + sum(self.students) + refining + sum(self.searching) + self.unseen

    def __str__(self) -> str:
        parts = [f"teacher {self.teacher}", f"students {sum(self.students)}"]
        if self.refining:
            most = max(plan.fitted for plan in self.refining)
            refining = sum(plan.evaluations for plan in self.refining)
            parts.append(f"refining {refining} (on up to {most} latents)")
        if any(self.searching):
            parts.append(f"looking for the best stock setting {sum(self.searching)}")
        if self.unseen:
            parts.append(f"figures from unseen latents {self.unseen}")
        return f"at most {self.total} evaluations: {', '.join(parts)}"
