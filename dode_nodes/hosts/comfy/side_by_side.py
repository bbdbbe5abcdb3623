"""Several samplers over the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...fit.teacher import Teacher
from ...sampling.solvers import resolve
from ...tables.row import LambdaRow
from .prompts import Conditioning
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
            f"{stock.solver}, {stock.nfe} evaluations",
            comfy.samplers.KSAMPLER(resolve(stock.solver), dict(stock.solver_options)),
            schedule,
        ),
        Contender(
            f"{name}, {row.nfe} evaluations",
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
    model: ModelPatcher,
    contenders: Sequence[Contender],
    noise: torch.Tensor,
    cfg: float,
    positive: Conditioning,
    negative: Conditioning,
    seed: int,
) -> list[torch.Tensor]:
    """Each contender's latents, as SamplerCustom would make them, under one progress bar."""
    steps = [len(contender.sigmas) - 1 for contender in contenders]
    callback = latent_preview.prepare_callback(model, sum(steps))
    results = []
    for i, contender in enumerate(contenders):
        before = sum(steps[:i])
        samples = comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            contender.sampler,
            contender.sigmas,
            positive,
            negative,
            torch.zeros_like(noise),
            callback=lambda step, x0, x, _, before=before: callback(before + step, x0, x, sum(steps)),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        results.append(samples)
    return results
