"""The ComfyUI adapter: V3 nodes, thin over the library."""

from __future__ import annotations

import io as io_module
import sys

from comfy_api.latest import ComfyExtension, io

from ...sampling.solvers import use_host
from . import pins, table_files
from .host_samplers import host_names, host_sampler
from .nodes.compare import CompareSamplers
from .nodes.demo_model import DemoModel, DemoPictures
from .nodes.distill_lambdas import DistillLambdas
from .nodes.distill_lora import DistillLora
from .nodes.distill_options import DistillOptions
from .nodes.find_stock import FindStock
from .nodes.load_and_inspect import ImportLambdas, InspectLambdas, LoadLambdas
from .nodes.sample_with_table import ApplyLambdas, DodeKSampler, DodeSampler, DodeSigmas
from .nodes.save_lambdas import SaveLambdas


def _print_anything() -> None:
    """A console that lacks λ or σ, as a redirected one on Windows, shows something in their place.

    Else logging such a letter raises, and where ComfyUI logs an error that ends the thread that runs prompts.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io_module.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _note_on_prompt() -> None:
    """Let what nodes have noted be written into workflows; without a server there are none."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and pins.on_prompt not in server.on_prompt_handlers:
        server.add_on_prompt_handler(pins.on_prompt)


class DodeExtension(ComfyExtension):
    """The pack. Made when ComfyUI calls the entry point: only then is anything of ComfyUI's added to."""

    def __init__(self) -> None:
        _print_anything()
        table_files.register_folder()
        use_host(host_sampler, host_names)
        _note_on_prompt()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes; their ids are permanent."""
        return [
            DistillLambdas,
            DistillOptions,
            LoadLambdas,
            ImportLambdas,
            SaveLambdas,
            InspectLambdas,
            DodeSampler,
            DodeSigmas,
            DodeKSampler,
            ApplyLambdas,
            CompareSamplers,
            FindStock,
            DistillLora,
            DemoPictures,
            DemoModel,
        ]
