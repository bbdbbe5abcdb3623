"""Distil λ from a teacher: fit it greedily, check it on held-out latents, do no harm, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .denoiser import PREDICTIONS, Denoiser
from .errors import DodeError
from .greedy import Fit, fit_greedily
from .groups import (
    Evaluator,
    ExtraArgs,
    Group,
    Progress,
    as_groups,
    count_latents,
    held_out,
    micro_batches,
)
from .probe import probe_student, solver_name
from .report import HeldOut, finite, no_harm
from .runs import Recording, Run
from .sigmas import at_least_float32, check_schedules
from .solvers import Sampler, resolve
from .table import LambdaRow, json_object
from .teacher import Targets, run_teacher


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
    """Find one λ per network evaluation of a few-step solver (Kim et al. 2024, arXiv:2309.16421).

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
        targets: the states of ``run_teacher``, to distil several students from one teacher; teacher,
            scale and flow are then its.
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
    options = dict(json_object(solver_options or {}, "solver_options"))
    settings = _settings(groups) | dict(json_object(settings or {}, "settings"))
    run = Run(resolve(solver), at_least_float32(sigmas.detach()).clone(), options)
    queries = probe_student(run.solver, run.sigmas, model=groups[0].model, options=options)
    held = held_out(groups)
    student_cost = len(queries.sigmas) * (count_latents(groups) + len(held))
    if targets is None:
        targets = run_teacher(
            groups,
            None,
            [run.sigmas],
            solvers=run.solver,
            solver_options=options,
            teacher=teacher,
            scale=scale,
            micro_batch=micro_batch,
            flow=flow,
            progress=progress and (lambda p: progress(p._replace(total=p.total + student_cost))),
        )
        already = targets.evaluations
    else:
        targets.check(groups, queries.sigmas)
        already = 0
    evaluator = Evaluator(progress, before=already, total=already + student_cost)

    recordings = [Recording(run, batch, prediction) for batch in micro_batches(groups, micro_batch)]
    denoisers = [evaluator.on(recording.batch, "student") for recording in recordings]
    fit = fit_greedily(recordings, denoisers, queries, targets, held)

    lambdas = np.array([theta[0] if len(theta) else 0.0 for theta in fit.coefficients])
    spent = {"teacher": targets.evaluations, "student": evaluator.spent()}
    report = _report_of_fit(fit, count_latents(groups), held, targets)
    if held:
        checked = micro_batches(groups, micro_batch, only=held)
        verdict = no_harm(
            HeldOut(run, queries, prediction, targets, held, checked, evaluator), fit.corrections, recordings
        )
        lambdas *= verdict.shrunk_to
        report |= verdict.to_json()
        spent |= verdict.evaluations
    return LambdaRow(
        solver=solver_name(solver),
        sigmas=run.sigmas.cpu().double().numpy(),
        evaluations=queries.per_step,
        weights=lambdas,
        prediction=prediction,
        solver_options=options,
        settings={"teacher": targets.teacher, "scale": targets.scale} | settings,
        report=report | {"evaluations": spent},
    )


def _report_of_fit(fit: Fit, latents: int, held: Sequence[int], targets: Targets) -> dict[str, Any]:
    return {
        "fitted_latents": latents - len(held),
        "held_out_latents": len(held),
        "checked": bool(held),
        "teacher_error": targets.own_error,
        "lambda_standard_error": [finite(e[0]) if len(e) else None for e in fit.standard_errors],
        "undetermined": fit.undetermined,
    }


def _settings(groups: Sequence[Group]) -> dict[str, Any]:
    x = groups[0].x
    return {
        "latent_shape": list(x.shape[1:]),
        "dtype": str(x.dtype).removeprefix("torch."),
        "latents": count_latents(groups),
        "groups": len(groups),
    }
