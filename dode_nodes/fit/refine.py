"""Refine a row end to end: fit all of the student's few numbers to the teacher's last state.

Greedy λ follows the teacher from step to step, but only the last latent is seen. So here all numbers are fitted
to it together: for a single-stage linear multistep solver its weights over the history of outputs,

    ô_k = Σ_j W_kj o_j,    x_{k+1} = x_k + (σ_{k+1} − σ_k) ô_k    (Kim et al. 2024, Eq. 8; o in noise space)

of which λ is the one-parameter case, and its interior σ; for other solvers λ. The held-out latents
decide which result is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..errors import DodeError
from ..sampling.sample import solver_of
from ..sampling.solvers import Sampler, resolve
from ..tables.gate import SETTINGS, checked, finite
from ..tables.provenance import PLAIN_SOLVER, ROW_GIVEN, HeldOutErrors
from ..tables.row import LambdaRow
from .evaluator import Evaluator
from .family import Family
from .held_out import later_starts_cost, with_later_starts
from .latents import held_out_count
from .levenberg_marquardt import LeastSquaresProblem, Played, levenberg_marquardt
from .progress import Progress, Tell
from .student import Student
from .teacher import Targets, TeacherRun

JACOBIANS = 4
"""At most; on latents outside of the fit more were no better."""
FEW_LATENTS = 8
"""A budget pays for all Jacobians on so many latents before it pays for more latents."""


class Stage(NamedTuple):
    """A student that a refinement has tried.

    Attributes:
        name: what it was: one to begin with, or the one after a Jacobian.
        fitted_error, held_out_error: its RMS distance to the teacher at the end; NaN without latents.
        evaluations: of one latent each, spent on the refinement by then.
    """

    name: str
    fitted_error: float
    held_out_error: float
    evaluations: int


@dataclass(frozen=True)
class Plan:
    """What a refinement may come to.

    Attributes:
        fitted: latents that are fitted.
        jacobians: at most.
        fitting: evaluations of one latent each, at most: what a budget is compared with.
        checking: those of runs from later steps, at most.
    """

    fitted: int
    jacobians: int
    fitting: int
    checking: int

    @property
    def evaluations(self) -> int:
        """All of them, at most."""
        return self.fitting + self.checking


class Refinement:
    """Fits a row's numbers to the teacher's last state, by Levenberg–Marquardt without backpropagation.

    A row of a single-stage linear multistep solver (euler, dpmpp_2m, ipndm, …) becomes weights over the
    history of outputs on a schedule of its own, sampled with euler; the fit begins with the row itself, or
    with its plain solver or iPNDM-3 if that is nearer. Any other row keeps its solver and schedule, and its
    λ or weights are refined. Evaluations per picture stay as they are. On the latents held out of the fit,
    ``best`` is no further from the teacher than the row that was given and its plain solver.

    It can be ended at any time, by an exception from ``progress`` or by leaving the loop over ``stage_by_stage``,
    and asked at any time.

    Args:
        targets: the teacher's states, with the latents. With one latent nothing is held out, and the row is
            marked as not checked.
        row: what to start from, as ``distill`` makes it.
        solver: the sampler itself, where the row was distilled on a callable.
        budget: evaluations that the fit may cost, as a multiple of the teacher's; latents and Jacobians
            follow from it. Runs from later steps come on top. None for all latents and as many Jacobians
            as pay.
        settings: facts to add to the row's.

    Raises:
        IneligibleSampler: the row's solver cannot serve.
        DodeError: invalid input, or a budget that pays for nothing.

    Attributes:
        plan: what it may cost.
        stages: what it has tried so far.
    """

    def __init__(
        self,
        targets: Targets,
        row: LambdaRow,
        *,
        solver: str | Sampler | None = None,
        budget: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._targets = targets
        self._family = Family.of(row, solver_of(row, solver), targets.latents.lender)
        self._settings = dict(row.settings) | dict(checked(settings or {}, SETTINGS, "settings"))
        targets.check([float(row.sigmas[0]), 0.0])
        self.plan = _plan(
            self._family, len(targets.latents), budget, targets.evaluations, _checking(targets, self._family)
        )
        self._checked = bool(targets.latents.held_out)
        self._begin()

    def _begin(self) -> None:
        self.stages: list[Stage] = []
        self._kept: tuple[str, Student] = (ROW_GIVEN, self._family.starts[ROW_GIVEN])
        self._least = math.inf
        self._finished: LambdaRow | None = None

    def run(self, progress: Progress | Tell | None = None) -> LambdaRow:
        """All of it: the best row, with the errors of its later starts.

        Args:
            progress: told after every evaluation; what it raises ends the fit, and ``best`` is as far as it came.

        Raises:
            DodeError: the model's answers are not finite, or no start is.
        """
        with Progress.of(progress, self.plan.evaluations) as work:
            fitting, checking = work.split(self.plan.fitting, self.plan.checking)
            for _ in self.stage_by_stage(fitting):
                pass
            row = self.best
            if self._kept[0] != ROW_GIVEN:
                own = row.solver == self._family.row.solver
                solver = self._family.solver if own else resolve(row.solver)
                row = self._finished = with_later_starts(self._targets, row, solver, checking)
        return row

    def stage_by_stage(self, progress: Progress | Tell | None = None) -> Iterator[Stage]:
        """The same, but for the later starts, one stage at a time: the starts, then a stage per Jacobian."""
        self._begin()
        latents = self._targets.latents
        fitted, held = latents.fitted[: self.plan.fitted], latents.held_out
        with Progress.of(progress, self.plan.fitting) as work:
            evaluator = Evaluator(work)
            fit = LeastSquaresProblem(self._targets, fitted, evaluator, "refining")
            check = LeastSquaresProblem(self._targets, held, evaluator, "refining")
            for name, played in self._members(fit):
                held_out_error = check.trial(played.student).error
                stage = Stage(name, played.error, held_out_error, evaluator.spent())
                self._consider(stage, played.student)
                yield stage
            self._finished = self._as_row(interrupted=False)

    def _members(self, fit: LeastSquaresProblem) -> Iterator[tuple[str, Played]]:
        """The students that the fit begins with, and what becomes of the best of them."""
        begun = []
        for name, student in self._family.starts.items():
            begun.append(fit.trial(student))
            yield name, begun[-1]
        start = min(begun, key=lambda played: played.squared_error)
        if not math.isfinite(start.squared_error):
            raise DodeError(
                f"{self._family.row.label}: this row and its plain solver both return NaN or infinite values on these "
                "latents. If the model runs in half precision, try fp32 or bf16"
            )
        descent = levenberg_marquardt(fit, start, self._family.parameters, self.plan.jacobians)
        for i, played in enumerate(descent):
            yield f"Jacobian {i + 1}", played

    def _consider(self, stage: Stage, student: Student) -> None:
        self.stages.append(stage)
        error = stage.held_out_error if self._checked else stage.fitted_error
        if error < self._least:
            self._kept, self._least = (stage.name, student), error

    @property
    def best(self) -> LambdaRow:
        """The best row so far; before the first stage, the row that was given.

        Until the last stage its report says that the refinement was interrupted.
        """
        return self._as_row(interrupted=True) if self._finished is None else self._finished

    def _as_row(self, *, interrupted: bool) -> LambdaRow:
        name, student = self._kept
        row = self._family.row_of(name, student)
        stages = [
            {
                "stage": stage.name,
                "fitted_error": finite(stage.fitted_error),
                "held_out_error": finite(stage.held_out_error),
                "evaluations": stage.evaluations,
            }
            for stage in self.stages
        ]
        refined = {"kept": name, "stages": stages} | ({"interrupted": True} if interrupted else {})
        spent = dict(row.report.get("evaluations", {}))
        spent["refining"] = spent.get("refining", 0) + (self.stages[-1].evaluations if self.stages else 0)
        report = dict(row.report) | {"refined": refined, "evaluations": spent}
        if name == ROW_GIVEN:
            return replace(row, settings=self._settings, report=report)
        for of_the_row_given in ("after_steps", "shrunk_to", "lambda_standard_error", "undetermined"):
            report.pop(of_the_row_given, None)
        report |= {
            "fitted_latents": self.plan.fitted,
            "held_out_latents": len(self._targets.latents.held_out),
            "checked": self._checked,
            "teacher_error": self._targets.own_error,
        }
        return replace(row, settings=self._settings, report=report, errors=self._errors())

    def _errors(self) -> HeldOutErrors | None:
        """At the end alone: on the way there a refined student need not be near the teacher."""
        if not self._checked:
            return None
        by_name = {stage.name: stage.held_out_error for stage in self.stages}
        stock = by_name.get(PLAIN_SOLVER, by_name[ROW_GIVEN])  # one of them where they are the same
        held = len(self._targets.latents.held_out)
        return HeldOutErrors.of_whole(held, self._family.row.steps, self._least, stock)


def refine(
    targets: Targets,
    row: LambdaRow,
    *,
    solver: str | Sampler | None = None,
    budget: float | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | Tell | None = None,
) -> LambdaRow:
    """Fit a row's numbers to the teacher's last state; see ``Refinement``, whose best row this returns.

    Under ``torchrun``, once a process group is set up, every rank makes this call with the same latents and
    gets the same row; the micro-batches are shared out.
    """
    return Refinement(targets, row, solver=solver, budget=budget, settings=settings).run(progress)


def plan_refinement(
    teacher: TeacherRun, row: LambdaRow, budget: float | None = None, *, solver: str | Sampler | None = None
) -> Plan:
    """What ``refine`` will do, to be told before the teacher runs.

    Args:
        teacher: the run whose targets it will have (``plan_teacher``).
        row: what it is to start from; of its weights nothing but their number matters.
        budget: as ``refine`` takes it.
        solver: the sampler itself, where the row was distilled on a callable.

    Raises:
        DodeError: the budget is no positive number, or pays for nothing.
    """
    family = Family.of(row, solver_of(row, solver), teacher.latents.lender)
    return _plan(family, len(teacher.latents), budget, teacher.cost, _checking(teacher, family))


def _checking(teacher: TeacherRun | Targets, family: Family) -> int:
    """What runs from the later steps take at most. A refined σ is mostly not one that the teacher stopped at."""
    approach = teacher.approach_cost if family.history else 0
    return later_starts_cost(teacher.latents, family.row.evaluations, approach=approach)


def _plan(
    family: Family, latents: int, budget: float | None, teacher_evaluations: int, checking: int
) -> Plan:
    """All latents and Jacobians, or what the budget pays for.

    Raises:
        DodeError: it pays for no Jacobian on one latent, or is no number.
    """
    if budget is not None and not budget > 0:
        raise DodeError(f"budget must be a positive multiple of the teacher's cost, not {budget}")
    held = held_out_count(latents)
    plans = [
        Plan(fitted, jacobians, family.cost(fitted, held, jacobians), checking)
        for fitted, jacobians in _preferred(latents - held)
    ]
    if budget is None:
        return plans[0]
    for plan in plans:
        if plan.fitting <= budget * teacher_evaluations:
            return plan
    raise DodeError(
        f"a budget of {budget:g} is too small: refining {family.row.label} takes at least "
        f"{plans[-1].fitting / teacher_evaluations:.2g} times the teacher's {teacher_evaluations} evaluations"
    )


def _preferred(latents: int) -> list[tuple[int, int]]:
    """(fitted latents, Jacobians), the most wanted first."""
    few = min(FEW_LATENTS, latents)
    return [
        *((fitted, JACOBIANS) for fitted in range(latents, few - 1, -1)),
        *((few, jacobians) for jacobians in range(JACOBIANS - 1, 0, -1)),
        *((fitted, 1) for fitted in range(few - 1, 0, -1)),
    ]
