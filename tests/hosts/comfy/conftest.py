"""A ComfyUI server with the pack installed, and one line on what was found here to test in."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from dode_nodes.hosts.comfyui import find_comfyui
from tests import browser
from tests.checkpoints import write_sd15
from tests.server import ComfyServer

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What a run on this machine can show, whatever was skipped."""
    found = {
        "ComfyUI": find_comfyui() or "none (set COMFYUI_PATH)",
        "browser": browser.missing() or "found",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    terminalreporter.write_line("found: " + "; ".join(f"{name}: {what}" for name, what in found.items()))


@pytest.fixture(scope="session")
def server(comfyui: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The server, with a tiny checkpoint under the name that an example asks for."""
    base = tmp_path_factory.mktemp("server")
    checkpoints = base / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    write_sd15(checkpoints / CHECKPOINT)
    with ComfyServer(find_comfyui(), base) as running:
        yield running
