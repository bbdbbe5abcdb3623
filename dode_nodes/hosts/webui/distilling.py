"""Distilling inside the host: one picture is begun, and its sampler fits instead of sampling.

So prompts, CFG, LoRAs, placement and interrupting are the host's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from modules import processing, scripts, sd_samplers, sd_samplers_common, shared
from modules.sd_samplers_kdiffusion import KDiffusionSampler
from torch import Tensor

from ... import __version__
from ...errors import DodeError
from ...fit.consistency import check_consistency, consistency_cost
from ...fit.headline import LATENTS as UNSEEN
from ...fit.latents import Group, Latents
from ...fit.pipeline import Pipeline
from ...fit.progress import Progress, Reporter
from ...fit.quality import START_SOLVER, quality_of, start_schedule
from ...fit.recipe import Recipe
from ...fit.steps import parse_steps
from ...sampling.denoiser import DenoiserProxy
from ...sampling.schedules import make_sigmas, schedules_of
from ...tables.gate import is_line, is_name
from ...tables.table import LambdaTable
from .model_facts import computing_dtype, is_flow, model_facts, noise_schedule, patches_of
from .request import Request

_ONE_OFF = "D-ODE distilling"
_AT_ONCE = 4
"""Latents that fit most GPUs at once; fewer are taken where memory runs out."""


class Distillation:
    """A request on its way to a table.

    Args:
        reporter: told what it may cost, then of every evaluation.

    Raises:
        DodeError: the host is set such that nothing can be fitted.
    """

    def __init__(self, request: Request, reporter: Reporter) -> None:
        if getattr(shared.opts, "skip_early_cond", 0) > 0:
            raise DodeError(
                "set 'Ignore negative prompt during early sampling' to 0 in the settings to distil"
            )
        self._request, self._reporter = request, reporter
        self._pipeline: Pipeline | None = None
        self._facts: dict[str, Any] = {}

    def run(self) -> None:
        """All of it, or as much as there was until it was interrupted; see ``table``."""
        request = self._request
        picture = processing.StableDiffusionProcessingTxt2Img(
            prompt=list(request.prompts), negative_prompt=request.negative_prompt, cfg_scale=request.cfg_scale,
            width=request.width, height=request.height, seed=request.seed, batch_size=len(request.prompts),
            steps=parse_steps(request.steps)[0], sampler_name=_ONE_OFF, scheduler="Automatic",
            do_not_save_samples=True, do_not_save_grid=True,
        )  # fmt: skip
        picture.distilled_cfg_scale = request.distilled_cfg_scale  # where the host has such
        picture.scripts, picture.script_args = scripts.ScriptRunner(), ()
        with _one_off(lambda model: _Distiller(self._inside, model)), closing(picture):
            processing.process_images(picture)

    def table(self) -> LambdaTable | None:
        """What has been found so far; None where that is nothing."""
        rows = [] if self._pipeline is None else self._pipeline.found
        return LambdaTable(rows, model=self._facts) if rows else None

    def _inside(self, model: Any, x: Tensor, extra_args: dict[str, Any]) -> None:
        """In place of sampling.

        Args:
            model: the host's CFGDenoiser.
            x: noise, one for each prompt.
            extra_args: the model's, for them.
        """
        request, loaded = self._request, shared.sd_model
        schedule = noise_schedule(loaded)
        start = start_schedule(flow=is_flow(loaded))
        sigmas = [make_sigmas(start, steps, schedule).to(x.device) for steps in parse_steps(request.steps)]
        self._facts = model_facts(loaded) | {"patches": patches_of(loaded)} | _name_of(loaded)
        generator = torch.Generator().manual_seed(request.seed)
        fitted, unseen = (
            _latents(model, x, extra_args, count, float(sigmas[0][0]), generator)
            for count in (request.latents, max(UNSEEN, len(request.prompts)))
        )
        recipe = Recipe(
            solvers=[START_SOLVER],
            refine_budget=quality_of(request.quality).refine_budget,
            settings=_settings(request, start),
            make_sigmas=schedules_of(schedule),
            or_stock=True,
        )
        recipe = replace(recipe, teacher=replace(recipe.teacher, flow=is_flow(loaded)))
        self._pipeline = Pipeline(fitted, sigmas, recipe, unseen)
        cost, trials = self._pipeline.cost, consistency_cost(fitted)
        self._reporter.begin(f"{cost}; plus {trials} to check the model first", *self._pipeline.remarks)
        middle = float(schedule.sigmas[len(schedule.sigmas) // 2])
        with Progress(trials + cost.total, self._reporter) as work:
            trying, fitting = work.split(trials, cost.total)
            check_consistency(fitted, middle, computing_dtype(loaded), trying)
            self._pipeline.run(fitting)


class _Distiller(KDiffusionSampler):
    """The host's sampler for one picture."""

    def __init__(self, inside: Callable[[Any, Tensor, dict[str, Any]], None], model: Any) -> None:
        super().__init__(self._run, model)
        self._inside = inside

    def _run(
        self, model: Any, x: Tensor, extra_args: dict[str, Any], callback: Any = None, disable: Any = None
    ) -> Tensor:
        with suppress(sd_samplers_common.InterruptedException):  # what has been found by then is kept
            self._inside(model, x, extra_args)
        return torch.zeros_like(x)  # the host makes a picture of it, which nobody sees


class _Unscheduled(DenoiserProxy):
    """The host's denoiser, which counts its evaluations: each is the first, so that prompts do not change over them."""

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        self._model.step = 0
        denoised: Tensor = self._model(x, sigma, **extra_args)
        return denoised


@contextmanager
def _one_off(constructor: Callable[[Any], Any]) -> Iterator[None]:
    """A sampler that the host finds by name for as long as this lasts, and shows nobody."""
    data = sd_samplers_common.SamplerData(_ONE_OFF, constructor, [], {})
    sd_samplers.all_samplers_map[_ONE_OFF] = data
    sd_samplers.get_sampler_and_scheduler.cache_clear()
    try:
        yield
    finally:
        del sd_samplers.all_samplers_map[_ONE_OFF]
        sd_samplers.get_sampler_and_scheduler.cache_clear()


def _latents(
    model: Any, x: Tensor, extra_args: dict[str, Any], count: int, sigma: float, generator: torch.Generator
) -> Latents:
    """The generator's next noises as the host begins with them, in a group for each prompt."""
    scale = (1 + sigma**2) ** 0.5 if shared.opts.sgm_noise_multiplier and sigma > 1 else sigma
    noise = torch.randn(count, *x.shape[1:], generator=generator).to(x) * scale
    groups = [
        Group(_Unscheduled(model), part, _arguments(extra_args, prompt))
        for prompt, part in enumerate(noise.tensor_split(len(x)))
    ]
    return Latents(groups, min(_AT_ONCE, count))


def _arguments(extra_args: dict[str, Any], prompt: int) -> Callable[[Tensor], dict[str, Any]]:
    """The model's arguments for latents of one prompt of the batch."""

    def arguments(indices: Tensor) -> dict[str, Any]:
        n = len(indices)
        cond, uncond, image = (extra_args[name] for name in ("cond", "uncond", "image_cond"))
        own = copy.copy(cond)
        own.batch, own.shape = [cond.batch[prompt]] * n, (n,)
        return extra_args | {
            "cond": own,
            "uncond": None if uncond is None else [uncond[prompt]] * n,
            "image_cond": image[prompt : prompt + 1].expand(n, *image.shape[1:]),
        }

    return arguments


def _settings(request: Request, scheduler: str) -> dict[str, Any]:
    version = processing.program_version()
    return {
        "cfg": request.cfg_scale, "seed": request.seed, "prompts": len(request.prompts), "scheduler": scheduler,
        "host": "WebUI", "package_version": __version__,
    } | ({"host_version": version} if is_name(version) else {})  # fmt: skip


def _name_of(model: Any) -> dict[str, str]:
    name = model.sd_checkpoint_info.name_for_extra
    return {"name": name} if is_line(name) else {}
