"""Several samplers over the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...fit.memory import BatchLimit
from ...fit.recipe import usual_steps
from ...fit.teacher import Teacher
from ...sampling.denoiser import DenoiserProxy
from ...sampling.solvers import resolve
from ...tables.describe import amount
from ...tables.row import LambdaRow
from .guiders import Guider, one_prompt_per_row, run_guider
from .job import schedules_of
from .model_facts import is_flow
from .run_row import row_sampler
from .usage import opponent_of, stock_row


class Contender(NamedTuple):
    """A sampler on its schedule, and words for it."""

    label: str
    sampler: comfy.samplers.Sampler
    sigmas: torch.Tensor


@dataclass(frozen=True)
class Baseline:
    """The stock sampler that a row is compared with.

    Attributes:
        name: in words.
        sampler: what runs.
        sigmas: its schedule.
        evaluations: what it takes.
        with_steps: its schedule with another number of steps; None where that is not known.
    """

    name: str
    sampler: comfy.samplers.Sampler
    sigmas: torch.Tensor
    evaluations: int
    with_steps: Callable[[int], torch.Tensor] | None = None

    def contender(self, steps: int | None = None) -> Contender:
        """It, with as many steps, or with its own."""
        if steps is None or self.with_steps is None:
            return Contender(
                f"{self.name}, {amount(len(self.sigmas) - 1, self.evaluations)}", self.sampler, self.sigmas
            )
        return Contender(f"{self.name}, {steps} steps", self.sampler, self.with_steps(steps))


def baseline_of(row: LambdaRow, model: ModelPatcher) -> Baseline:
    """The best stock setting that was found when the row was made; else the plain solver that it began with."""
    make_sigmas = schedules_of(model)
    stock, name, setting = opponent_of(row, make_sigmas)
    sampler = comfy.samplers.KSAMPLER(resolve(stock.solver), dict(stock.solver_options))
    sigmas = torch.tensor(stock.sigmas, dtype=torch.float32)
    if setting is None:
        return Baseline(name, sampler, sigmas, stock.nfe)
    scheduler, discard = setting.scheduler, setting.discard_penultimate
    return Baseline(
        name, sampler, sigmas, stock.nfe, lambda steps: make_sigmas(scheduler, steps, discard).float()
    )


def chosen_baseline(sampler: comfy.samplers.Sampler, sigmas: torch.Tensor) -> Baseline:
    """The user's own."""
    function = getattr(sampler, "sampler_function", sampler)
    name = getattr(function, "__name__", type(function).__name__).removeprefix("sample_")
    return Baseline(f"chosen: {name}", sampler, sigmas, len(sigmas) - 1)


def dode_and_teacher(row: LambdaRow, scale: int, model: ModelPatcher, node_id: str | None) -> list[Contender]:
    """A row, and its teacher with ``scale`` steps per step of the row's plain solver, as in a fit."""
    plain, flow = stock_row(row), is_flow(model)
    schedule = torch.tensor(plain.sigmas, dtype=torch.float32)
    teacher = _teacher_here(row, scale, flow)
    grid = teacher.grid([], [usual_steps(schedule, schedules_of(model), flow=flow)]).float()
    name = f"D-{plain.solver}, refined" if row.is_refined else f"D-{plain.solver}"
    return [
        Contender(
            f"{name}, {amount(row.paid_steps, row.nfe)}",
            row_sampler(lambda sigmas: row, node_id=node_id),
            torch.tensor(row.sigmas, dtype=torch.float32),
        ),
        Contender(
            f"teacher: {teacher.name}, {len(grid) - 1} steps",
            comfy.samplers.KSAMPLER(resolve(teacher.solver)),
            grid,
        ),
    ]


def _teacher_here(row: LambdaRow, scale: int, flow: bool) -> Teacher:
    """The row's teacher; where this ComfyUI does not have it, the usual one."""
    usual = Teacher(scale=scale, flow=flow)
    name = row.settings.get("teacher", usual.name)
    try:
        resolve(name)
    except DodeError:
        return usual
    return Teacher(name, scale, flow)


def sample_all(
    guider: Guider,
    contenders: Sequence[Contender],
    noise: torch.Tensor,
    like: Any,
    seed: int,
    limit: BatchLimit,
) -> list[torch.Tensor]:
    """Each contender's latents, packed, as SamplerCustomAdvanced would make them, under one progress bar.

    Args:
        guider: brings the model and the prompts.
        noise: of all latents, packed, ``[B, C, *spatial]``; ``like`` is a latent of its shape.
        limit: how many latents fit into memory at once.
    """
    guiders = one_prompt_per_row(guider, like)
    shares = [torch.arange(len(noise))[i :: len(guiders)] for i in range(min(len(guiders), len(noise)))]
    runs = [(contender, i) for contender in contenders for i in range(len(shares))]
    steps = [len(contender.sigmas) - 1 for contender, _ in runs]
    callback = latent_preview.prepare_callback(guider.model_patcher, sum(steps))
    parts = []
    for run, (contender, i) in enumerate(runs):
        before = sum(steps[:run])
        part = run_guider(
            guiders[i],
            noise[shares[i]],
            like,
            _InParts(contender.sampler, limit),
            contender.sigmas,
            callback=lambda step, x0, x, _, before=before: callback(before + step, x0, x, sum(steps)),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        parts.append(part.to(comfy.model_management.intermediate_device()))
    order = torch.cat(shares).argsort()
    each = len(shares)
    return [torch.cat(parts[first : first + each])[order] for first in range(0, len(parts), each)]


class _InParts(comfy.samplers.Sampler):
    """A sampler whose guider is asked about as many latents at once as fit into memory."""

    brings_lambda = True  # 'Apply λ to model' keeps out of it

    def __init__(self, sampler: comfy.samplers.Sampler, limit: BatchLimit) -> None:
        self._sampler = sampler
        self._limit = limit

    def sample(self, model_wrap: Guider, *args: Any, **kwargs: Any) -> torch.Tensor:
        samples: torch.Tensor = self._sampler.sample(_GuiderInParts(model_wrap, self._limit), *args, **kwargs)
        return samples


class _GuiderInParts(DenoiserProxy):
    def __init__(self, guider: Guider, limit: BatchLimit) -> None:
        super().__init__(guider)
        self._limit = limit

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra_args: Any) -> torch.Tensor:
        return self._limit.evaluate(x, lambda part: self._model(x[part], sigma[part], **extra_args))
