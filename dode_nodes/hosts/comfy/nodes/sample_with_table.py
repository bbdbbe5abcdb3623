"""The nodes that sample with λ."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ....tables.choice import part_for_steps, rows_of
from ....tables.remarks import steps_remarks
from ....tables.table import LambdaTable
from .. import auto_table
from ..guiders import Conditioning
from ..messages import remark
from ..model_facts import check_model
from ..prompts import fitting_latent, without_ratios
from ..run_row import apply_to_model, part_sampler, row_for_sigmas, row_sampler
from ..usage import denoise_remarks
from .inputs import (
    CATEGORY,
    PRESET,
    auto_inputs,
    cfg_input,
    choose_and_note,
    conditioning_inputs,
    filtered_solver,
    schema,
    seed_input,
    solver_filter,
    table_input,
)


def _steps_input() -> io.Input:
    return io.Int.Input(
        "steps",
        default=8,
        min=1,
        max=1000,
        tooltip="Number of steps. If the table has no row with that many, the nearest is run and the node says so.",
    )


def _stamp(inputs: dict[str, Any]) -> str:
    """Of the tables that a node may choose from; nothing where it is given one. What is linked is None "
    "here, not absent."""
    return "" if "table" in inputs or inputs.get(PRESET) else auto_table.stamp()


def _denoise_input() -> io.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Below 1 (img2img), only the last round(steps × denoise) steps of the row are run. KSampler "
        "would run the end of a longer schedule, but λ fits only the σ of its row.",
    )


class DodeSampler(io.ComfyNode):
    """A SAMPLER that uses λ."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="DODE_Sampler",
            display_name="D-ODE sampler",
            category=CATEGORY,
            description="A sampler for SamplerCustom and SamplerCustomAdvanced. Connect D-ODE sigmas as well: "
            "the σ decide which row is used.",
            inputs=[table_input(), solver_filter()],
            outputs=[io.Sampler.Output("sampler", display_name="sampler", tooltip="The D-ODE sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, table: LambdaTable, solver: str) -> io.NodeOutput:
        """Make the sampler."""
        wanted = filtered_solver(solver)
        rows_of(table, wanted)
        sampler = row_sampler(
            choose=lambda sigmas: row_for_sigmas(table, sigmas, wanted),
            check=lambda model: check_model(table.model, model),
            node_id=cls.hidden.unique_id,
            called=table.called,
        )
        return io.NodeOutput(sampler)


class DodeSigmas(io.ComfyNode):
    """The σ of a row."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="DODE_Sigmas",
            display_name="D-ODE sigmas",
            category=CATEGORY,
            description="The σ schedule of one row of the table, or its last part.",
            inputs=[table_input(), _steps_input(), _denoise_input(), solver_filter()],
            outputs=[
                io.Sigmas.Output(
                    "sigmas", display_name="sigmas", tooltip="For the sigmas input of a sampler node."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, table: LambdaTable, steps: int, denoise: float, solver: str) -> io.NodeOutput:
        """Look the σ up."""
        part = part_for_steps(table, steps, denoise, filtered_solver(solver), nearest=True)
        remark(cls.hidden.unique_id, [*steps_remarks(part, steps, table), *denoise_remarks(part, denoise)])
        return io.NodeOutput(part.sigmas)


class DodeKSampler(io.ComfyNode):
    """KSampler with a table in place of sampler and scheduler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="DODE_KSampler",
            display_name="KSampler (D-ODE)",
            category=CATEGORY,
            description="A KSampler that uses a λ table in place of sampler and scheduler. Without a "
            "table it chooses one of yours for this model.",
            inputs=[
                io.Model.Input("model", tooltip="The model the table was made for."),
                seed_input("Seed of the noise."),
                _steps_input(),
                cfg_input(),
                *conditioning_inputs(),
                io.Latent.Input(
                    "latent_image", tooltip="The latent to denoise: an empty one, or a picture for img2img."
                ),
                _denoise_input(),
                table_input(optional=True),
                solver_filter(),
                *auto_inputs(),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    optional=True,
                    tooltip="Whether a number of steps that the table does not have is an error. Otherwise the nearest "
                    "is run.",
                ),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="The denoised latent.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Choose again when there are other tables."""
        return _stamp(inputs)

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
        solver: str,
        table: LambdaTable | None = None,
        family_match: bool = True,
        preset: str = "",
        strict: bool = False,
    ) -> io.NodeOutput:
        """Sample as KSampler does."""
        wanted, notes = filtered_solver(solver), []
        if table is None:
            table, why = choose_and_note(
                cls, model, preset=preset, family_match=family_match, steps=steps, solver=wanted, cfg=cfg,
                latent=latent_image,
            )  # fmt: skip
            notes = [why]
        part = part_for_steps(table, steps, denoise, wanted, cfg, nearest=not strict)
        notes += [*steps_remarks(part, steps, table), *denoise_remarks(part, denoise)]
        sampler = part_sampler(table, part, model, cls.hidden.unique_id, notes)
        samples = fitting_latent(model, latent_image)
        result = comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index")),
            cfg,
            sampler,
            part.sigmas,
            positive,
            negative,
            samples,
            noise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, part.row.steps - part.start),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput(without_ratios(latent_image) | {"samples": result})


class ApplyLambdas(io.ComfyNode):
    """A MODEL whose matching samplers use λ."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="DODE_ApplyLambdas",
            display_name="Apply λ to model",
            category=CATEGORY,
            description="Lets an ordinary KSampler use a λ table. λ is applied if the KSampler's sampler, options "
            "and σ match a row. If they do not, it samples as usual, and this node says why.",
            inputs=[
                io.Model.Input("model", tooltip="The model the table was made for."),
                table_input(optional=True),
                solver_filter(),
                *auto_inputs(),
            ],
            outputs=[io.Model.Output("patched", display_name="model", tooltip="The model with λ.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Choose again when there are other tables."""
        return _stamp(inputs)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        solver: str,
        table: LambdaTable | None = None,
        family_match: bool = True,
        preset: str = "",
    ) -> io.NodeOutput:
        """Patch a clone of the model."""
        wanted, notes = filtered_solver(solver), []
        if table is None:
            table, why = choose_and_note(cls, model, preset=preset, family_match=family_match, solver=wanted)
            notes = [why]
        rows_of(table, wanted)
        notes += check_model(table.model, model)
        remark(cls.hidden.unique_id, notes)
        return io.NodeOutput(apply_to_model(model, table, wanted, cls.hidden.unique_id, notes))
