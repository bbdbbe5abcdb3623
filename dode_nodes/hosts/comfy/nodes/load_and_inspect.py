"""The nodes that load, import and show λ tables."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ....errors import DodeError
from ....tables import plots
from ....tables.code import from_code, to_code
from ....tables.describe import held_text, table_text
from ....tables.table import LambdaTable
from .. import auto_table, table_files
from ..messages import remark, show_text
from ..model_facts import check_model
from ..pictures import draw
from .inputs import CATEGORY, PRESET, Table, auto_inputs, choose_and_note, code_output, table_input

AUTO = "auto"
"""In place of a file's name: the best for the model."""


class LoadLambdas(io.ComfyNode):
    """Load a λ table from the lambdas folders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_LoadLambdas",
            display_name="Load λ table",
            category=CATEGORY,
            description="Loads a λ table. Press R to list new files. With a model, it can choose one of "
            "yours.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=[AUTO, *table_files.names()],
                    tooltip="A file in the lambdas folders. A λ table belongs to the model it was made "
                    "for. auto chooses one for the connected model, of those that you made or picked here "
                    "once.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The model that the table is for. auto needs it."
                ),
                *auto_inputs(),
            ],
            outputs=[Table.Output("table", display_name="table", tooltip="The λ table.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, **inputs: Any) -> str:
        """Load again when the file changed, choose again when there are other files."""
        if name != AUTO:
            return table_files.stamp(name)
        return inputs.get(PRESET) or auto_table.stamp()

    @classmethod
    def execute(
        cls, name: str, model: ModelPatcher | None = None, family_match: bool = True, preset: str = ""
    ) -> io.NodeOutput:
        """Load, or choose."""
        node_id = cls.hidden.unique_id
        if name != AUTO:
            table, why = table_files.load(name), []
            auto_table.keep(table)
        elif model is None:
            raise DodeError(
                "connect the model to choose a table for, or pick a table by its name in place of auto"
            )
        else:
            table, reason = choose_and_note(cls, model, preset=preset, family_match=family_match)
            why = [reason]
        remarks = [] if model is None else check_model(table.model, model)
        remark(node_id, remarks, "; ".join([*why, held_text(table)]))
        return io.NodeOutput(table)


class ImportLambdas(io.ComfyNode):
    """A λ table from a line of text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_ImportLambdas",
            display_name="Import λ code",
            category=CATEGORY,
            description="Makes a λ table of a code that someone shared. Nothing is written: use Save λ "
            "table to keep it.",
            inputs=[
                io.String.Input(
                    "code",
                    multiline=True,
                    tooltip="The code, as Inspect λ table shows it. It begins with DODE1. Blanks and line "
                    "ends do not count.",
                )
            ],
            outputs=[Table.Output("table", display_name="table", tooltip="The λ table.")],
        )

    @classmethod
    def execute(cls, code: str) -> io.NodeOutput:
        """Read the code."""
        return io.NodeOutput(from_code(code))


class InspectLambdas(io.ComfyNode):
    """Show a λ table as a picture and as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_InspectLambdas",
            display_name="Inspect λ table",
            category=CATEGORY,
            description="Shows what is in a λ table: λ over σ, the errors compared with stock, and how it was made.",
            is_output_node=True,
            inputs=[table_input()],
            outputs=[
                io.Image.Output(
                    "report",
                    display_name="report",
                    tooltip="λ over σ and the error after each step. For refined rows: σ and the error at each stage.",
                ),
                io.String.Output(
                    "summary", display_name="summary", tooltip="The table in words and numbers."
                ),
                code_output(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, table: LambdaTable) -> io.NodeOutput:
        """Draw and describe."""
        report = draw(plots.report_figure, table)
        code = code_or_reason(table)
        show_text(cls.hidden.unique_id, code)
        return io.NodeOutput(report, table_text(table), code, ui=ui.PreviewImage(report, cls=cls))


def code_or_reason(table: LambdaTable) -> str:
    """The table's code; where it is too long for one, what to do instead."""
    try:
        return to_code(table)
    except DodeError as error:
        return str(error)
