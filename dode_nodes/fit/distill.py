"""Distil λ from a teacher: fit it greedily, check it on held-out latents, do no harm, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DodeError
from ..sampling.probe import Queries, probe_student, solver_name
from ..sampling.solvers import Sampler, resolve
from ..sigmas import at_least_float32, check_schedules
from ..tables.gate import SETTINGS, checked, finite, json_object
from ..tables.provenance import HeldOutErrors
from ..tables.row import PREDICTIONS, LambdaRow
from .evaluator import Evaluator
from .greedy import Fit, fit_greedily
from .held_out import SHRINKS, HeldOut, Verdict, later_starts_cost, no_harm, with_later_starts
from .latents import Latents
from .progress import Progress, Tell
from .runs import Recording, Run
from .teacher import Targets


def distill(
    targets: Targets,
    sigmas: Tensor,
    *,
    solver: str | Sampler = "euler",
    solver_options: Mapping[str, Any] | None = None,
    prediction: str = "noise",
    settings: Mapping[str, Any] | None = None,
    progress: Progress | Tell | None = None,
) -> LambdaRow:
    """Find one λ per network evaluation of a few-step solver (Kim et al. 2024, arXiv:2309.16421).

    Costs the student's evaluations, the plain solver's on the held-out latents, a few student runs on those
    if λ has to be shrunk, and runs from each later step. The report says how many.

    Args:
        targets: the teacher's states, with the latents (``run_teacher``).
        sigmas: the student's schedule, descending to 0.
        solver: the student, a name or a sampler in k-diffusion's convention; solver_options are its
            keyword arguments.
        prediction: what an output is: ``"noise"``, (x − D)/σ, or ``"data"``, D.
        settings: facts to keep in the row (cfg, seed, …).
        progress: told after every evaluation; what it raises ends the run, and nothing is left over.

    Raises:
        IneligibleSampler: the solver cannot serve; before any network evaluation.
        DodeError: invalid input, or a NaN from the model.
    """
    student = GreedyStudent.probed(targets.latents, sigmas, solver, solver_options)
    settings = checked(settings or {}, SETTINGS, "settings")
    with Progress.of(progress, student.cost + student.later_starts) as work:
        fitting, checking = work.split(student.cost, student.later_starts)
        row = student.fit(targets, prediction, settings, fitting)
        return with_later_starts(targets, row, student.run.solver, checking)


@dataclass(frozen=True, eq=False)
class GreedyStudent:
    """A few-step solver on a schedule that has passed the probe.

    Attributes:
        latents: what it is to be fitted on.
        solver: its name, or the caller's own.
        run: the sampler over the schedule.
        queries: what it asks.
    """

    latents: Latents
    solver: str | Sampler
    run: Run
    queries: Queries

    @classmethod
    def probed(
        cls,
        latents: Latents,
        sigmas: Tensor,
        solver: str | Sampler,
        solver_options: Mapping[str, Any] | None = None,
    ) -> GreedyStudent:
        """Refuses, before any evaluation, what cannot be distilled; see ``distill``."""
        check_schedules([sigmas])
        options = dict(json_object(solver_options or {}, "solver_options"))
        run = Run(resolve(solver), at_least_float32(sigmas.detach()).clone(), options)
        queries = probe_student(run.solver, run.sigmas, model=latents.lender, options=options)
        return cls(latents, solver, run, queries)

    @property
    def cost(self) -> int:
        """Of fitting and checking, at most: all trials of a shrunk λ included."""
        held = len(self.latents.held_out)
        return len(self.queries.sigmas) * (len(self.latents) + (1 + len(SHRINKS)) * held)

    @property
    def later_starts(self) -> int:
        """Evaluations of the runs from its later steps, at most: its row's, and the plain solver's."""
        return 2 * later_starts_cost(self.latents, self.queries.per_step)

    def fit(
        self, targets: Targets, prediction: str, settings: Mapping[str, Any], progress: Progress
    ) -> LambdaRow:
        """The row, but for the errors of its later starts."""
        if prediction not in PREDICTIONS:
            raise DodeError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")
        targets.check(self.queries.sigmas)
        with progress:
            evaluator = Evaluator(progress)
            recordings = [Recording(self.run, batch, prediction) for batch in self.latents.batches()]
            denoisers = [evaluator.on(recording.batch, "student") for recording in recordings]
            fit = fit_greedily(recordings, denoisers, self.queries, targets)
            spent = {"teacher": targets.evaluations, "student": evaluator.spent()}
            verdict = None
            if self.latents.held_out:
                held_out = HeldOut(self.run, self.queries, prediction, targets, evaluator)
                verdict = no_harm(held_out, fit.corrections, recordings)
                spent |= verdict.evaluations
        kept = 1.0 if verdict is None else verdict.shrunk_to
        return LambdaRow(
            solver=solver_name(self.solver),
            sigmas=self.run.sigmas.cpu().double().numpy(),
            evaluations=self.queries.per_step,
            weights=kept * np.array([theta[0] if len(theta) else 0.0 for theta in fit.coefficients]),
            prediction=prediction,
            solver_options=self.run.options,
            errors=None if verdict is None else self._errors(verdict),
            settings=_settings(targets) | dict(settings),
            report=_report(fit, targets, verdict) | {"evaluations": spent},
        )

    def _errors(self, verdict: Verdict) -> HeldOutErrors:
        held, steps = len(self.latents.held_out), len(self.queries.per_step)
        return HeldOutErrors.of_whole(held, steps, verdict.dode[-1], verdict.stock[-1])


def _report(fit: Fit, targets: Targets, verdict: Verdict | None) -> dict[str, Any]:
    """For people: how it was fitted, and how it does step by step."""
    kept = 1.0 if verdict is None else verdict.shrunk_to
    scatter: Sequence[float | None] = [
        finite(kept * float(errors[0])) if len(errors) else None for errors in fit.standard_errors
    ]
    report: dict[str, Any] = {
        "fitted_latents": len(targets.latents.fitted),
        "held_out_latents": len(targets.latents.held_out),
        "checked": verdict is not None,
        "teacher_error": targets.own_error,
        "lambda_standard_error": scatter,
        "undetermined": fit.undetermined,
    }
    if verdict is not None:
        after = {"stock": verdict.stock, "dode": verdict.dode}
        report["after_steps"] = {name: [finite(e) for e in errors] for name, errors in after.items()}
        report["shrunk_to"] = kept
    return report


def _settings(targets: Targets) -> dict[str, Any]:
    x = targets.latents.groups[0].x
    return {
        "teacher": targets.teacher.name,
        "scale": targets.teacher.scale,
        "latent_shape": list(x.shape[1:]),
        "dtype": str(x.dtype).removeprefix("torch."),
        "latents": len(targets.latents),
        "groups": len(targets.latents.groups),
    }
