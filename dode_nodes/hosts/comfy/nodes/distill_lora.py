"""The node that trains a LoRA for the few steps of a table's rows."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ....errors import DodeError
from ....fit.key import Identity
from ....fit.lora import LoraRecipe
from ....fit.lora_pipeline import LORA_QUALITIES, LoraPipeline, best_rows
from ....fit.quality import GOOD, quality_of
from ....fit.steps import parse_steps
from ....tables.lora_file import Factors, content_hash, kohya_state, write_lora
from ....tables.lora_plots import Errors, lora_figure
from ....tables.publish import first_free, numbered
from ....tables.row import LambdaRow
from ....tables.table import LambdaTable
from .. import table_files
from ..finished_fits import work_of
from ..fit_key import key_of_training
from ..guiders import Conditioning
from ..lora_job import LoraDistillation, LoraRequest
from ..messages import remark
from ..model_facts import check_model
from ..pictures import draw
from ..reporter import ProgressReporter
from .distill_options import USUAL, Expert, Options
from .inputs import CATEGORY, Table, cfg_input, conditioning_inputs, save_name_input, schema, seed_input
from .made_table import combinations_for, make_table, request_for


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
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
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
                Table.Input(
                    "table",
                    optional=True,
                    tooltip="The λ table with a row for these steps, from Distill λ or Load λ table. If none is "
                    "connected, one is made first, as Distill λ makes it at quality good.",
                ),
                Options.Input(
                    "options",
                    optional=True,
                    tooltip="More prompts, cfgs and sizes, and another teacher, from Distill λ options. What else it "
                    "says is for the table, if one is made.",
                ),
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
                io.Image.Output(
                    "report",
                    display_name="report",
                    tooltip="The errors with the LoRA and without it as bars, and the loss batch by batch.",
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
        steps: str,
        quality: str,
        rank: int,
        learning_rate: float,
        batch_size: int,
        seed: int,
        save_name: str,
        table: LambdaTable | None = None,
        options: Expert = USUAL,
    ) -> io.NodeOutput:
        """Train, save the table, report."""
        node_id, prompt = cls.hidden.unique_id, cls.hidden.prompt
        combinations = combinations_for(None, model, positive, negative, cfg, latent, seed, options)
        stem, work = table_files.place_for(save_name), LORA_QUALITIES[quality]
        recipe = LoraRecipe(work.iterations, batch_size, learning_rate, seed=seed)
        if table is None:
            of_rows = request_for(combinations, steps, quality_of(GOOD), options)
            made, _ = make_table(
                of_rows, redo=options.redo, prompt=prompt, node_id=node_id, save_name=save_name
            )
            table = made.table
        remark(node_id, check_model(table.model, model))
        rows = best_rows(table.rows, parse_steps(steps))
        request = LoraRequest(
            **combinations.parts,
            rows=rows,
            count=max(work.latents, 2 * combinations.shares),
            recipe=replace(recipe, iterations=work.iterations * len(rows)),
            rank=rank,
        )
        pipeline, factors = _train(request, table, save_name, node_id, redo=options.redo)
        losses, named, told = pipeline.losses, table, ""
        if factors:
            saved = table_files.save_if_possible(_naming(table, pipeline, factors, stem.name), stem)
            if saved.place is not None:
                told = f"table saved as {saved.place.name}. Save the LoRA with Save LoRA Weights"
            named, remarks = saved.table, saved.remarks
        else:
            remarks = ["the LoRA makes no row better, so it is empty: use the table alone"]
        remark(node_id, remarks, told)
        picture = draw(lora_figure, [Errors(*each) for each in pipeline.errors], losses)
        return io.NodeOutput(
            kohya_state(factors), {"loss": losses}, len(losses), named, pipeline.report(), picture,
            ui=ui.PreviewImage(picture, cls=cls),
        )  # fmt: skip


def _train(
    request: LoraRequest, table: LambdaTable, save_name: str, node_id: str | None, *, redo: bool
) -> tuple[LoraPipeline, dict[str, Factors]]:
    """What came of it, and the LoRA; what there is by then is saved if that is ended."""
    identity = Identity.of(lambda: key_of_training(request))
    for line in identity.remarks:
        logging.info("D-ODE: %s", line)
    with ProgressReporter(request.model, request.latent, node_id) as reporter:
        distillation = LoraDistillation(request, reporter, work_of(identity, redo=redo))
        try:
            distillation.run()
        except BaseException:
            _save_what_there_is(distillation, table, save_name, node_id)
            raise
    return distillation.pipeline, distillation.factors()


def _naming(
    table: LambdaTable, pipeline: LoraPipeline, factors: dict[str, Factors], name: str
) -> LambdaTable:
    """The table, whose rows that the LoRA makes better name it."""
    content = content_hash(factors)
    named = {id(each.row): each.named(content, name) for each in pipeline.outcomes}

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
        place = table_files.save(_naming(table, distillation.pipeline, factors, lora.name), stem)
        remark(
            node_id,
            [f"stopped early; the best LoRA so far is saved as {lora.name}, and the table as {place.name}"],
        )
    except (DodeError, OSError):
        logging.exception("D-ODE: the LoRA so far could not be saved")
