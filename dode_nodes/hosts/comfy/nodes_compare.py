"""The node that sets stock, D-ODE and teacher side by side."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ... import plots
from ...groups import root_mean_square
from ...solvers import resolve
from ...table import LambdaTable
from ...teacher import refined_grid
from .common import CATEGORY, cfg_input, conditioning_inputs, seed_input, solver_filter, table_input
from .facts import check_model, is_flow
from .messages import remark
from .pictures import draw
from .rows import row_for_steps, sigmas_of, stock_row
from .sampling import dode_sampler, stock_sampler
from .session import Conditioning, check_empty, noise_per_latent


class CompareSamplers(io.ComfyNode):
    """Stock solver, D-ODE solver and teacher from the same fresh noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_Compare",
            display_name="Compare samplers (D-ODE)",
            category=CATEGORY,
            description="Samples with the row's plain solver (a refined row's is the one that it began with, on "
            "its schedule), with the row, and with the many-step teacher, from the same fresh noise, and "
            "measures both against the teacher.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model that the table was made for."),
                *conditioning_inputs(),
                cfg_input(),
                io.Latent.Input("latent", tooltip="An empty latent of the size to compare at."),
                table_input(),
                io.Int.Input("steps", default=8, min=1, max=1000, tooltip="Steps of the row to compare."),
                solver_filter(),
                io.Int.Input("pictures", default=4, min=1, max=64, tooltip="How many noises to compare on."),
                seed_input(
                    "Seed of the noises. Take another one than the table was distilled with.", default=1
                ),
                io.Int.Input(
                    "scale",
                    default=10,
                    min=1,
                    max=100,
                    tooltip="Teacher steps per step of the row.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the pictures for the grid. Without it: numbers only.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "grid", display_name="grid", tooltip="Rows: stock, D-ODE, teacher. Columns: noises."
                ),
                io.String.Output(
                    "numbers", display_name="numbers", tooltip="RMS distance to the teacher, in the latent."
                ),
                io.Latent.Output("stock", display_name="stock", tooltip="The plain solver's latents."),
                io.Latent.Output("dode", display_name="D-ODE", tooltip="The D-ODE solver's latents."),
                io.Latent.Output("teacher", display_name="teacher", tooltip="The teacher's latents."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Conditioning,
        negative: Conditioning,
        cfg: float,
        latent: dict[str, Any],
        table: LambdaTable,
        steps: int,
        solver: str,
        pictures: int,
        seed: int,
        scale: int,
        vae: Any = None,
    ) -> io.NodeOutput:
        """Sample three times, measure, draw."""
        check_empty(latent)
        check_model(table, model)
        row = row_for_steps(table, steps, solver)
        if seed == row.settings.get("seed"):
            remark(cls.hidden.unique_id, ["this is the seed λ was distilled on: the comparison flatters it"])
        stock = stock_row(row)
        sigmas = sigmas_of(stock, 1.0)
        teacher = row.settings.get("teacher", "dpmpp_2m")
        grid = refined_grid([sigmas.tolist()], [sigmas], scale, is_flow(model)).float()
        name = f"D-{stock.solver}, refined" if row.is_refined else f"D-{stock.solver}"
        runs = {
            f"{stock.solver}, {stock.nfe} evaluations": (stock_sampler(stock), sigmas),
            f"{name}, {row.nfe} evaluations": (
                dode_sampler(LambdaTable([row], model=table.model), solver, cls.hidden.unique_id),
                sigmas_of(row, 1.0),
            ),
            f"teacher: {teacher}, {len(grid) - 1} steps": (comfy.samplers.KSAMPLER(resolve(teacher)), grid),
        }
        empty = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        noise = noise_per_latent(empty, seed, pictures)
        step_counts = [len(schedule) - 1 for _, schedule in runs.values()]
        callback = latent_preview.prepare_callback(model, sum(step_counts))
        results: list[torch.Tensor] = []
        for i, (sampler, schedule) in enumerate(runs.values()):
            before = sum(step_counts[:i])
            samples = comfy.sample.sample_custom(
                model,
                noise,
                cfg,
                sampler,
                schedule,
                positive,
                negative,
                torch.zeros_like(noise),
                callback=lambda step, x0, x, _, before=before: callback(
                    before + step, x0, x, sum(step_counts)
                ),
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=seed,
            )
            results.append(samples)
        errors = [root_mean_square(result - results[-1]) for result in results[:2]]
        labels = list(runs)
        lines = [
            f"{label}: {error:.4f} from the teacher" for label, error in zip(labels, errors, strict=False)
        ]
        numbers = "\n".join([*lines, f"ratio {errors[1] / errors[0]:.2f}" if errors[0] else ""])
        pictures_of = [None if vae is None else _decoded(vae, result) for result in results]
        image = draw(plots.comparison_figure, [*lines, labels[-1]], pictures_of, errors)
        return io.NodeOutput(
            image, numbers, *({"samples": result} for result in results), ui=ui.PreviewImage(image, cls=cls)
        )


def _decoded(vae: Any, samples: torch.Tensor) -> torch.Tensor:
    """Pictures ``[B, H, W, 3]``; of a video, its first frame."""
    images = vae.decode(samples)
    return images[:, 0] if images.ndim == 5 else images
