"""The node that shows stock, D-ODE and teacher side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ....errors import DodeError
from ....fit.latents import nearest_to_their_own, root_mean_square
from ....fit.memory import BatchLimit
from ....fit.stock import steps_needed
from ....sigmas import check_schedules
from ....tables.choice import part_for_steps
from ....tables.picture_grid import comparison_figure
from ....tables.remarks import steps_remarks
from ....tables.table import LambdaTable
from ..guiders import Conditioning, Guider, guidance_scale, guiders_for
from ..messages import drop_preview, remark
from ..model_facts import check_model, check_no_cache
from ..pictures import draw
from ..prompts import check_empty, fitting_latent, noise_per_latent
from ..side_by_side import baseline_of, chosen_baseline, dode_and_teacher, sample_all
from ..streams import pictures_of, unpacked
from ..usage import check_solver_is_here
from .inputs import (
    CATEGORY,
    cfg_input,
    conditioning_inputs,
    filtered_solver,
    guider_input,
    schema,
    seed_input,
    solver_filter,
    table_input,
)


class CompareSamplers(io.ComfyNode):
    """Stock solver, D-ODE solver and teacher from the same fresh noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="DODE_Compare",
            display_name="Compare samplers (D-ODE)",
            category=CATEGORY,
            description="Samples the same new noises with a stock sampler, with the table, and with the slow teacher. "
            "Measures how far the first two end from the teacher. The stock sampler is the best that was found "
            "for this model when the table was made, or the one that you connect.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", optional=True, tooltip="The model the table was made for."),
                *conditioning_inputs(optional=True),
                cfg_input(guider=True),
                io.Latent.Input("latent", tooltip="An empty latent of the size to compare at."),
                table_input(),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="Number of steps. If the table has no row with that many, the nearest is compared.",
                ),
                solver_filter(),
                io.Int.Input(
                    "pictures",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="How many noises to compare on. The first eight are shown; the numbers are of all of them.",
                ),
                seed_input("Seed of the noises. Use a different one than in Distill λ.", default=1),
                io.Int.Input(
                    "scale",
                    default=10,
                    min=1,
                    max=100,
                    tooltip="Teacher steps for each step of the row.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the pictures for the grid. Without a VAE, only the numbers are shown.",
                ),
                guider_input(),
                io.Sampler.Input(
                    "stock_sampler",
                    optional=True,
                    tooltip="The stock sampler to compare with, such as that of Find best stock sampler. Needs "
                    "stock_sigmas, too.",
                ),
                io.Sigmas.Input(
                    "stock_sigmas",
                    optional=True,
                    tooltip="The schedule of stock_sampler, with as many steps.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "grid",
                    display_name="grid",
                    tooltip="Rows: stock, D-ODE, teacher, and four times the difference to the teacher. One column per "
                    "noise.",
                ),
                io.String.Output(
                    "numbers",
                    display_name="numbers",
                    tooltip="RMS distance to the teacher, measured in the latent; how many steps the stock sampler would "
                    "need; how many previews are nearest to their own finished picture.",
                ),
                io.Latent.Output("stock", display_name="stock", tooltip="The stock sampler's latents."),
                io.Latent.Output("dode", display_name="D-ODE", tooltip="The D-ODE solver's latents."),
                io.Latent.Output("teacher", display_name="teacher", tooltip="The teacher's latents."),
            ],
        )

    @classmethod
    def execute(
        cls,
        cfg: float,
        latent: dict[str, Any],
        table: LambdaTable,
        steps: int,
        solver: str,
        pictures: int,
        seed: int,
        scale: int,
        model: ModelPatcher | None = None,
        positive: Conditioning | None = None,
        negative: Conditioning | None = None,
        vae: Any = None,
        guider: Guider | None = None,
        stock_sampler: comfy.samplers.Sampler | None = None,
        stock_sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        """Sample three times, measure, draw."""
        node_id = cls.hidden.unique_id
        (guider,) = guiders_for(guider, model, {"positive": positive}, negative, cfg)
        model = guider.model_patcher
        check_empty(model, latent)
        check_no_cache(model)
        if (stock_sampler is None) != (stock_sigmas is None):
            raise DodeError("connect both stock_sampler and stock_sigmas, or neither")
        part = part_for_steps(
            table, steps, solver=filtered_solver(solver), cfg=guidance_scale(guider), nearest=True
        )
        row = part.row
        check_solver_is_here(row, table)
        remarks = [*check_model(table.model, model), *steps_remarks(part, steps, table)]
        if seed == row.settings.get("seed"):
            remarks.append(
                "use another seed: λ was distilled on this one, so it looks better here than it is"
            )
        if "teacher_cfg" in row.settings:
            remarks.append(
                "this table follows another model, but the teacher here is the model itself with many steps: trust the "
                "report of Distill λ"
            )
        remark(node_id, remarks)
        if stock_sampler is None or stock_sigmas is None:
            baseline = baseline_of(row, model)
        else:
            check_schedules([stock_sigmas])
            baseline = chosen_baseline(stock_sampler, stock_sigmas.float())
        contenders = [baseline.contender(), *dode_and_teacher(row, scale, model, node_id)]
        empty = fitting_latent(model, latent)
        noise, limit = noise_per_latent(empty, seed, pictures), BatchLimit()
        results = sample_all(guider, contenders, noise, empty, seed, limit)
        *few, teacher = results
        errors = [root_mean_square(result - teacher) for result in few]
        needed = None
        if baseline.with_steps is not None and errors[1] < errors[0]:

            def error_with(count: int) -> float:
                (result,) = sample_all(guider, [baseline.contender(count)], noise, empty, seed, limit)
                return root_mean_square(result - teacher)

            needed = steps_needed(row.nfe, errors[1], error_with)
        if limit.size is not None:
            remark(node_id, [f"memory ran out: latents were evaluated {limit.size} at a time"])
        labels = [contender.label for contender in contenders]
        lines = [
            f"{label}: {error:.4f} from the teacher" for label, error in zip(labels, errors, strict=False)
        ]
        numbers = "\n".join([*lines, *_conclusions(few, teacher, errors, row.nfe, needed)])
        latents = [unpacked(result, empty) for result in results]
        drop_preview(node_id)
        image = draw(comparison_figure, [*lines, labels[-1]], _pictures(vae, latents, node_id), errors)
        return io.NodeOutput(
            image, numbers, *({"samples": each} for each in latents), ui=ui.PreviewImage(image, cls=cls)
        )


def _conclusions(
    few: Sequence[torch.Tensor],
    teacher: torch.Tensor,
    errors: Sequence[float],
    evaluations: int,
    needed: int | None,
) -> list[str]:
    """What follows, in everyone's words."""
    lines = [f"ratio {errors[1] / errors[0]:.2f}"] if errors[0] else []
    if needed is not None:
        steps = f"more than {2 * evaluations}" if needed > 2 * evaluations else str(needed)
        lines.append(f"D-ODE with {evaluations} evaluations is as near as the stock sampler with {steps}")
    if len(teacher) > 1:
        own = [nearest_to_their_own(result, teacher) for result in few]
        lines.append(
            f"of {len(teacher)} previews, {own[1]} are nearest to their own finished picture; "
            f"of the stock sampler's, {own[0]}"
        )
    return lines


def _pictures(vae: Any, results: list[Any], node_id: str | None) -> list[torch.Tensor | None]:
    """Each result decoded; None for all of them where they cannot be, or are no pictures."""
    try:
        decoded = [None if vae is None else _decoded(vae, result) for result in results]
    except comfy.model_management.InterruptProcessingException:  # the Cancel button
        raise
    except Exception as error:  # out of memory, a VAE of another model: the numbers are worth more
        remark(node_id, [f"no pictures: the VAE could not decode the latents: {error}"])
        decoded = [None]
    return [None] * len(results) if any(images is None for images in decoded) else decoded


def _decoded(vae: Any, samples: Any) -> torch.Tensor | None:
    """Pictures ``[B, H, W, 3]`` on the CPU; of a video, its first frame. None for sound."""
    images = vae.decode(pictures_of(samples))
    images = images[:, 0] if images.ndim == 5 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        return None
    return images.float().cpu()
