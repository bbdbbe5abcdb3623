"""The node that finds the best stock sampler for a model and a number of steps."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ....fit.quality import START_SOLVER, start_schedule
from ....fit.recipe import Recipe
from ....fit.stock import Found
from ....tables.describe import amount, number, setting_text
from ....tables.picture_grid import ranking_figure
from ..guiders import Conditioning, Guider, guiders_for
from ..job import Request, schedule, schedules_of
from ..messages import show_text
from ..model_facts import is_flow
from ..pictures import draw
from ..prompts import check_empty, fitting_latent
from ..reporter import ProgressReporter
from ..stock_job import as_host_runs, find_stock
from .inputs import CATEGORY, cfg_input, conditioning_inputs, guider_input, schema, seed_input

_LATENTS = 16


class FindStock(io.ComfyNode):
    """Which sampler and scheduler for this model at so many steps?"""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="DODE_FindStock",
            display_name="Find best stock sampler",
            category=CATEGORY,
            description="Which of ComfyUI's own samplers and schedulers is best for this model at so many steps? Runs a "
            "slow, exact sampler once, races a dozen settings against it on 16 noises, and gives out the winner.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", optional=True, tooltip="The model, with the LoRAs and patches you sample with."
                ),
                *conditioning_inputs(optional=True),
                cfg_input(guider=True),
                io.Latent.Input("latent", tooltip="An empty latent of the size you sample at."),
                io.Int.Input(
                    "steps", default=8, min=2, max=100, tooltip="The number of steps you want to sample with."
                ),
                seed_input("Seed of the noises.", changes=False),
                guider_input(),
            ],
            outputs=[
                io.Sampler.Output(
                    "sampler", display_name="sampler", tooltip="The winner, for SamplerCustom."
                ),
                io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="Its schedule, for SamplerCustom."),
                io.String.Output("summary", display_name="summary", tooltip="The winner, and all others."),
                io.Image.Output(
                    "report", display_name="report", tooltip="How far each ends from the slow sampler."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        cfg: float,
        latent: dict[str, Any],
        steps: int,
        seed: int,
        model: ModelPatcher | None = None,
        positive: Conditioning | None = None,
        negative: Conditioning | None = None,
        guider: Guider | None = None,
    ) -> io.NodeOutput:
        """Race, report."""
        node_id = cls.hidden.unique_id
        guiders = guiders_for(guider, model, {"positive": positive}, negative, cfg)
        model = guiders[0].model_patcher
        check_empty(model, latent)
        scheduler = start_schedule(flow=is_flow(model))
        request = Request(
            guiders=guiders,
            latent=fitting_latent(model, latent),
            count=_LATENTS,
            seed=seed,
            schedules=[schedule(model, START_SOLVER, scheduler, steps)],
            recipe=Recipe(solvers=[START_SOLVER], make_sigmas=schedules_of(model)),
        )
        with ProgressReporter(model, request.latent, node_id) as reporter:
            found = find_stock(request, reporter)
        first, *_ = lines = _lines(found, steps)
        show_text(node_id, first)
        report = draw(
            ranking_figure,
            [each.name for each in found.ranked],
            [each.mean for each in found.ranked],
        )
        return io.NodeOutput(
            *as_host_runs(found), "\n".join(lines), report, ui=ui.PreviewImage(report, cls=cls)
        )


def _lines(found: Found, steps: int) -> list[str]:
    """The winner, how to set it, and all of them."""
    setting, best = found.setting, found.best
    plain = not best.options and not best.discard_penultimate
    how = (
        f"in KSampler: sampler_name {setting.sampler}, scheduler {setting.scheduler}"
        if plain
        else "connect sampler and sigmas to SamplerCustom: a KSampler has no such setting"
    )
    return [
        f"best of {setting.tried} at {amount(steps, steps)}: {setting_text(setting)}",
        how,
        f"distance to the slow sampler (RMS, {setting.latents} held-out noises): {number(setting.error)}",
        "",
        "all of them, by geometric mean distance (those that fell out early ran on fewer noises):",
        *(f"{number(each.mean)}  {each.name}" for each in found.ranked),
    ]
