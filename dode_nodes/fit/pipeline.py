"""One run of the teacher, a student per schedule, the better prediction, refinement: from latents to rows.

The node 'Distill λ', ``python -m dode_nodes distill`` and the demo use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DodeError
from ..sampling.probe import solver_name
from ..sampling.solvers import Sampler
from ..tables.gate import SETTINGS, checked
from ..tables.row import PREDICTIONS, LambdaRow
from .distill import GreedyStudent
from .held_out import later_starts_cost, with_later_starts
from .latents import Latents
from .progress import Progress, Tell
from .race import MakeSigmas
from .refine import Refinement
from .scope import Plan, plan_refinement
from .teacher import Targets, Teacher, plan_teacher


@dataclass(frozen=True)
class Recipe:
    """What to fit, and how: the settings of a fit, made and checked once, where a user gives them.

    Attributes:
        solvers: the students' samplers, by name or as functions.
        predictions: which to try; of several, the one with the smaller held-out error is kept.
        teacher: what is followed.
        refine_budget: evaluations that refining all rows may cost, as a multiple of the teacher's; 0 for none,
            infinity for as much as pays.
        settings: facts to keep in the rows.
        make_sigmas: the host's schedules, among which a refinement looks for a start; None for those given alone.

    Raises:
        DodeError: one of them is invalid.
    """

    solvers: Sequence[str | Sampler] = ("euler",)
    predictions: Sequence[str] = PREDICTIONS
    teacher: Teacher = field(default_factory=Teacher)
    refine_budget: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    make_sigmas: MakeSigmas | None = None

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


@dataclass(frozen=True)
class Cost:
    """What a pipeline may come to, at most, in evaluations of one latent.

    Attributes:
        teacher: its run.
        students: of greedy λ, by schedule.
        refining: by schedule that can be refined; empty without a budget.
    """

    teacher: int
    students: tuple[int, ...]
    refining: tuple[Plan, ...]

    @property
    def total(self) -> int:
        """Of all."""
        return self.teacher + sum(self.students) + sum(plan.evaluations for plan in self.refining)

    def __str__(self) -> str:
        parts = [f"teacher {self.teacher}", f"students {sum(self.students)}"]
        if self.refining:
            most = max(plan.fitted for plan in self.refining)
            refining = sum(plan.evaluations for plan in self.refining)
            parts.append(f"refining {refining} (on up to {most} latents)")
        return f"at most {self.total} evaluations: {', '.join(parts)}"


class Pipeline:
    """Distils solvers on several schedules, and refines the best row of each.

    Args:
        latents: what to fit on.
        schedules: the students' sigmas, each descending to 0.
        recipe: everything else.

    Raises:
        IneligibleSampler, DodeError: as ``distill`` and ``refine`` do; before any evaluation.

    Attributes:
        cost: what ``run`` may come to, known before.
        remarks: what the user should know before it starts, one line each.
        rows: what has been found so far: greedy rows, then refined ones.
        partial: where a refinement was ended, the best of it, if that is not the row it began with; else None.
        targets: the teacher's states, when it is done.
    """

    def __init__(self, latents: Latents, schedules: Sequence[Tensor], recipe: Recipe) -> None:
        self.rows: list[LambdaRow] = []
        self.partial: LambdaRow | None = None
        self.targets: Targets | None = None
        self._recipe = recipe
        self._teacher = plan_teacher(latents, schedules, recipe.teacher, solvers=recipe.solvers)
        self._students = [
            [GreedyStudent.probed(latents, sigmas, solver) for solver in recipe.solvers]
            for sigmas in schedules
        ]
        self._refinable = [i for i in range(len(schedules)) if self.evaluations(i) > 1]
        self.remarks = []
        if len(self._refinable) < len(schedules):
            self.remarks.append("with one evaluation there is nothing to fit: this row is the plain solver")
        self._budgets = self._shares(recipe.refine_budget) if recipe.refine_budget else []
        self.cost = Cost(
            teacher=self._teacher.cost,
            students=tuple(sum(map(self._student_cost, students)) for students in self._students),
            refining=tuple(self._planned()),
        )

    @property
    def found(self) -> list[LambdaRow]:
        """All rows that there are, wherever it was ended."""
        return self.rows if self.partial is None else [*self.rows, self.partial]

    def run(self, progress: Progress | Tell | None = None) -> list[LambdaRow]:
        """Everything: the greedy rows, in the schedules' order, then their refinements.

        Args:
            progress: told after every evaluation; what it raises ends the run, and passes on: ``rows`` and
                ``partial`` hold what there is by then.
        """
        self.rows, self.partial = [], None
        cost = self.cost
        with Progress.of(progress, cost.total) as work:
            teaching, *parts = work.split(
                cost.teacher, *cost.students, *(plan.evaluations for plan in cost.refining)
            )
            self.targets = self._teacher(teaching)
            best = []
            for students, part in zip(self._students, parts, strict=False):
                shares = part.split(*map(self._student_cost, students))
                found = [self._row(student, share) for student, share in zip(students, shares, strict=True)]
                self.rows += found
                best.append(min(zip(found, students, strict=True), key=lambda pair: pair[0].error_from()))
            refining = parts[len(self._students) :]
            for i, budget, part in zip(self._refinable, self._budgets, refining, strict=False):
                row, student = best[i]
                if row.nfe > 1:
                    self._refine(row, student, budget, part)
        return self.rows

    def evaluations(self, schedule: int) -> int:
        """Network evaluations of one picture on a schedule, of the student that needs most."""
        return max(len(student.queries.sigmas) for student in self._students[schedule])

    def _row(self, student: GreedyStudent, progress: Progress) -> LambdaRow:
        """λ of one student, for the prediction that does better."""
        assert self.targets is not None  # noqa: S101  # the teacher has run
        predictions = self._recipe.predictions
        *fitting, checking = progress.split(*[student.cost] * len(predictions), self._later_starts(student))
        candidates = [
            student.fit(self.targets, prediction, self._recipe.settings, part)
            for prediction, part in zip(predictions, fitting, strict=True)
        ]
        row = min(candidates, key=LambdaRow.error_from)
        return with_later_starts(self.targets, row, student.run.solver, checking)

    def _refine(self, row: LambdaRow, student: GreedyStudent, budget: float, progress: Progress) -> None:
        assert self.targets is not None  # noqa: S101  # the teacher has run
        refinement = Refinement(
            self.targets, row, solver=_own(student), budget=budget, make_sigmas=self._recipe.make_sigmas
        )
        try:
            refined = refinement.run(progress)
        except BaseException:
            if refinement.best.origin.kind != row.origin.kind:
                self.partial = refinement.best
            raise
        if refined.origin.kind == row.origin.kind:
            self.rows[self.rows.index(row)] = refined  # the same, and the report says that it was tried
        else:
            self.rows.append(refined)

    def _student_cost(self, student: GreedyStudent) -> int:
        return len(self._recipe.predictions) * student.cost + self._later_starts(student)

    def _later_starts(self, student: GreedyStudent) -> int:
        return later_starts_cost(student.latents, student.queries.per_step)

    def _shares(self, budget: float) -> list[float]:
        """Each schedule's part of the budget, such that all fit as many latents as often."""
        full = [self._plan(i, None).fitting for i in self._refinable]
        return [budget * cost / sum(full) for cost in full]

    def _planned(self) -> list[Plan]:
        pairs = zip(self._refinable, self._budgets, strict=False)
        try:
            return [self._plan(i, budget) for i, budget in pairs]
        except DodeError as error:
            budget = self._recipe.refine_budget
            raise DodeError(
                f"raise the refine budget of {budget:g}, which all schedules share: {error}"
            ) from error

    def _plan(self, i: int, budget: float | None) -> Plan:
        """For the schedule's student that costs most: which of them will be refined is not known yet."""
        plans = []
        for student in self._students[i]:
            if len(student.queries.sigmas) < 2:
                continue
            row = LambdaRow(
                solver=solver_name(student.solver),
                sigmas=student.run.sigmas.cpu().double().numpy(),
                evaluations=student.queries.per_step,
                weights=np.zeros(len(student.queries.sigmas)),
            )
            make_sigmas = self._recipe.make_sigmas
            plans.append(
                plan_refinement(self._teacher, row, budget, solver=_own(student), make_sigmas=make_sigmas)
            )
        return max(plans, key=lambda plan: plan.evaluations)


def _own(student: GreedyStudent) -> Sampler | None:
    """A solver of the caller's own: no row can hold a function."""
    return None if isinstance(student.solver, str) else student.solver
