"""The sampler D-ODE: the host's own KDiffusionSampler, with the σ and the numbers of a table's row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from modules import processing, sd_samplers_common
from modules.sd_samplers_kdiffusion import KDiffusionSampler
from torch import Tensor

from ...errors import DodeError
from ...sampling.denoiser import Held
from ...sampling.sample import check_finite, dode_denoiser
from ...sampling.solvers import resolve
from ...tables.choice import Part
from ...tables.remarks import steps_remarks, usage_remarks
from ...tables.table import LambdaTable
from . import passes, picture, samplers
from .model_facts import check_model
from .names import SAMPLER


def prepare(p: Any, asked: str | None) -> None:
    """Choose a picture's table, and in txt2img its number of steps, before prompts are scheduled over them."""
    chosen = picture.begin(p, asked)
    if chosen.table is None or p.sampler_name != SAMPLER or not _is_txt2img(p):
        return
    with suppress(DodeError):  # the pass will say why
        part = passes.for_steps(chosen.table, p.steps, float(p.cfg_scale))
        chosen.tell(p, *steps_remarks(part, p.steps, chosen.table))
        p.steps = part.steps  # an infotext states what has run


_PIXELS = 8
"""Along a side of a picture, for each number of a latent: these hosts have no other models."""


class _Running(NamedTuple):
    """What a pass runs.

    Attributes:
        part: of a row.
        lead: so many σ that the host leaves out come before it.
        table: what people know its table by.
    """

    part: Part
    lead: int
    table: str


class DodeSampler(KDiffusionSampler):
    """Runs what was chosen for a picture; where that is nothing, what the host's own sampler would, to the pixel."""

    def __init__(self, model: Any) -> None:
        super().__init__(self._run, model)
        self._running: _Running | None = None

    def sample(
        self,
        p: Any,
        x: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Any = None,
    ) -> Tensor:
        """From noise. A number of steps that the table does not have becomes the nearest one."""
        asked: int = steps or p.steps
        self._choose(p, lambda table: passes.for_steps(table, asked, _cfg(p)))
        run = asked if self._running is None else self._running.part.steps
        return super().sample(p, x, conditioning, unconditional_conditioning, run, image_conditioning)

    def sample_img2img(
        self,
        p: Any,
        x: Tensor,
        noise: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Any = None,
    ) -> Tensor:
        """From a picture: the last steps of a row that has such."""
        whole, begin = sd_samplers_common.setup_img2img_steps(p, steps)
        run, self._running = begin + 1, None
        if run <= whole:  # else nothing is to be repainted
            sigma = self._stock_start(p, whole, whole - run)
            self._choose(
                p, lambda table: passes.for_last_steps(table, whole, run, sigma, _cfg(p)), lead=whole - run
            )
        return super().sample_img2img(
            p, x, noise, conditioning, unconditional_conditioning, steps, image_conditioning
        )

    def get_sigmas(self, p: Any, steps: int) -> Tensor:
        """The row's. Of the host's schedule for a part it leaves out the first: as many come before the row's."""
        if self._running is None:
            sigmas: Tensor = super().get_sigmas(p, steps)
            return sigmas
        own = self._running.part.sigmas
        return torch.cat([own[:1].expand(self._running.lead), own])

    def _stock_start(self, p: Any, steps: int, step: int) -> float:
        """The σ of a step of the host's schedule. What the host notes of that schedule is not of this picture."""
        other = copy.copy(p)
        other.extra_generation_params = {}
        return float(super().get_sigmas(other, steps)[step])

    def _choose(self, p: Any, part_of: Callable[[LambdaTable], Part], lead: int = 0) -> None:
        """The part of a row that runs in this pass, if one does; else it is said why none does."""
        self._running = None
        chosen = picture.picture_of(p)
        try:
            if chosen.table is None:
                raise DodeError(chosen.why)
            if p.sampler_noise_scheduler_override:
                raise DodeError("another script sets the schedule")
            chosen.tell(p, *check_model(chosen.table, p.sd_model))
            part = part_of(chosen.table)
        except DodeError as error:
            chosen.tell_stock(p, str(error))
            return
        self._running = _Running(part, lead, chosen.table.called)
        last = f"the last {part.steps} steps of " if part.start else ""
        chosen.tell(p, f"{chosen.why}. It runs {last}{part.row.label}")

    def _run(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Any = None,
        disable: bool | None = None,
    ) -> Tensor:
        """What the host calls with its CFGDenoiser."""
        settings: dict[str, Any] = {"extra_args": extra_args, "callback": callback, "disable": disable}
        if self._running is None:
            own = samplers.stock().constructor(self.model_wrap.inner_model)
            samples: Tensor = own.func(model, x, sigmas=sigmas, **settings)
            return samples
        row = self._running.part.row
        picture.picture_of(self.p).tell(self.p, *usage_remarks(row, _cfg(self.p), x, _PIXELS))
        solver = resolve(row.solver)
        denoiser = dode_denoiser(model, sigmas, row, solver, _held(model))
        samples = solver(denoiser, x, sigmas, **settings, **row.solver_options)
        return check_finite(samples, row, self._running.table)


def _held(model: Any) -> Held | None:
    """What a mask keeps, or blends: there the plain sampler runs, for the host lays the mask on its own answers."""
    return None if model.mask is None else lambda sigma: model.mask > 0


def _cfg(p: Any) -> float:
    """The guidance of this pass: Forge has one for the second."""
    return float(getattr(p, "hr_cfg", p.cfg_scale) if p.is_hr_pass else p.cfg_scale)


def _is_txt2img(p: Any) -> bool:
    return isinstance(p, processing.StableDiffusionProcessingTxt2Img)
