"""The ComfyUI adapter in this process, and closed-form models to run its nodes on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dode_nodes.sampling import solvers
from tests.short_race import short_race  # noqa: F401  # a fixture

COMPONENTS = torch.tensor([-1.0, 0.3, 1.2])
VARIANCE = 0.04
HIDDEN = {"UNIQUE_ID": "7", "hidden_inputs": {"UNIQUE_ID": "7"}}
"""What ComfyUI prepares a node's class with: 0.3.64 the first, newer ones the second."""


def mixture_denoised(x: Tensor, sigma: Tensor, offset: float | Tensor, flow: bool) -> Tensor:
    """E[x0 | x] where every element of x0 is drawn from three Gaussians: a nonlinear, exact denoiser.

    Args:
        offset: where they lie; one, or of each row or element what broadcasts to x.
    """
    s = sigma.reshape(-1, *[1] * x.ndim).to(x)
    a = 1 - s if flow else torch.ones_like(s)
    means = COMPONENTS.to(x) + torch.as_tensor(offset).to(x).unsqueeze(-1)
    variance = VARIANCE * a**2 + s**2
    x = x.unsqueeze(-1)
    weights = torch.softmax(-((x - a * means) ** 2) / (2 * variance), -1)
    return (weights * (means * s**2 + a * x * VARIANCE) / variance).sum(-1)


def offsets_of(context: Tensor, x: Tensor) -> Tensor:
    """What ``conditioning`` says of each row."""
    return context[:, 0, 0].reshape(-1, *[1] * (x.ndim - 1))


@pytest.fixture(scope="session")
def pack(comfyui: ModuleType) -> SimpleNamespace:
    """The nodes' classes by name, as after ComfyUI has called the entry point."""
    from dode_nodes.hosts.comfy.extension import DodeExtension

    nodes = asyncio.run(DodeExtension().get_node_list())
    solvers.use_host(None)  # until a test of the pack runs: see _host_names
    return SimpleNamespace(**{node.__name__: node for node in nodes})


@pytest.fixture(autouse=True)
def _host_names(request: pytest.FixtureRequest) -> Iterator[None]:
    """Names resolve in ComfyUI while a test of the pack runs, and only then."""
    if "pack" not in request.fixturenames:
        yield
        return
    from dode_nodes.hosts.comfy.host_samplers import host_names, host_sampler

    request.getfixturevalue("pack")
    solvers.use_host(host_sampler, host_names)
    with torch.inference_mode():  # as the server runs nodes
        yield
    solvers.use_host(None)


@pytest.fixture
def make_model(pack: SimpleNamespace) -> Callable[..., Any]:
    """``make_model("EPS" | "V_PREDICTION" | "FLOW", channels=4, on_call=None)`` -> a ModelPatcher.

    Each is a checkpoint of its own, unless the number of one is given: a fit that is done is not made again.
    """
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    class Format(comfy.latent_formats.LatentFormat):
        scale_factor = 0.5

    class MixtureConfig(comfy.supported_models_base.BASE):
        sampling_settings = {"shift": 1.0}  # noqa: RUF012
        memory_usage_factor = 0.01

        def __init__(self, channels: int, dimensions: int) -> None:
            super().__init__({"disable_unet_model_creation": True, "in_channels": channels})
            self.latent_format = Format()
            self.latent_format.latent_channels = channels
            self.latent_format.latent_dimensions = dimensions

    class MixtureModel(comfy.model_base.BaseModel):
        evaluated = 0
        on_call: Callable[[int], None] | None = None

        def _apply_model(self, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Tensor, *_: Any) -> Tensor:
            self.evaluated += len(x)
            if self.on_call is not None:
                self.on_call(self.evaluated)
            flow = self.model_type == comfy.model_base.ModelType.FLOW
            return mixture_denoised(x, t, offsets_of(c_crossattn, x), flow)

    numbers = itertools.count(1000)

    def make(
        kind: str = "EPS",
        channels: int = 4,
        dimensions: int = 2,
        on_call: Any = None,
        checkpoint: int | None = None,
    ) -> Any:
        model = MixtureModel(MixtureConfig(channels, dimensions), getattr(comfy.model_base.ModelType, kind))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(next(numbers) if checkpoint is None else checkpoint)
            model.diffusion_model = torch.nn.Linear(16, 16)
        model.diffusion_model.dtype = torch.float32
        model.on_call = on_call
        return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))

    return make


@pytest.fixture
def run_node(pack: SimpleNamespace) -> Callable[..., tuple[Any, ...]]:
    """``run_node(NodeClass, **inputs)`` -> its outputs, called as ComfyUI calls it."""

    def run(node: Any, **inputs: Any) -> tuple[Any, ...]:
        prepared = node.PREPARE_CLASS_CLONE(HIDDEN)
        return prepared.EXECUTE_NORMALIZED(**inputs).args

    return run


@pytest.fixture
def lambdas_folder(
    pack: SimpleNamespace,
    tmp_path: Any,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """An empty folder that tables are saved to; and no fit is known to be done."""
    from dode_nodes.hosts.comfy import finished_fits, table_files

    user = tmp_path_factory.mktemp("user")
    monkeypatch.setattr(finished_fits, "_folder", lambda: user)
    monkeypatch.setattr(table_files, "save_folder", lambda: tmp_path)
    return tmp_path


def conditioning(*offsets: float) -> list[list[Any]]:
    """A prompt: where the mixture lies; several make a batched conditioning."""
    return [[torch.tensor(offsets).reshape(-1, 1, 1), {}]]


@pytest.fixture
def inputs(lambdas_folder: Any) -> SimpleNamespace:
    """What most nodes take, small."""
    return SimpleNamespace(
        positive=conditioning(0.2),
        negative=conditioning(-0.1),
        latent={"samples": torch.zeros(1, 4, 4, 4)},
        distil={
            "positive": conditioning(0.2),
            "negative": conditioning(-0.1),
            "cfg": 2.0,
            "latent": {"samples": torch.zeros(1, 4, 4, 4)},
            "seed": 1,
            "steps": "5, 8",
            "quality": "quick",
            "save_name": "table",
        },
        options={
            "cfgs": "",
            "latents": 8,
            "refine_budget": 0.0,
            "solver": "euler",
            "scheduler": "karras",
            "teacher": "dpmpp_2m",
            "scale": 3,
            "prediction": "noise",
            "micro_batch": 0,
        },
    )
