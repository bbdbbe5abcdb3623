"""The nodes that sample with λ."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...table import LambdaTable
from .common import CATEGORY, cfg_input, conditioning_inputs, seed_input, solver_filter, table_input
from .facts import check_model
from .messages import remark
from .rows import row_for_steps, rows_of, sigmas_of
from .sampling import apply_to_model, dode_sampler
from .session import Conditioning


def _steps_input() -> io.Input:
    return io.Int.Input(
        "steps",
        default=8,
        min=1,
        max=1000,
        tooltip="Steps of the row to use. The table must have a row of that many steps.",
    )


def _denoise_input() -> io.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Below 1 (img2img), the last round(steps × denoise) steps of the row are run: unlike "
        "KSampler, which takes the tail of a longer schedule, because λ belong to the row's σ.",
    )


class DodeSampler(io.ComfyNode):
    """A SAMPLER that uses λ."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_Sampler",
            display_name="D-ODE sampler",
            category=CATEGORY,
            description="A sampler for SamplerCustom and SamplerCustomAdvanced. The row is found by the σ it "
            "is run over: take them from D-ODE sigmas.",
            inputs=[table_input(), solver_filter()],
            outputs=[io.Sampler.Output("sampler", display_name="sampler", tooltip="The D-ODE sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, table: LambdaTable, solver: str) -> io.NodeOutput:
        """Make the sampler."""
        rows_of(table, solver)
        return io.NodeOutput(dode_sampler(table, solver, cls.hidden.unique_id))


class DodeSigmas(io.ComfyNode):
    """The σ of a row."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_Sigmas",
            display_name="D-ODE sigmas",
            category=CATEGORY,
            description="The σ that a row of the table was distilled on, or the last of them.",
            inputs=[table_input(), _steps_input(), _denoise_input(), solver_filter()],
            outputs=[
                io.Sigmas.Output(
                    "sigmas", display_name="sigmas", tooltip="For the sigmas input of a sampler node."
                )
            ],
        )

    @classmethod
    def execute(cls, table: LambdaTable, steps: int, denoise: float, solver: str) -> io.NodeOutput:
        """Look the σ up."""
        return io.NodeOutput(sigmas_of(row_for_steps(table, steps, solver), denoise))


class DodeKSampler(io.ComfyNode):
    """KSampler with a table in place of sampler and scheduler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_KSampler",
            display_name="KSampler (D-ODE)",
            category=CATEGORY,
            description="KSampler with a λ table in place of sampler and scheduler.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the table was made for."),
                seed_input("Seed of the noise."),
                _steps_input(),
                cfg_input(),
                *conditioning_inputs(),
                io.Latent.Input(
                    "latent_image", tooltip="The latent to denoise: empty, or a picture's for img2img."
                ),
                _denoise_input(),
                table_input(),
                solver_filter(),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="The denoised latent.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        seed: int,
        steps: int,
        cfg: float,
        positive: Conditioning,
        negative: Conditioning,
        latent_image: dict[str, Any],
        denoise: float,
        table: LambdaTable,
        solver: str,
    ) -> io.NodeOutput:
        """Sample as KSampler does."""
        check_model(table, model)
        row = row_for_steps(table, steps, solver)
        sigmas = sigmas_of(row, denoise)
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        result = comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index")),
            cfg,
            dode_sampler(LambdaTable([row], model=table.model), solver, cls.hidden.unique_id),
            sigmas,
            positive,
            negative,
            samples,
            noise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, max(len(sigmas) - 1, 0)),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput(latent_image | {"samples": result})


class ApplyLambdas(io.ComfyNode):
    """A MODEL whose matching samplers use λ."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_ApplyLambdas",
            display_name="Apply λ to model",
            category=CATEGORY,
            description="Every KSampler after this whose sampler, options and σ match a row of the table "
            "samples as its D-variant; others sample as they always do, and a line says why.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the table was made for."),
                table_input(),
                solver_filter(),
            ],
            outputs=[io.Model.Output("patched", display_name="model", tooltip="The model with λ.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, table: LambdaTable, solver: str) -> io.NodeOutput:
        """Patch a clone of the model."""
        rows_of(table, solver)
        remark(cls.hidden.unique_id, check_model(table, model))
        return io.NodeOutput(apply_to_model(model, table, solver, cls.hidden.unique_id))
