"""The ComfyUI adapter: V3 nodes, thin over the library."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ...solvers import use_host
from . import tables
from .nodes_compare import CompareSamplers
from .nodes_demo import DemoModel
from .nodes_distill import DistillLambdas
from .nodes_sample import ApplyLambdas, DodeKSampler, DodeSampler, DodeSigmas
from .nodes_tables import InspectLambdas, LoadLambdas
from .samplers import host_sampler


class DodeExtension(ComfyExtension):
    """The pack. Made when ComfyUI calls the entry point: only then is anything of ComfyUI's added to."""

    def __init__(self) -> None:
        tables.register_folder()
        use_host(host_sampler)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes; their ids are permanent."""
        return [
            DistillLambdas,
            LoadLambdas,
            InspectLambdas,
            DodeSampler,
            DodeSigmas,
            DodeKSampler,
            ApplyLambdas,
            CompareSamplers,
            DemoModel,
        ]
