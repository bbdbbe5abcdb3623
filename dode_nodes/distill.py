"""Distil λ from a teacher: fit it greedily, check it on held-out latents, do no harm, report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .denoiser import PREDICTIONS, Denoiser, DodeDenoiser
from .errors import DodeError
from .greedy import fit_greedily
from .groups import (
    Evaluator,
    ExtraArgs,
    Group,
    MicroBatch,
    Progress,
    as_groups,
    count_latents,
    held_out,
    in_order,
    micro_batches,
    root_mean_square,
)
from .probe import Queries, probe_student, solver_name
from .runs import Recording, Run
from .solvers import Sampler, resolve
from .table import LambdaRow
from .teacher import Targets, check_schedules, run_teacher

SHRINKS = (0.75, 0.5, 0.25)
"""What λ is multiplied by, in turn, where the whole of it does harm on the held-out latents."""


def distill(
    model: Denoiser | Sequence[Group],
    x: Tensor | None,
    sigmas: Tensor,
    *,
    solver: str | Sampler = "euler",
    solver_options: dict[str, Any] | None = None,
    prediction: str = "noise",
    teacher: str | Sampler = "dpmpp_2m",
    scale: int = 10,
    targets: Targets | None = None,
    micro_batch: int | None = None,
    extra_args: ExtraArgs = None,
    flow: bool | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> LambdaRow:
    """Find one λ per network evaluation of a few-step solver.

    Costs the teacher's evaluations, the student's, and the plain solver's on the held-out latents; a
    few student runs on those if λ has to be shrunk. The report says how many.

    Args:
        model: the denoiser, ``model(x, sigma[B], **extra_args) -> denoised``; or a list of ``Group``s
            (several prompts) that share λ; then x and extra_args are None.
        x: initial states at sigmas[0], ``[B, C, *spatial]``, any float dtype and device.
        sigmas: the student's schedule, descending to 0.
        solver: the student, a name or a sampler in k-diffusion's convention; solver_options are its
            keyword arguments.
        prediction: what an output is: ``"noise"``, (x − D)/σ, or ``"data"``, D.
        teacher: the sampler to follow, with ``scale`` steps per student step (the paper's C).
        targets: the states of ``run_teacher``, to distil several students from one teacher.
        micro_batch: how many latents to evaluate at a time; the λ are the same, to rounding.
        extra_args: the model's keyword arguments, or a function of the latents' indices.
        flow: let the teacher measure steps in σ, not in log σ. None: where sigmas begins at σ ≤ 1.
        settings: facts to keep in the row (cfg, prompts, seed, …).
        progress: told after every evaluation; what it raises ends the run, and nothing is left over.

    Raises:
        IneligibleSampler: the solver or the teacher cannot serve; before any network evaluation.
        DodeError: invalid input, or a NaN from the model.
    """
    groups = as_groups(model, x, extra_args)
    check_schedules([sigmas])
    if prediction not in PREDICTIONS:
        raise DodeError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")
    options = dict(solver_options or {})
    run = Run(resolve(solver), sigmas.detach().clone(), options)
    queries = probe_student(run.solver, sigmas, model=groups[0].model, options=options)
    student_cost = len(queries.sigmas) * (count_latents(groups) + len(held_out(groups)))
    if targets is None:
        targets = run_teacher(
            groups,
            None,
            [sigmas],
            solvers=solver,
            solver_options=options,
            teacher=teacher,
            scale=scale,
            micro_batch=micro_batch,
            flow=flow,
            progress=progress and (lambda p: progress(p._replace(total=p.total + student_cost))),
        )
        already = targets.evaluations
    else:
        _check_targets(targets, groups, queries)
        already = 0
    evaluator = Evaluator(progress, done=already, total=already + student_cost)

    held = held_out(groups)
    batches, checked = micro_batches(groups, micro_batch), micro_batches(groups, micro_batch, only=held)
    recordings = [Recording(run, batch, prediction) for batch in batches]
    denoisers = [evaluator.on(batch, "student") for batch in batches]
    fit = fit_greedily(recordings, denoisers, queries, targets, held)
    spent = {"teacher": targets.evaluations, "student": evaluator.done - already}

    lambdas = np.array([theta[0] if len(theta) else 0.0 for theta in fit.coefficients])
    report: dict[str, Any] = {
        "fitted_latents": count_latents(groups) - len(held),
        "held_out_latents": len(held),
        "checked": bool(held),
        "teacher_error": targets.own_error,
        "lambda_standard_error": [_number(e[0]) if len(e) else None for e in fit.standard_errors],
        "undetermined": fit.undetermined,
    }
    if held:
        check = _Check(run, queries, prediction, checked, targets, evaluator)
        verdict = check.no_harm(fit.corrections, recordings)
        lambdas = lambdas * verdict.shrunk_to
        report |= {"error": verdict.errors, "shrunk_to": verdict.shrunk_to}
        spent |= verdict.evaluations
    return LambdaRow(
        solver=solver_name(solver),
        sigmas=sigmas.detach().cpu().double().numpy(),
        evaluations=queries.per_step,
        weights=lambdas,
        prediction=prediction,
        solver_options=options,
        settings=_settings(groups, targets) | (settings or {}),
        report=report | {"evaluations": spent},
    )


def _settings(groups: Sequence[Group], targets: Targets) -> dict[str, Any]:
    x = groups[0].x
    return {
        "latent_shape": list(x.shape[1:]),
        "dtype": str(x.dtype).removeprefix("torch."),
        "latents": count_latents(groups),
        "groups": len(groups),
        "teacher": targets.teacher,
        "scale": targets.scale,
    }


def _check_targets(targets: Targets, groups: Sequence[Group], queries: Queries) -> None:
    x = torch.cat([group.x.cpu() for group in groups])
    if x.shape != targets.x.shape or not torch.equal(x, targets.x):
        raise DodeError(
            "these targets were made from other latents: run the teacher on the ones to distil on"
        )
    for sigma in queries.sigmas:
        targets.at(sigma)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class _Verdict:
    """How λ did on the held-out latents, what it was shrunk to, and what finding out cost."""

    errors: dict[str, Any]
    shrunk_to: float
    evaluations: dict[str, int]


@dataclass(frozen=True)
class _Check:
    """The held-out latents, and the teacher's states of them."""

    run: Run
    queries: Queries
    prediction: str
    batches: Sequence[MicroBatch]
    targets: Targets
    evaluator: Evaluator

    def no_harm(self, corrections: np.ndarray, recordings: Sequence[Recording]) -> _Verdict:
        """Compare with the plain solver; where λ does not help, shrink it to what helps most, or to 0."""
        begun = self.evaluator.done
        stock = self._errors_of_run(np.zeros_like(corrections), "stock solver")
        spent = {"stock": self.evaluator.done - begun}
        errors, shrunk_to = self._errors_of_recordings(corrections, recordings), 1.0
        if not errors[-1] < stock[-1]:
            begun = self.evaluator.done
            self.evaluator.total += len(SHRINKS) * spent["stock"]
            trials = [(self._errors_of_run(s * corrections, "shrinking λ"), s) for s in SHRINKS]
            errors, shrunk_to = min([(stock, 0.0), *trials], key=lambda trial: trial[0][-1])
            spent["shrinking"] = self.evaluator.done - begun
        steps = {"stock": stock, "dode": errors, "stock_end": stock[-1], "dode_end": errors[-1]}
        return _Verdict(steps, shrunk_to, spent)

    def _starts(self) -> list[int | None]:
        """The evaluation that begins each step but the first; None where a step has none of its own."""
        firsts = accumulate(self.queries.per_step[:-1])
        return [k if n else None for k, n in zip(firsts, self.queries.per_step[1:], strict=True)]

    def _errors(self, states: dict[int, Tensor], end: Tensor) -> list[float | None]:
        """RMS distance to the teacher after each step."""
        numbers = torch.cat([batch.numbers for batch in self.batches]).sort().values

        def error(state: Tensor, sigma: float) -> float:
            return root_mean_square(state - self.targets.at(sigma)[numbers])

        steps = [None if k is None else error(states[k], self.queries.sigmas[k]) for k in self._starts()]
        return [*steps, error(end, 0.0)]

    def _errors_of_run(self, corrections: np.ndarray, stage: str) -> list[float | None]:
        wanted = [k for k in self._starts() if k is not None]
        runs = [
            self.run.trajectory(
                DodeDenoiser(self.evaluator.on(batch, stage), corrections, self.prediction), batch, wanted
            )
            for batch in self.batches
        ]
        states = {k: in_order(self.batches, [states[k] for states, _ in runs]) for k in wanted}
        return self._errors(states, in_order(self.batches, [end for _, end in runs]))

    def _errors_of_recordings(
        self, corrections: np.ndarray, recordings: Sequence[Recording]
    ) -> list[float | None]:
        batches = [recording.batch for recording in recordings]
        held = torch.cat([batch.numbers for batch in self.batches]).sort().values
        wanted = [k for k in self._starts() if k is not None]
        states = {k: in_order(batches, [r.states[k] for r in recordings])[held] for k in wanted}
        ends = in_order(batches, [recording.next_state(corrections) for recording in recordings])
        return self._errors(states, ends[held])
