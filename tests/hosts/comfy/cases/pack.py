"""The pack as ComfyUI has it: nodes by id from the entry point, inputs and outputs by their names."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.hosts.comfy.cases.subjects import Conditioning, Latent, Subject, watch
from tests.hosts.conftest import HIDDEN
from tests.import_comfyui import REPOSITORY

_LOADED = "dode_pack_of_the_cases"


class Pack:
    """The nodes, and the library that they run on.

    Attributes:
        library: the ``dode_nodes`` of this pack, whose classes its tables and errors are of.
    """

    def __init__(self, nodes: dict[str, Any], library: ModuleType) -> None:
        self._nodes = nodes
        self.library = library

    def run(self, node_id: str, **inputs: Any) -> dict[str, Any]:
        """What a node gives out, by its outputs' display names in lower case."""
        node = self._nodes[node_id]
        prepared = node.PREPARE_CLASS_CLONE(HIDDEN)
        names = [(output.display_name or output.id).lower() for output in node.define_schema().outputs]
        return dict(zip(names, prepared.EXECUTE_NORMALIZED(**inputs).args, strict=True))

    def inputs_of(self, node_id: str) -> dict[str, Any]:
        """A node's inputs by their ids."""
        return {each.id: each for each in self._nodes[node_id].define_schema().inputs}

    def distil(self, subject: Subject, **changes: Any) -> dict[str, Any]:
        """Distill λ, small."""
        defaults = {
            "positive": subject.positive, "negative": subject.negative, "latent": subject.latent, "cfg": 2.0,
            "latents": 4, "seed": 1, "solver": "euler", "scheduler": subject.scheduler, "steps": "5", "quality": "quick",
            "scale": 2, "teacher": "dpmpp_2m", "prediction": "noise", "micro_batch": 0, "save_name": "table",
        }  # fmt: skip
        inputs = {"model": subject.model} | self._by_schema("DODE_DistillLambdas", defaults, changes)
        return self.run("DODE_DistillLambdas", **inputs)

    def ksampler(self, subject: Subject, table: Any, latent: Latent | None = None, **changes: Any) -> Latent:
        """KSampler (D-ODE)'s latent."""
        defaults = {
            "positive": subject.positive, "negative": subject.negative, "cfg": 2.0, "seed": 5, "steps": 5,
            "denoise": 1.0, "solver": "any", "latent_image": subject.latent if latent is None else latent,
        }  # fmt: skip
        inputs = self._by_schema("DODE_KSampler", defaults, changes)
        return self.run("DODE_KSampler", model=subject.model, table=table, **inputs)["latent"]

    def apply(self, model: Any, table: Any) -> Any:
        """The model that 'Apply λ to model' gives out."""
        inputs = self._by_schema("DODE_ApplyLambdas", {"solver": "any"}, {})
        return self.run("DODE_ApplyLambdas", model=model, table=table, **inputs)["model"]

    def compare(self, subject: Subject, table: Any, **changes: Any) -> dict[str, Any]:
        """Compare samplers, on two noises."""
        defaults = {
            "positive": subject.positive, "negative": subject.negative, "latent": subject.latent, "cfg": 2.0,
            "steps": 5, "solver": "any", "pictures": 2, "seed": 3, "scale": 4,
        }  # fmt: skip
        inputs = {"model": subject.model} | self._by_schema("DODE_Compare", defaults, changes)
        return self.run("DODE_Compare", table=table, **inputs)

    def shipped(self, kind: str) -> Any:
        """The table of the embedded "eps" or "flow" model."""
        return self.run("DODE_LoadLambdas", name=f"demo_{kind}.safetensors")["table"]

    def demo(self, kind: str = "eps", side: int = 8) -> Subject:
        """The embedded "eps" or "flow" model, loaded anew, to draw a 3. At a ``side`` of 4 it is fast.

        For what its tables are tried on. Elsewhere ``subjects.small`` costs a tenth."""
        made = self.run("DODE_DemoModel", kind=kind, digit=3)
        scheduler = {"eps": "karras", "flow": "simple"}[kind]
        latent = {"samples": torch.zeros(1, 4, side, side)}
        model = made["model"]
        return Subject(model, made["positive"], made["negative"], latent, scheduler, watch(model))

    def prompt(self, digit: int) -> Conditioning:
        """For another digit of the embedded models."""
        return self.run("DODE_DemoModel", kind="eps", digit=digit)["positive"]

    def _by_schema(self, node_id: str, defaults: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """The inputs that a node asks for; the others go through the options node, where there is one."""
        asked = self.inputs_of(node_id)
        given = {name: value for name, value in (defaults | changes).items() if name in asked}
        rest = {name: value for name, value in (defaults | changes).items() if name not in asked}
        if rest and "options" in asked:
            options = self.inputs_of("DODE_DistillOptions")
            plain = {name: getattr(each, "default", None) for name, each in options.items()}
            chosen = {name: rest.pop(name) for name in list(rest) if name in options}
            (given["options"],) = self.run("DODE_DistillOptions", **(plain | chosen)).values()
        lost = set(rest) & set(changes)
        assert not lost, f"no input of {node_id} or its options is called {lost}"
        return given


@cache
def load_pack(folder: Path = REPOSITORY) -> Pack:
    """Load a pack from its folder and ask its entry point for the nodes, as ComfyUI does, once in this process.

    It is a package of its own name, beside the ``dode_nodes`` that other tests import: two copies, of which
    neither sees the other's classes, host or monkeypatches, so that the order of the tests does not matter.
    The price: its errors and tables are those of ``Pack.library``, not of ``import dode_nodes``. Both register
    the same folder, which ComfyUI keeps once.
    """
    spec = importlib.util.spec_from_file_location(
        _LOADED, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules[_LOADED] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def nodes() -> dict[str, Any]:
        extension = await module.comfy_entrypoint()
        return {node.define_schema().node_id: node for node in await extension.get_node_list()}

    return Pack(asyncio.run(nodes()), importlib.import_module(f"{_LOADED}.dode_nodes"))
