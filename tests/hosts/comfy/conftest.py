"""A ComfyUI server with the pack installed, and one line on what was found here to test in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dode_nodes.hosts.comfy.launch import find_comfyui
from tests import browser
from tests.checkpoints import write_sd15
from tests.comfyui_hosts import HERE, HOSTS
from tests.hosts.comfy.node_calls import NodeCalls
from tests.server import ComfyServer

OTHERS = "test_other_hosts"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What a run on this machine can show, whatever was skipped; and what the tests in each ComfyUI came to."""
    counts = _counts_elsewhere(terminalreporter) | {str(HERE): _counts_here(terminalreporter)}
    for host in map(str, HOSTS):
        terminalreporter.write_line(f"found: {host}: {counts.get(host, 'not tested')}")
    found = {
        "ComfyUI": len(HOSTS) or "none (set COMFYUI_PATH)",
        "browser": browser.missing() or "found",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    terminalreporter.write_line("found: " + "; ".join(f"{name}: {what}" for name, what in found.items()))


def _counts_elsewhere(reporter: pytest.TerminalReporter) -> dict[str, str]:
    """What the tests of further hosts came to."""
    reports = [*reporter.getreports("passed"), *reporter.getreports("failed")]
    return dict(each for report in reports if OTHERS in report.nodeid for each in report.user_properties)


def _counts_here(reporter: pytest.TerminalReporter) -> str:
    """Of the tests that are marked comfyui, in pytest's own words."""
    kinds = ("failed", "passed", "skipped", "xfailed", "xpassed", "error")

    def of_here(report: pytest.TestReport) -> bool:
        return "comfyui" in report.keywords and OTHERS not in report.nodeid

    counts = {kind: sum(map(of_here, reporter.getreports(kind))) for kind in kinds}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "not tested"


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
    with ComfyServer(find_comfyui(), base) as running:
        yield running
