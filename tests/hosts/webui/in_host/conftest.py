"""The host, started once, with a checkpoint; and pictures made in it."""

from __future__ import annotations

import gc
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.hosts.webui.in_host.boot import boot, load_checkpoint, text_encoder_of, wrapper_of
from tests.hosts.webui.in_host.pictures import COMMON, DATA, SmallNetwork, noise_picture, runner

LIBRARIES = ("einops", "numpy", "Pillow", "safetensors", "torch")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which versions it ran with: the hosts have old ones."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    terminalreporter.write_line(f"with {versions}")


@pytest.fixture(scope="session", autouse=True)
def booted() -> set[str]:
    """What of the pack was imported when the host had loaded its scripts."""
    boot(Path(os.environ["DODE_WEBUI_CHECKOUT"]), DATA)
    gc.collect()
    gc.freeze()  # a collection need not look at its million objects of code
    return {name for name in sys.modules if name.startswith("dode_nodes.")}


@pytest.fixture(scope="session", autouse=True)
def host(booted: set[str]) -> Any:
    """The model, as the host has loaded it."""
    model = load_checkpoint("tiny")
    for module in text_encoder_of(model).modules():
        if isinstance(layers := getattr(module, "layers", None), torch.nn.ModuleList):
            module.layers = layers[:1]  # all are zeros, and take half a second
    return model


@pytest.fixture(autouse=True)
def lambdas() -> Path:
    """models/lambdas, empty, and no table trusted."""
    folder = DATA / "models" / "lambdas"
    folder.mkdir(exist_ok=True)
    for file in [*folder.rglob("*.safetensors"), *(DATA / "dode_nodes").glob("*.txt")]:
        file.unlink()
    return folder


@pytest.fixture
def save(host: Any, lambdas: Path) -> Callable[..., Any]:
    """``save("name", 4, 8, lam=0.3)``: a table with a row of so many steps on karras σ for each number."""
    from dode_nodes import LambdaRow, LambdaTable
    from dode_nodes.hosts.webui.model_facts import model_facts, noise_schedule
    from dode_nodes.sampling.schedules import make_sigmas

    def save(name: str, *steps: int, lam: float = 0.3, **facts: Any) -> Any:
        rows = [
            LambdaRow(
                "euler", make_sigmas("karras", n, noise_schedule(host)).double().numpy(), (1,) * n,
                np.array([0.0, *[lam] * (n - 1)]), settings={"cfg": 5.0},
            )
            for n in steps
        ]  # fmt: skip
        path = lambdas / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        LambdaTable(rows, model=model_facts(host) | facts).save(path)
        return LambdaTable.load(path)

    return save


@pytest.fixture
def make() -> Callable[..., SimpleNamespace]:
    """``make(table=..., kind="txt2img", others=[], **settings)``: a picture, as the host's own scripts have it made,
    and others of the test's."""
    from modules import processing, scripts

    def make(
        table: str | None = "auto", kind: str = "txt2img", others: Any = (), **settings: Any
    ) -> SimpleNamespace:
        cls = getattr(processing, f"StableDiffusionProcessing{kind.capitalize().replace('2i', '2I')}")
        settings.setdefault("override_settings", {})
        if kind == "img2img":
            settings.setdefault("init_images", [noise_picture()])
        known = inspect.signature(cls).parameters  # Forge has some for hires fix that it cannot do without
        p = cls(**{name: value for name, value in (COMMON | settings).items() if name in known})
        p.scripts, p.script_args = runner(scripts, table, *others)
        torch.manual_seed(0)  # some hosts encode pictures at random, before they seed
        done = processing.process_images(p)
        return SimpleNamespace(
            p=p, text=done.infotexts[0], said=done.comments, latents=torch.cat(p.test_latents),
            pixels=np.asarray(done.images[0]),
        )  # fmt: skip

    return make


@pytest.fixture(autouse=True)
def cheap_vae(host: Any) -> Iterator[None]:
    """In place of the host's, which takes a second a picture. Pictures are as different as their latents."""
    host.decode_first_stage = lambda x: x[:, :3]
    host.encode_first_stage = lambda x: torch.nn.functional.avg_pool2d(x, 8)[:, [0, 1, 2, 0]]
    yield
    del host.decode_first_stage, host.encode_first_stage


@pytest.fixture(autouse=True)
def small_network(host: Any, request: pytest.FixtureRequest) -> Iterator[torch.nn.Module | None]:
    """In place of the checkpoint's, where a test is not marked whole_network: it is a hundred times as fast."""
    if request.node.get_closest_marker("whole_network"):
        yield None
        return
    inner = wrapper_of(host)
    own = inner.diffusion_model
    inner.diffusion_model = SmallNetwork()
    yield inner.diffusion_model
    inner.diffusion_model = own


@pytest.fixture
def as_flow(host: Any, small_network: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """``as_flow()`` makes a flow model of the small network."""
    prediction = pytest.importorskip(
        "backend.modules.k_prediction", reason="flow models are Forge's and Neo's"
    )
    inner, flow = wrapper_of(host), prediction.PredictionDiscreteFlow
    own = inner.predictor

    def swap() -> None:
        settings = SimpleNamespace(sampling_settings={"shift": 3.0})
        of_neo = "model_config" in inspect.signature(flow.__init__).parameters
        inner.predictor = flow(settings) if of_neo else flow(shift=3.0)

    yield swap
    inner.predictor = own
