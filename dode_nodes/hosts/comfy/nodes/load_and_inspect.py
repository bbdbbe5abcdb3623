"""The nodes that load and show λ tables."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ....tables import plots
from ....tables.describe import table_text
from ....tables.table import LambdaTable
from .. import table_files
from ..pictures import draw
from .inputs import CATEGORY, Table, table_input


class LoadLambdas(io.ComfyNode):
    """Load a λ table from the lambdas folders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_LoadLambdas",
            display_name="Load λ table",
            category=CATEGORY,
            description="Loads a λ table. Press R to list new files.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=table_files.names(),
                    tooltip="A file in the lambdas folders. A λ table belongs to the model it was made for.",
                )
            ],
            outputs=[Table.Output("table", display_name="table", tooltip="The λ table.")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        """Load again when the file changed."""
        return table_files.stamp(name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(table_files.load(name))


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
            ],
        )

    @classmethod
    def execute(cls, table: LambdaTable) -> io.NodeOutput:
        """Draw and describe."""
        report = draw(plots.report_figure, table)
        return io.NodeOutput(report, table_text(table), ui=ui.PreviewImage(report, cls=cls))
