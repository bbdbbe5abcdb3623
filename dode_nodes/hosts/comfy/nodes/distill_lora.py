"""The node that trains a LoRA for the few steps of a table's rows."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ....errors import DodeError
from ....fit.lora import LoraRecipe
from ....fit.lora_pipeline import LORA_QUALITIES, best_rows
from ....fit.quality import GOOD
from ....fit.steps import parse_steps
from ....tables.lora_file import Factors, content_hash, kohya_state, write_lora
from ....tables.publish import first_free, numbered
from ....tables.row import LambdaRow
from ....tables.table import LambdaTable
from .. import table_files
from ..guiders import Conditioning
from ..lora_job import LoraDistillation, LoraRequest
from ..messages import remark, show_text
from ..model_facts import check_model
from ..prompts import check_empty, fitting_latent
from ..reporter import ProgressReporter
from .inputs import CATEGORY, Table, cfg_input, conditioning_inputs, save_name_input, schema, seed_input


class DistillLora(io.ComfyNode):
    """Train a LoRA for the few steps of a table's rows, and name it in the table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        meanings = ". ".join(f"{name}: {each.words}" for name, each in LORA_QUALITIES.items())
        return schema(
            node_id="DODE_DistillLoRA",
            display_name="Distill LoRA",
            category=CATEGORY,
            description="Trains a LoRA that helps this model in the few steps of a λ table: with it, the table's row "
            "ends nearer to where a slow sampler ends. It needs no pictures. It pays at 1 to 5 steps.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model, with the LoRAs and patches you sample with. They stay as they are.",
                ),
                *conditioning_inputs(),
                cfg_input(),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent of the size you sample at. The batch size has no effect.",
                ),
                Table.Input(
                    "table", tooltip="The λ table with a row for these steps, from Distill λ or Load λ table."
                ),
                io.String.Input(
                    "steps",
                    default="2",
                    tooltip="The steps that the LoRA is for: one number, or several, such as 2, 3, 4. For one number "
                    "alone it comes a little nearer.",
                ),
                io.Combo.Input(
                    "quality",
                    options=list(LORA_QUALITIES),
                    default=GOOD,
                    tooltip=f"How much work it may be. {meanings}. What it will cost is said before it starts.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="Rank of the LoRA: a higher one can learn more.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=5e-4,
                    min=1e-6,
                    max=1e-1,
                    step=1e-5,
                    round=1e-6,
                    tooltip="Small models stand 0.002, large ones 0.0002 to 0.001. If the loss grows, make it smaller.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Noises in a batch. Make it smaller if memory runs out.",
                ),
                seed_input("Seed of the noises and of the LoRA's first numbers.", changes=False),
                save_name_input(),
            ],
            outputs=[
                io.LoraModel.Output(
                    "lora", display_name="lora", tooltip="For Save LoRA Weights, and for Load LoRA Model."
                ),
                io.LossMap.Output("loss", display_name="loss", tooltip="For Plot Loss Graph."),
                io.Int.Output(
                    "batches", display_name="batches", tooltip="How many were trained, for Save LoRA Weights."
                ),
                Table.Output(
                    "named_table",
                    display_name="table",
                    tooltip="The table, whose rows know this LoRA: samplers say if it is not on the model.",
                ),
                io.String.Output(
                    "summary", display_name="summary", tooltip="The errors with the LoRA and without it."
                ),
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
        steps: str,
        quality: str,
        rank: int,
        learning_rate: float,
        batch_size: int,
        seed: int,
        save_name: str,
    ) -> io.NodeOutput:
        """Train, save the table, report."""
        node_id = cls.hidden.unique_id
        check_empty(model, latent)
        remarks = check_model(table.model, model)
        rows = best_rows(table.rows, parse_steps(steps))
        stem = table_files.place_for(save_name)
        work = LORA_QUALITIES[quality]
        request = LoraRequest(
            model, positive, negative, cfg, fitting_latent(model, latent), rows, work.latents,
            LoraRecipe(work.iterations * len(rows), batch_size, learning_rate, seed=seed), rank,
        )  # fmt: skip
        with ProgressReporter(model, request.latent, node_id) as reporter:
            distillation = LoraDistillation(request, reporter)
            try:
                distillation.run()
            except BaseException:
                _save_what_there_is(distillation, table, save_name, node_id)
                raise
        factors, pipeline = distillation.factors(), distillation.pipeline
        report = pipeline.report()
        if not factors:
            remark(node_id, [*remarks, "the LoRA makes no row better, so it is empty: use the table alone"])
            return io.NodeOutput({}, {"loss": pipeline.losses}, len(pipeline.losses), table, report)
        named = _naming(table, distillation, factors, stem.name)
        place = table_files.save(named, stem)
        remark(node_id, remarks)
        show_text(node_id, f"table saved as {place.name}. Save the LoRA with Save LoRA Weights")
        return io.NodeOutput(
            kohya_state(factors), {"loss": pipeline.losses}, len(pipeline.losses),
            replace(named, name=place.stem), report,
        )  # fmt: skip


def _naming(
    table: LambdaTable, distillation: LoraDistillation, factors: dict[str, Factors], name: str
) -> LambdaTable:
    """The table, whose rows that the LoRA makes better name it."""
    content = content_hash(factors)
    named = {id(each.row): each.named(content, name) for each in distillation.pipeline.outcomes}

    def own(row: LambdaRow) -> LambdaRow:
        return named.get(id(row), row)

    return replace(table, rows=list(map(own, table.rows)))


def _save_what_there_is(
    distillation: LoraDistillation, table: LambdaTable, save_name: str, node_id: str | None
) -> None:
    """Save the best so far of a training that was ended; nothing of that may hide why it was ended."""
    try:
        if not (factors := distillation.factors()):
            return
        stem = table_files.place_for(save_name, "-partial")
        folder = Path(folder_paths.get_folder_paths("loras")[0])
        folder.mkdir(parents=True, exist_ok=True)
        names = numbered(folder / f"{stem.name}.safetensors")
        lora = first_free(names, lambda path: write_lora(path, factors))
        place = table_files.save(_naming(table, distillation, factors, lora.name), stem)
        remark(
            node_id,
            [f"stopped early; the best LoRA so far is saved as {lora.name}, and the table as {place.name}"],
        )
    except (DodeError, OSError):
        logging.exception("D-ODE: the LoRA so far could not be saved")
