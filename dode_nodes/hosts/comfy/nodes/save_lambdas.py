"""The node that saves λ tables: signed, merged, with some of their rows."""

from __future__ import annotations

import io as io_module
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ....errors import TableError
from ....tables import edit, publish
from ....tables.table import LambdaTable
from .. import auto_table, pins, table_files
from ..messages import remark
from .inputs import CATEGORY, Table, code_output, save_name_input
from .load_and_inspect import code_or_reason

_PREVIEW_SIDE = 512


class SaveLambdas(io.ComfyNode):
    """Save a λ table, or the rows of several, as a new file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        more_tables = [
            Table.Input(
                f"table_{i}", optional=True, tooltip="Another table of the same model: its rows are added."
            )
            for i in (2, 3, 4)
        ]
        return io.Schema(
            node_id="DODE_SaveLambdas",
            display_name="Save λ table",
            category=CATEGORY,
            description="Saves a λ table as a new file, with your name and licence, or the rows of "
            "several tables of one model together. No file is changed or deleted.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                Table.Input("table", tooltip="The λ table to save."),
                save_name_input(),
                io.String.Input(
                    "rows",
                    default="",
                    tooltip="The rows to keep, such as 1, 3-5. Inspect λ table shows them in this order. "
                    "Empty: all rows.",
                ),
                io.String.Input(
                    "author",
                    default="",
                    tooltip="Who made the table. Empty: as it is. If you merge tables, only rows without "
                    "an author get it.",
                ),
                io.String.Input(
                    "licence",
                    default="",
                    tooltip="What others may do with it, such as CC0-1.0. Empty: as it is. If you merge "
                    "tables, only rows without a licence get it.",
                ),
                io.String.Input(
                    "notes",
                    default="",
                    multiline=True,
                    tooltip="What else there is to say. Empty: as it is. If you merge tables, only rows "
                    "without notes get them.",
                ),
                io.String.Input(
                    "model_name",
                    default="",
                    tooltip="The name of the model that the table is for. Empty: as it is.",
                ),
                *more_tables,
                io.Image.Input(
                    "preview",
                    optional=True,
                    tooltip="A picture that the table made. It is saved beside the file, for ComfyUI's "
                    "model library.",
                ),
            ],
            outputs=[
                Table.Output("saved", display_name="table", tooltip="The λ table, as saved."),
                io.String.Output("path", display_name="path", tooltip="Where it was saved."),
                code_output(),
            ],
        )

    @classmethod
    def execute(
        cls,
        table: LambdaTable,
        save_name: str,
        rows: str,
        author: str,
        licence: str,
        notes: str,
        model_name: str,
        table_2: LambdaTable | None = None,
        table_3: LambdaTable | None = None,
        table_4: LambdaTable | None = None,
        preview: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        """Merge, choose, sign, save."""
        tables = [each for each in (table, table_2, table_3, table_4) if each is not None]
        edited = edit.chosen(edit.merged(tables), rows)
        credit = {"author": author.strip(), "licence": licence.strip(), "notes": notes.strip()}
        edited = edit.signed(edited, credit, over=len(tables) == 1)
        if model_name.strip():
            edited = edit.with_model_facts(edited, {"name": model_name.strip()})
        path = table_files.save(edited, table_files.place_for(save_name))
        auto_table.keep(edited)
        saved = LambdaTable.load(path)
        pins.note(cls, saved)
        code = code_or_reason(edited)
        remarks = [] if preview is None else _save_preview(preview, path)
        remark(cls.hidden.unique_id, remarks, f"saved as {path.name}; {code}")
        return io.NodeOutput(saved, str(path), code)


def _save_preview(preview: torch.Tensor, path: Path) -> list[str]:
    """The first picture, made smaller; the table is saved already, so a failure is only remarked."""
    pixels = (preview[0].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    picture.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    content = io_module.BytesIO()
    picture.save(content, "PNG")
    try:
        publish.publish(path.with_suffix(".png"), content.getvalue(), overwrite=False)
    except TableError as error:
        return [f"the preview was not saved: {error}"]
    return []
