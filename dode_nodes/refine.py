"""Refine a row end to end: fit all of the student's few numbers to the teacher's last state.

Greedy λ follows the teacher from step to step; what is seen is the last latent alone. So all numbers are
fitted to it together: for a single-stage linear multistep solver its weights over the history of outputs,

    ô_k = Σ_j W_kj o_j,    x_{k+1} = x_k + (σ_{k+1} − σ_k) ô_k    (Kim et al. 2024, Eq. 8; o in noise space)

of which λ is the one-parameter case, and its interior σ; for other solvers λ. Latents held out of the fit
decide how much of it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .denoiser import Denoiser, history_corrections
from .end_to_end import RUNS, Latents, Played, descend
from .errors import DodeError
from .groups import (
    Evaluator,
    ExtraArgs,
    Group,
    Progress,
    as_groups,
    by_turns,
    count_latents,
    held_out,
    held_out_count,
    micro_batches,
)
from .history import as_history
from .probe import probe_student
from .reading import GIVEN, IPNDM, PLAIN
from .report import finite
from .sample import solver_of
from .solvers import Sampler, resolve, sample_ipndm
from .student import (
    Parameter,
    Student,
    difference_cost,
    first_changed,
    history_parameters,
    lambda_parameters,
    sigma_parameters,
)
from .table import LambdaRow, json_object
from .teacher import Targets, run_teacher

JACOBIANS = 4
"""At most; more gained nothing on latents outside of the fit."""
FEW_LATENTS = 8
"""A budget pays for all Jacobians on so many latents before it pays for more latents."""


def refine(
    model: Denoiser | Sequence[Group],
    x: Tensor | None,
    row: LambdaRow,
    *,
    solver: str | Sampler | None = None,
    budget: float | None = None,
    targets: Targets | None = None,
    teacher: str | Sampler = "dpmpp_2m",
    scale: int = 10,
    micro_batch: int | None = None,
    extra_args: ExtraArgs = None,
    flow: bool | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> LambdaRow:
    """Fit a row's numbers to the teacher's last state, by Levenberg–Marquardt without backpropagation.

    A row of a single-stage linear multistep solver (euler, dpmpp_2m, ipndm, …) becomes weights over the
    history of outputs on a schedule of its own, sampled with euler; the fit begins with the row itself, or
    with its plain solver or iPNDM-3 if that is nearer. Any other row keeps its solver and schedule, and its
    λ or weights are refined. Evaluations per picture stay as they are. On the latents held out of the fit,
    the row that comes back is no further from the teacher than the row that was given and its plain solver:
    where it would be, that is what comes back. Its report says which, what each stage has gained, and what
    it cost.

    Under ``torchrun``, once a process group is set up, every rank makes this call with the same latents and
    gets the same row; the micro-batches are shared out.

    Args:
        model: the denoiser, ``model(x, sigma[B], **extra_args) -> denoised``; or a list of ``Group``s
            (several prompts); then x and extra_args are None.
        x: initial states at row.sigmas[0], ``[B, C, *spatial]``, any float dtype and device. With B = 1
            nothing is held out, and the row is marked as not checked.
        row: what to start from, as ``distill`` makes it.
        solver: the sampler itself, where the row was distilled on a callable.
        budget: evaluations that the fit may cost, as a multiple of the teacher's; latents and Jacobians
            follow from it (``plan_refinement``). None for all latents and as many Jacobians as pay.
        targets: the states of ``run_teacher``; teacher, scale and flow are then its.
        teacher, scale, flow: see ``distill``.
        micro_batch: how many latents to evaluate at a time; the row is the same, to rounding.
        extra_args: the model's keyword arguments, or a function of the latents' indices.
        settings: facts to add to the row's.
        progress: told after every evaluation; ``total`` is the most that it can come to, known from the
            start. What it raises ends the fit.

    Raises:
        IneligibleSampler: the row's solver or the teacher cannot serve; before any evaluation.
        DodeError: invalid input, a budget that pays for nothing, or a NaN from the model.
        BaseException: whatever the model or ``progress`` raises, unchanged, except that its attribute
            ``best_row`` is the best row so far.
    """
    groups = as_groups(model, x, extra_args)
    family = _Family.of(row, solver_of(row, solver), groups[0].model)
    _check_budget(budget)
    held = held_out(groups)
    micro_batches(groups, micro_batch)  # refuses a bad size
    best = _Best(family, len(held), dict(json_object(settings or {}, "settings")))
    try:
        already = 0
        if targets is None:

            def tell_of_all(p: Progress) -> None:
                later = family.plan(count_latents(groups), budget, p.total).evaluations
                if progress is not None:
                    progress(p._replace(total=p.total + later))

            targets = run_teacher(
                groups, None, torch.tensor(row.sigmas), solvers=family.solver, teacher=teacher, scale=scale,
                solver_options=dict(row.solver_options), micro_batch=micro_batch, flow=flow, progress=tell_of_all,
            )  # fmt: skip
            already = targets.evaluations
        targets.check(groups, [0.0])
        plan = family.plan(count_latents(groups), budget, targets.evaluations)
        best.begin(plan, targets, already)
        evaluator = Evaluator(progress, before=already, total=already + plan.evaluations)
        fitted = [number for number in by_turns(groups) if number not in held][: plan.fitted]
        fit, check = (
            Latents(micro_batches(groups, micro_batch, only=part), targets.at(0.0), evaluator, "refining")
            for part in (fitted, held)
        )
        for name, played in _stages(family, fit, plan.jacobians):
            best.consider(name, played, check.run(played.student).error, evaluator.spent())
    except BaseException as error:
        error.best_row = best.row(interrupted=True)
        raise
    return best.row()


def _stages(family: _Family, fit: Latents, jacobians: int) -> Iterator[tuple[str, Played]]:
    """The students that the fit begins with, and what becomes of the best of them."""
    begun = []
    for name, student in family.starts.items():
        begun.append(fit.run(student))
        yield name, begun[-1]
    start = min(begun, key=lambda played: played.squared_error)
    for i, played in enumerate(islice(descend(fit, start, family.parameters), jacobians)):
        yield f"Jacobian {i + 1}", played


@dataclass(frozen=True)
class Plan:
    """What a refinement may come to.

    Attributes:
        fitted: latents that are fitted.
        jacobians: at most.
        evaluations: of one latent each, at most.
    """

    fitted: int
    jacobians: int
    evaluations: int


def plan_refinement(
    row: LambdaRow,
    latents: int,
    budget: float | None,
    teacher_evaluations: int,
    *,
    solver: str | Sampler | None = None,
    model: Denoiser | None = None,
) -> Plan:
    """What ``refine`` will do on so many latents, to be told before it starts.

    Args:
        row: what it is to start from; of its weights nothing but their number matters.
        latents: B, over all groups.
        budget: as ``refine`` takes it.
        teacher_evaluations: what the budget is a multiple of.
        solver: the sampler itself, where the row was distilled on a callable.
        model: lends the sampler its attributes.

    Raises:
        DodeError: the budget is no positive number, or pays for nothing.
    """
    _check_budget(budget)
    return _Family.of(row, solver_of(row, solver), model).plan(latents, budget, teacher_evaluations)


def _check_budget(budget: float | None) -> None:
    if budget is not None and not 0 < budget < math.inf:
        raise DodeError(f"budget must be a positive multiple of the teacher's cost, not {budget}")


@dataclass(frozen=True)
class _Family:
    """The students that a row can be refined to.

    Attributes:
        row: the row given.
        solver: its sampler.
        starts: members to begin with, by name: the row given, its plain solver, perhaps others.
        parameters: what is fitted.
        history: whether the members are weights over the history under Euler in noise space.
    """

    row: LambdaRow
    solver: Sampler
    starts: dict[str, Student]
    parameters: list[Parameter]
    history: bool

    @classmethod
    def of(cls, row: LambdaRow, solver: Sampler, model: Denoiser | None) -> _Family:
        """The widest family that a row is a member of.

        Raises:
            IneligibleSampler: the solver cannot serve.
            DodeError: the row has weights per channel, or one evaluation only, or the solver takes other
                steps than the row.
        """
        options = dict(row.solver_options)
        queries = probe_student(solver, torch.tensor(row.sigmas), model=model, options=options)
        if queries.per_step != row.evaluations:
            raise DodeError(f"{row.label}: the solver takes other steps here than the row was made with")
        if row.channels is not None:
            raise DodeError(f"{row.label}: a row with weights per channel cannot be refined")
        if row.nfe < 2:
            raise DodeError(f"{row.label}: with one evaluation there is no history to weigh")
        none = np.zeros_like(row.corrections)
        given = Student(solver, row.prediction, row.sigmas, row.corrections, row.told_sigmas, options)
        plain = replace(given, corrections=none, told_sigmas=None)
        starts = {GIVEN: given, PLAIN: plain}
        members = {name: _as_member(student, model) for name, student in starts.items()}
        if None in members.values():
            fitted = lambda_parameters if row.form == "lambda" else history_parameters
            return cls(row, solver, starts, fitted(row.nfe), history=False)
        ipndm = replace(plain, solver=sample_ipndm, prediction="noise", options={"max_order": 3})
        members[IPNDM] = replace(_as_member(ipndm, model), told_sigmas=row.told_sigmas)
        parameters = history_parameters(row.nfe)
        if row.told_sigmas is None:  # else the network does not see the σ
            parameters += sigma_parameters(row.steps)
        return cls(row, solver, members, parameters, history=True)

    def plan(self, latents: int, budget: float | None, teacher_evaluations: int) -> Plan:
        """All latents and Jacobians, or what the budget pays for.

        Raises:
            DodeError: it pays for no Jacobian on one latent.
        """
        held = held_out_count(latents)
        plans = [
            Plan(fitted, jacobians, self._cost(fitted, held, jacobians))
            for fitted, jacobians in _preferred(latents - held)
        ]
        if budget is None:
            return plans[0]
        affordable = [plan for plan in plans if plan.evaluations <= budget * teacher_evaluations]
        if not affordable:
            raise DodeError(
                f"a budget of {budget:g} times the teacher's {teacher_evaluations} evaluations is too small: "
                f"refining {self.row.label} takes {plans[-1].evaluations / teacher_evaluations:.2g} times at least"
            )
        return affordable[0]

    def _cost(self, fitted: int, held: int, jacobians: int) -> int:
        """Evaluations at most."""
        n = self.row.nfe
        jacobian = difference_cost(self.parameters, n) + RUNS * (n - first_changed(self.parameters))
        return len(self.starts) * n * (fitted + held) + jacobians * (jacobian * fitted + n * held)

    def row_of(self, name: str, student: Student) -> LambdaRow:
        """A member as a row, with the report and settings of the row given."""
        row = self.row
        if name == GIVEN:
            return row
        if name == PLAIN:
            plain = np.zeros(row.nfe) if row.form == "lambda" else np.eye(row.nfe)
            return replace(row, weights=plain, told_sigmas=None)
        weights = student.corrections + np.eye(row.nfe)
        if self.history:
            return replace(
                row, solver="euler", solver_options={}, prediction="noise", form="history", weights=weights,
                sigmas=student.sigmas,
            )  # fmt: skip
        return replace(row, weights=np.diag(student.corrections) if row.form == "lambda" else weights)


def _as_member(student: Student, model: Denoiser | None) -> Student | None:
    """The student as weights over the history under Euler in noise space; None where it is no such thing."""
    weights = as_history(
        student.solver, student.sigmas, student.corrections, student.prediction, options=student.options, model=model
    )  # fmt: skip
    if weights is None:
        return None
    return replace(
        student, solver=resolve("euler"), prediction="noise", options={}, corrections=history_corrections(weights)
    )  # fmt: skip


def _preferred(latents: int) -> list[tuple[int, int]]:
    """(fitted latents, Jacobians), the most wanted first."""
    few = min(FEW_LATENTS, latents)
    return [
        *((fitted, JACOBIANS) for fitted in range(latents, few - 1, -1)),
        *((few, jacobians) for jacobians in range(JACOBIANS - 1, 0, -1)),
        *((fitted, 1) for fitted in range(few - 1, 0, -1)),
    ]


class _Best:
    """The best member so far, on the latents that nothing is fitted on, and how it was found."""

    def __init__(self, family: _Family, held: int, settings: dict[str, Any]) -> None:
        self._family = family
        self._held = held
        self._settings = settings
        self._stages: list[dict[str, Any]] = []
        self._name, self._student = GIVEN, family.starts[GIVEN]
        self._judged = math.inf
        self._facts: dict[str, Any] = {}
        self._teacher_evaluations = 0

    def begin(self, plan: Plan, targets: Targets, teacher_evaluations: int) -> None:
        """What is known when the teacher is done; ``teacher_evaluations`` are those of this refinement."""
        self._teacher_evaluations = teacher_evaluations
        self._facts = {
            "fitted_latents": plan.fitted,
            "held_out_latents": self._held,
            "checked": self._held > 0,
            "teacher_error": targets.own_error,
        }

    def consider(self, name: str, played: Played, held_error: float, spent: int) -> None:
        """A member's errors, and what the refinement has cost so far."""
        self._stages.append(
            {
                "stage": name,
                "fitted_error": finite(played.error),
                "held_out_error": finite(held_error),
                "evaluations": spent,
            }
        )
        judged = held_error if self._held else played.error
        if judged < self._judged:
            self._name, self._student, self._judged = name, played.student, judged

    def row(self, *, interrupted: bool = False) -> LambdaRow:
        """The best as a row."""
        row = self._family.row_of(self._name, self._student)
        given = self._family.row
        began = {"solver": given.solver, "solver_options": dict(given.solver_options)}
        refined = {
            "kept": self._name,
            "stages": self._stages,
            "from": began | {"sigmas": given.sigmas.tolist()},
        }
        if interrupted:
            refined["interrupted"] = True
        report = dict(row.report) | {"refined": refined, "evaluations": self._evaluations(row.report)}
        if self._name != GIVEN:
            for of_the_row_given in ("error", "shrunk_to", "lambda_standard_error", "undetermined"):
                report.pop(of_the_row_given, None)
            report |= self._facts
            if self._held:
                report["error"] = self._errors()
        return replace(row, settings=dict(row.settings) | self._settings, report=report)

    def _errors(self) -> dict[str, Any]:
        """At the end: on the way there a refined student need not be near the teacher."""
        stock = next((s["held_out_error"] for s in self._stages if s["stage"] == PLAIN), None)
        between = [None] * (self._family.row.steps - 1)
        return {
            "stock": [*between, stock],
            "dode": [*between, self._judged],
            "stock_end": stock,
            "dode_end": self._judged,
        }

    def _evaluations(self, report: Mapping[str, Any]) -> dict[str, Any]:
        before = report.get("evaluations")
        spent = dict(before) if isinstance(before, dict) else {}
        if self._teacher_evaluations:
            spent["teacher for refining"] = self._teacher_evaluations
        return spent | {"refining": self._stages[-1]["evaluations"] if self._stages else 0}
