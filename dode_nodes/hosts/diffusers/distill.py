"""Distilling in a diffusers pipeline: from prompts to a λ table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ... import __version__
from ...errors import DodeError
from ...fit.consistency import check_consistency, consistency_cost
from ...fit.headline import LATENTS as UNSEEN
from ...fit.known import KnownFit
from ...fit.latents import Latents
from ...fit.pipeline import Pipeline
from ...fit.progress import Progress, Reporter
from ...fit.quality import GOOD, START_SOLVER, quality_of, start_schedule
from ...fit.recipe import Recipe
from ...sampling.schedules import NoiseSchedule, make_sigmas, schedules_of
from ...tables.kept import Kept
from ...tables.row import LambdaRow
from ...tables.table import LambdaTable
from .driven import DrivenPipeline, look
from .fit_key import key_of_fit
from .host_schedule import HostSchedule, public, without_table
from .model_facts import model_facts
from .prompts import Prompt, arguments_of, check_arguments, check_begins_with_noise

_MICRO_BATCH = 4
"""Latents that fit most GPUs at once; fewer are taken where memory runs out."""


@dataclass(frozen=True)
class Request:
    """What to distil.

    Attributes:
        prompts: like those that will be used; each takes an equal share of the latents.
        steps: of the few-step solvers, one row or two for each.
        cfg: the guidance scale.
        negative_prompt: of all prompts that are texts.
        schedule: the students' to begin with, by ComfyUI's names; None for karras, or simple for a flow model.
        quality: how much work it may be: "quick", "good" or "best" (``fit.quality``).
        latents: noises to distil on, of which a quarter is held out; None for what the quality says. Some more are for
            the rows' figures.
        seed: of the noises.
        micro_batch: latents evaluated at a time; None for 4.
        recipe: what to fit, and how; None for what the quality says.
        call: other arguments of the pipeline's call: height, width, a ControlNet's image, …
        redo: fit again what was fitted before, and from the beginning what was ended.
    """

    prompts: Sequence[Prompt]
    steps: Sequence[int]
    cfg: float
    negative_prompt: str | None = None
    schedule: str | None = None
    quality: str = GOOD
    latents: int | None = None
    seed: int = 0
    micro_batch: int | None = None
    recipe: Recipe | None = None
    call: dict[str, Any] = field(default_factory=dict)
    redo: bool = False

    @property
    def count(self) -> int:
        """Of the latents."""
        if self.latents is not None:
            return self.latents
        return quality_of(self.quality).count(len(self.prompts))

    @property
    def wanted(self) -> Recipe:
        """What to fit."""
        if self.recipe is not None:
            return self.recipe
        budget = quality_of(self.quality).refine_budget
        return Recipe(solvers=[START_SOLVER], refine_budget=budget, or_stock=self.schedule is None)


class Distillation:
    """A request on its way to a table.

    Args:
        pipe: the pipeline, with its LoRAs and offloading; it is not changed.
        request: what to distil.
        reporter: told what it may cost, then of every evaluation; what it raises ends the work.

    Raises:
        DodeError: the request does not fit the pipeline.
    """

    def __init__(self, pipe: DiffusionPipeline, request: Request, reporter: Reporter | None = None) -> None:
        self._pipe, self._request, self._reporter = pipe, request, reporter
        self._known: LambdaTable | None = None
        self._host = HostSchedule(without_table(pipe.scheduler.config))
        fewest = max(2, len(request.prompts))
        if not request.prompts or request.count < fewest:
            raise DodeError(
                f"{len(request.prompts)} prompts need at least {fewest} latents, not {request.count}: "
                "some are held out to check λ"
            )
        if any(callable(solver) for solver in request.wanted.solvers):
            raise DodeError("name the solvers: a table cannot hold a function, and pipelines run tables only")
        if self._host.inverted:
            raise DodeError(f"{type(pipe).__name__} cannot be distilled in: its t ascends")
        check_begins_with_noise(pipe)
        check_arguments(pipe, request.call)
        with torch.no_grad():
            self._arguments = arguments = [
                arguments_of(pipe, prompt, request.negative_prompt, request.cfg, request.call)
                for prompt in request.prompts
            ]
        self._latent = look(pipe, arguments[0])
        noise_schedule = self._noise_schedule()
        self._schedules = self._schedules_over(noise_schedule)
        self._facts = model_facts(pipe)
        begins = float(self._schedules[0][0])
        generator = torch.Generator().manual_seed(request.seed)
        self._latents = self._latents_of(arguments, begins, request.count, generator)
        self._unseen = self._latents_of(arguments, begins, max(UNSEEN, len(arguments)), generator)
        self._recipe = self._recipe_over(noise_schedule)
        self._middle = float(noise_schedule.sigmas[len(noise_schedule.sigmas) // 2])
        self._pipeline = self._planned()

    def _planned(self, kept: Kept | None = None) -> Pipeline:
        return Pipeline(self._latents, self._schedules, self._recipe, self._unseen, kept)

    @property
    def remarks(self) -> list[str]:
        """The cost and what else the user should know before it starts, one line each."""
        trials = consistency_cost(self._latents)
        return [f"{self._pipeline.cost}; plus {trials} to check the model first", *self._pipeline.remarks]

    def run(self) -> LambdaTable:
        """All of it; or nothing but the table, where the same was made before."""
        try:
            fit = KnownFit.by(self._key, redo=self._request.redo)
            self._known = fit.table()
            if self._known is not None:
                self._say("this was fitted before, and the same table is used. To fit it again, set redo")
                return self._known
            self._pipeline = self._planned(fit.work)
            self._say(*self.remarks, *fit.remarks)
            self._run()
        finally:
            self._pipe.maybe_free_model_hooks()  # ended calls have left the network where it was
        table = self.table()
        assert table is not None  # noqa: S101  # a pipeline that has run has rows
        fit.finish(table)
        return table

    def _run(self) -> None:
        trials, cost = consistency_cost(self._latents), self._pipeline.cost.total
        with Progress(trials + cost, self._reporter) as work:
            trying, fitting = work.split(trials, cost)
            check_consistency(self._latents, self._middle, self._latent.dtype, trying)
            self._pipeline.run(fitting)

    def _key(self) -> str:
        request = self._request
        parts = {
            "arguments": self._arguments,
            "latent": self._latent._asdict(),
            "drawn": [request.count, request.seed],
            "schedules": self._schedules,
            "recipe": self._recipe.parts,
            "scheduler": public(without_table(self._pipe.scheduler.config)),
            "facts": self._facts,
        }
        return key_of_fit(self._pipe, self._latents, [float(self._schedules[0][0]), self._middle], parts)

    def _say(self, *lines: str) -> None:
        if self._reporter is not None:
            self._reporter.begin(*lines)

    def table(self) -> LambdaTable | None:
        """What has been found so far; None where that is nothing."""
        if self._known is not None:
            return self._known
        rows = [self._kept(row) for row in self._pipeline.found]
        return LambdaTable(rows, model=self._facts) if rows else None

    def _kept(self, row: LambdaRow) -> LambdaRow:
        """Without the shape of latents in a row, which says nothing to anybody."""
        if not self._latent.is_packed(self._host.flow):
            return row
        settings = {name: value for name, value in row.settings.items() if name != "latent_shape"}
        return replace(row, settings=settings)

    def _noise_schedule(self) -> NoiseSchedule:
        """The model's σ, at the size that is asked for."""
        if not self._host.flow:
            return NoiseSchedule.discrete(self._host.trained_sigmas)
        return NoiseSchedule.rectified_flow(self._host.shift(self._latent.mu))

    @property
    def _schedule(self) -> str:
        return self._request.schedule or start_schedule(flow=self._host.flow)

    def _schedules_over(self, noise_schedule: NoiseSchedule) -> list[Tensor]:
        schedules = []
        for steps in dict.fromkeys(self._request.steps):
            sigmas = make_sigmas(self._schedule, steps, noise_schedule)
            if len(sigmas) != steps + 1:
                raise DodeError(
                    f"choose another schedule or number of steps: {self._schedule} makes {len(sigmas) - 1} steps of "
                    f"{steps}"
                )
            schedules.append(sigmas.to(self._latent.device))
        if not schedules:
            raise DodeError("give at least one number of steps")
        return schedules

    def _latents_of(
        self, arguments: Sequence[dict[str, Any]], sigma: float, count: int, generator: torch.Generator
    ) -> Latents:
        """The generator's next noises, and the prompts that they are for."""
        request, latent, flow = self._request, self._latent, self._host.flow
        noise = torch.randn(count, *latent.shape, generator=generator).to(latent.device)
        scale = self._host.init_noise_sigma(sigma)
        groups = [
            DrivenPipeline(self._pipe, of_prompt, latent, flow=flow).group(part, scale)
            for of_prompt, part in zip(arguments, noise.tensor_split(len(arguments)), strict=True)
        ]
        return Latents(groups, request.micro_batch or _MICRO_BATCH, free_first=not flow)

    def _recipe_over(self, noise_schedule: NoiseSchedule) -> Recipe:
        request, recipe = self._request, self._request.wanted
        facts = {
            "cfg": request.cfg, "seed": request.seed, "prompts": len(request.prompts), "host": "diffusers",
            "scheduler": self._schedule, "host_version": diffusers.__version__, "package_version": __version__,
        }  # fmt: skip

        return replace(
            recipe,
            teacher=replace(recipe.teacher, flow=self._host.flow),
            settings=dict(recipe.settings) | facts,
            make_sigmas=schedules_of(noise_schedule),
        )


def distill_pipeline(
    pipe: DiffusionPipeline,
    prompts: Sequence[Prompt],
    steps: Sequence[int],
    cfg: float,
    *,
    negative_prompt: str | None = None,
    schedule: str | None = None,
    quality: str = GOOD,
    latents: int | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    recipe: Recipe | None = None,
    reporter: Reporter | None = None,
    redo: bool = False,
    **call: Any,
) -> LambdaTable:
    """Make a λ table for a pipeline: a teacher of many steps runs in it once, and few-step solvers are fitted to it.

    table = distill_pipeline(pipe, ["a cat", "a street at night"], steps=[6], cfg=5.0, height=512, width=512)

    The pipeline runs as it is, with its LoRAs, ControlNet and offloading; it is not changed.

    Args:
        pipe: from noise to latents, by text; not img2img.
        prompts, steps, cfg, negative_prompt, schedule, quality, latents, seed, micro_batch, recipe, call, redo: see
            ``Request``.
        reporter: told what it may cost, then of every evaluation; what it raises ends the work. The same call goes on
            from there, and where it came to its end, it returns the same table (see ``fit.known``).

    Raises:
        DodeError: something does not fit the pipeline, or its answers are not finite.
    """
    request = Request(
        prompts,
        steps,
        cfg,
        negative_prompt,
        schedule,
        quality,
        latents,
        seed,
        micro_batch,
        recipe,
        dict(call),
        redo,
    )
    return Distillation(pipe, request, reporter).run()
