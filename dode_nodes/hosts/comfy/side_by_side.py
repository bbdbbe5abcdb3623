"""Several samplers over the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...errors import DodeError
from ...fit.memory import BatchLimit
from ...fit.teacher import Teacher
from ...sampling.denoiser import DenoiserProxy
from ...sampling.solvers import resolve
from ...tables.describe import amount
from ...tables.row import LambdaRow
from .guiders import Guider, one_prompt_per_row, run_guider
from .run_row import row_sampler
from .usage import stock_row


class Contender(NamedTuple):
    """A sampler on its schedule, and words for it."""

    label: str
    sampler: comfy.samplers.Sampler
    sigmas: torch.Tensor


def stock_dode_teacher(row: LambdaRow, scale: int, flow: bool, node_id: str | None) -> list[Contender]:
    """A row between the plain solver that it began with and its teacher, ``scale`` teacher steps per step."""
    stock = stock_row(row)
    schedule = torch.tensor(stock.sigmas, dtype=torch.float32)
    teacher = _teacher_here(row, scale, flow)
    grid = teacher.grid([schedule.tolist()], [schedule]).float()
    name = f"D-{stock.solver}, refined" if row.is_refined else f"D-{stock.solver}"
    return [
        Contender(
            f"{stock.solver}, {amount(stock.steps, stock.nfe)}",
            comfy.samplers.KSAMPLER(resolve(stock.solver), dict(stock.solver_options)),
            schedule,
        ),
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
