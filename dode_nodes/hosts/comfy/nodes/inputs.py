"""What the nodes share: the table's type, the category, and inputs that mean the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ....tables.auto import Chosen
from .. import auto_table, pins
from ..host_samplers import student_names

CATEGORY = "sampling/D-ODE"
ANY = "any"
"""In the solver filter: rows of every solver."""
PRESET = "preset"
Table = io.Custom("LAMBDA_TABLE")


_ALIASES: Mapping[str, Sequence[str]] = {
    "DODE_DistillLambdas": ("few steps", "fast", "speed", "refine", "solver", "distill", "teacher"),
    "DODE_DistillLoRA": ("train LoRA", "few steps", "lightning", "turbo", "distill"),
    "DODE_KSampler": ("few steps", "fast", "speed", "sampler", "solver", "img2img"),
    "DODE_ApplyLambdas": ("few steps", "fast", "speed", "patch model"),
    "DODE_Sampler": ("few steps", "fast", "solver"),
    "DODE_Sigmas": ("schedule", "scheduler", "few steps"),
    "DODE_FindStock": ("scheduler", "schedule", "which sampler", "benchmark"),
    "DODE_Compare": ("benchmark", "side by side", "schedule"),
}
"""What people search for who do not know a node's name."""


def schema(**facts: Any) -> io.Schema:
    """A node's, with words that a search finds it by, where the host takes them."""
    aliases = _ALIASES.get(facts["node_id"], ())
    if aliases and any(each.name == "search_aliases" for each in fields(io.Schema)):
        facts["search_aliases"] = list(aliases)
    return io.Schema(**facts)


def table_input(*, optional: bool = False) -> io.Input:
    """The λ table socket; ``optional`` where a node can choose one."""
    chosen = " If none is connected, the node chooses one of yours for this model." if optional else ""
    return Table.Input(
        "table", optional=optional, tooltip=f"The λ table, from Load λ table or Distill λ.{chosen}"
    )


def save_name_input() -> io.Input:
    """Under which name a table is saved."""
    return io.String.Input(
        "save_name",
        default="my_model",
        tooltip="File name of the table in the lambdas folder. Digits that stand for its "
        "numbers are added: name-1a2b3c4d.",
    )


def code_output() -> io.Output:
    """A table's code."""
    return io.String.Output(
        "code",
        display_name="code",
        tooltip="The table as one line of text, to share it: Import λ code reads it. Large "
        "tables have none: share the file.",
    )


def auto_inputs() -> list[io.Input]:
    """How a table is chosen. The last widgets: a saved graph holds values by their place."""
    return [
        io.Boolean.Input(
            "family_match",
            default=True,
            optional=True,
            tooltip="When the node chooses a table: whether one of another checkpoint of the same family "
            "will do.",
        ),
        io.String.Input(
            PRESET,
            default="",
            optional=True,
            tooltip="The table this graph is pinned to: name and 16 digits. Empty: the node chooses anew. "
            "It is filled in for you in the workflow that is saved with a picture, so that it makes the "
            "same picture again.",
        ),
    ]


def choose_and_note(node: type[io.ComfyNode], model: ModelPatcher, **wanted: Any) -> Chosen:
    """The table that a node takes where none is connected; the workflow that is saved with its pictures is pinned to it.

    Args:
        node: as ComfyUI has prepared it, with the inputs of ``auto_inputs``.
        wanted: and errors: see ``auto_table.choose``.
    """
    chosen = auto_table.choose(model, **wanted)
    pins.note(node, chosen.table, widget=PRESET)
    return chosen


def solver_filter() -> io.Input:
    """Which of a table's rows to look at."""
    return io.Combo.Input(
        "solver",
        options=[ANY, *student_names()],
        default=ANY,
        tooltip="Use only the rows of this solver and those refined from it. 'any' allows all rows. If several "
        "rows fit, the node uses the one with the smallest held-out error for the steps that are run.",
    )


def filtered_solver(solver: str) -> str | None:
    """The filter's choice, as the library takes it."""
    return None if solver == ANY else solver


def cfg_input(default: float = 7.0, *, guider: bool = False) -> io.Input:
    """Classifier-free guidance; ``guider``: of a node that has an input for one, too."""
    ignored = " Ignored if a guider is connected." if guider else ""
    return io.Float.Input(
        "cfg",
        default=default,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip=f"Classifier-free guidance scale. Distil and sample with the same value: λ depends on it.{ignored}",
    )


def seed_input(tooltip: str, *, default: int = 0, changes: bool = True) -> io.Input:
    """A noise seed; ``changes``: the front end may draw a new one after every run, and does so at first."""
    return io.Int.Input(
        "seed",
        default=default,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=changes,
        tooltip=tooltip,
    )


def conditioning_inputs(*, optional: bool = False) -> list[io.Input]:
    """Positive and negative; ``optional`` where a guider may bring them."""
    return [
        io.Conditioning.Input("positive", optional=optional, tooltip="What the picture should show."),
        io.Conditioning.Input("negative", optional=optional, tooltip="What the picture should not show."),
    ]


def guider_input() -> io.Input:
    """What may take the place of model, prompts and cfg."""
    return io.Guider.Input(
        "guider",
        optional=True,
        tooltip="A guider in place of model, positive, negative and cfg, as SamplerCustomAdvanced takes it. Use the "
        "guider you sample with.",
    )
