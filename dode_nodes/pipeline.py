"""One run of the teacher, a student per schedule, the better prediction, refinement: from latents to rows.

What the node 'Distill λ' and ``python -m dode_nodes distill`` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .denoiser import PREDICTIONS
from .distill import distill
from .errors import DodeError
from .groups import Group, Progress, count_latents, held_out
from .probe import probe_student, solver_name
from .refine import Plan, plan_refinement, refine
from .solvers import Sampler, resolve
from .table import LambdaRow, end_error
from .teacher import Targets, run_teacher, teacher_evaluations


@dataclass(frozen=True)
class Cost:
    """What a pipeline may come to, in evaluations of one latent.

    Attributes:
        teacher: its run.
        students: of greedy λ, by schedule; a search for a harmless λ may add a few.
        refining: at most, by schedule; empty without a budget.
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
            parts.append(f"refining at most {refining} (on up to {most} latents)")
        return f"{self.total} evaluations: {', '.join(parts)}"


class Pipeline:
    """Distils one solver on several schedules.

    Args:
        groups: the latents.
        schedules: the students' sigmas, each descending to 0.
        solver: the student's sampler, by name.
        predictions: which to try; of several, the one with the smaller held-out error is kept.
        teacher, scale, flow: as ``run_teacher`` takes them.
        refine_budget: evaluations that refining all rows may cost, as a multiple of the teacher's; 0 for none.
        micro_batch: latents evaluated at a time.
        settings: facts to keep in the rows.

    Raises:
        IneligibleSampler, DodeError: as ``distill`` and ``refine`` do; before any evaluation.

    Attributes:
        cost: what ``run`` may come to, known before.
        rows: what has been found so far: greedy rows, then each row's refinement.
        partial: where a refinement was ended, the best of it, if that is not the row it began with; else None.
        targets: the teacher's states, when it is done.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        schedules: Sequence[Tensor],
        *,
        solver: str | Sampler = "euler",
        predictions: Sequence[str] = PREDICTIONS,
        teacher: str | Sampler = "dpmpp_2m",
        scale: int = 10,
        flow: bool | None = None,
        refine_budget: float = 0.0,
        micro_batch: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.rows: list[LambdaRow] = []
        self.partial: LambdaRow | None = None
        self.targets: Targets | None = None
        self._groups = groups
        self._schedules = schedules
        self._solver = solver
        self._own_solver = None if isinstance(solver, str) else solver  # no row can hold a function
        self._predictions = predictions
        self._of_teacher = {"teacher": teacher, "scale": scale, "flow": flow}
        self._micro_batch = micro_batch
        self._settings = settings
        self._progress: Callable[[Progress], None] | None = None
        taught = teacher_evaluations(groups, schedules, solvers=solver, **self._of_teacher)
        evaluations = [self._evaluations_per_step(sigmas) for sigmas in schedules]
        latents = count_latents(groups) + len(held_out(groups))
        self._budgets = self._shares(refine_budget, evaluations, taught) if refine_budget else []
        try:
            plans = [self._plan(i, evaluations[i], budget, taught) for i, budget in enumerate(self._budgets)]
        except DodeError as error:
            raise DodeError(f"each schedule shares a refine budget of {refine_budget:g}: {error}") from error
        self.cost = Cost(
            teacher=taught,
            students=tuple(len(predictions) * latents * sum(counts) for counts in evaluations),
            refining=tuple(plans),
        )

    @property
    def found(self) -> list[LambdaRow]:
        """All rows that there are, wherever it was ended."""
        return self.rows if self.partial is None else [*self.rows, self.partial]

    def run(self, progress: Callable[[Progress], None] | None = None) -> list[LambdaRow]:
        """Everything: the greedy rows, in the schedules' order, then their refinements.

        Args:
            progress: told after every evaluation, ``total`` being that of the whole; what it raises ends the
                run, and passes on: ``rows`` and ``partial`` hold what there is by then.
        """
        done, ahead = 0, self.cost.total

        def part(expected: int) -> Callable[[Progress], None] | None:
            """Tell of a part's progress as of the whole's."""
            nonlocal done, ahead
            before, ahead = done, ahead - expected

            def tell(p: Progress) -> None:
                nonlocal done
                done = before + p.done
                progress(p._replace(done=done, total=before + max(p.total, expected) + ahead))

            return progress and tell

        self.targets = run_teacher(
            self._groups, None, list(self._schedules), solvers=self._solver, micro_batch=self._micro_batch,
            progress=part(self.cost.teacher), **self._of_teacher,
        )  # fmt: skip
        for sigmas, cost in zip(self._schedules, self.cost.students, strict=True):
            candidates = [
                distill(
                    self._groups, None, sigmas, solver=self._solver, prediction=prediction, targets=self.targets,
                    micro_batch=self._micro_batch, settings=self._settings,
                    progress=part(cost // len(self._predictions)),
                )
                for prediction in self._predictions
            ]  # fmt: skip
            self.rows.append(min(candidates, key=end_error))
        for row, budget, plan in zip(list(self.rows), self._budgets, self.cost.refining, strict=False):
            self._refine(row, budget, part(plan.evaluations))
        return self.rows

    def _refine(self, row: LambdaRow, budget: float, progress: Callable[[Progress], None] | None) -> None:
        try:
            refined = refine(
                self._groups, None, row, solver=self._own_solver, budget=budget, targets=self.targets,
                micro_batch=self._micro_batch, progress=progress,
            )  # fmt: skip
        except BaseException as error:
            best = getattr(error, "best_row", None)
            self.partial = best if best is not None and best.is_refined else None
            raise
        if refined.is_refined:
            self.rows.append(refined)
        else:
            self.rows[self.rows.index(row)] = refined  # the same, and the report says that it was tried

    def _evaluations_per_step(self, sigmas: Tensor) -> tuple[int, ...]:
        return probe_student(resolve(self._solver), sigmas, model=self._groups[0].model).per_step

    def _shares(self, budget: float, evaluations: Sequence[tuple[int, ...]], taught: int) -> list[float]:
        """Each schedule's part of the budget, such that all fit as many latents as often."""
        full = [self._plan(i, counts, None, taught).evaluations for i, counts in enumerate(evaluations)]
        return [budget * cost / sum(full) for cost in full]

    def _plan(self, i: int, evaluations: tuple[int, ...], budget: float | None, taught: int) -> Plan:
        row = LambdaRow(
            solver=solver_name(self._solver),
            sigmas=self._schedules[i].cpu().double().numpy(),
            evaluations=evaluations,
            weights=np.zeros(sum(evaluations)),
        )
        latents, model = count_latents(self._groups), self._groups[0].model
        return plan_refinement(row, latents, budget, taught, solver=self._own_solver, model=model)
