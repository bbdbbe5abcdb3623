"""A ComfyUI server with the pack installed, and nodes to call."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dode_nodes.hosts.comfy.launch import find_comfyui
from tests.checkpoints import write_sd15
from tests.hosts.comfy.node_calls import NodeCalls
from tests.server import ComfyServer

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"


@pytest.fixture
def drawn(pack: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that nodes show. Where a test does not ask for them, they are made but not drawn: that is slow."""
    from dode_nodes.hosts.comfy import pictures

    figures: list[Any] = []
    render = pictures._rendered
    monkeypatch.setattr(pictures, "_rendered", lambda figure: figures.append(figure) or render(figure))
    return figures


@pytest.fixture
def dode(
    request: pytest.FixtureRequest,
    run_node: Any,
    pack: SimpleNamespace,
    inputs: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> NodeCalls:
    """The nodes; they save to ``lambdas_folder``."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(
            "dode_nodes.hosts.comfy.pictures._rendered", lambda figure: torch.zeros(1, 8, 8, 3)
        )
    return NodeCalls(run_node, pack, inputs)


@pytest.fixture
def on_the_node(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of text that are sent to the front end, as they are sent."""
    lines: list[str] = []
    server = ModuleType("server")
    server.PromptServer = SimpleNamespace(
        instance=SimpleNamespace(send_progress_text=lambda text, node_id: lines.append(text))
    )
    monkeypatch.setitem(sys.modules, "server", server)
    return lines


@pytest.fixture(scope="session")
def server(comfyui: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The server, with a tiny checkpoint under the name that an example asks for."""
    base = tmp_path_factory.mktemp("server")
    checkpoints = base / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    write_sd15(checkpoints / CHECKPOINT)
    (base / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).with_name("previews_route.py"), base / "custom_nodes")
    with ComfyServer(find_comfyui(), base) as running:
        yield running
