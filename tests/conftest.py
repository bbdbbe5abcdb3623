"""Fixtures that several test modules share, and what a run has found here to test in."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from types import ModuleType
from uuid import uuid4

import pytest
import torch

from tests import browser
from tests.comfyui_hosts import HERE, HOSTS
from tests.import_comfyui import import_comfyui
from tests.oracles import load_k_diffusion
from tests.webui_hosts import WEBUIS

ELSEWHERE = ("test_other_hosts", "test_webuis")
"""These tests run others by another Python, for minutes."""


def pytest_configure(config: pytest.Config) -> None:
    """Where several processes test, each has a core, and so have those that they start."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest goes first: another process does the rest meanwhile."""
    items.sort(key=lambda item: not _is_elsewhere(item.nodeid))


def pytest_collection_finish() -> None:
    """Whoever collects garbage need not look at a million objects of code each time."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What a run on this machine can show, whatever was skipped; and what the tests in each ComfyUI came to."""
    counts = _counts_elsewhere(terminalreporter) | {str(HERE): _counts_here(terminalreporter)}
    for host in map(str, [*HOSTS, *WEBUIS]):
        terminalreporter.write_line(f"found: {host}: {counts.get(host, 'not tested')}")
    found = {
        "ComfyUI": len(HOSTS) or "none (set COMFYUI_PATH)",
        "WebUI": len(WEBUIS) or "none (set WEBUI_PATHS)",
        "browser": browser.missing() or "found",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    terminalreporter.write_line("found: " + "; ".join(f"{name}: {what}" for name, what in found.items()))


def _is_elsewhere(nodeid: str) -> bool:
    return any(name in nodeid for name in ELSEWHERE)


def _counts_elsewhere(reporter: pytest.TerminalReporter) -> dict[str, str]:
    """What the tests of further hosts came to."""
    reports = [*reporter.getreports("passed"), *reporter.getreports("failed")]
    return dict(each for report in reports if _is_elsewhere(report.nodeid) for each in report.user_properties)


def _counts_here(reporter: pytest.TerminalReporter) -> str:
    """Of the tests that are marked comfyui, in pytest's own words."""
    kinds = ("failed", "passed", "skipped", "xfailed", "xpassed", "error")

    def of_here(report: pytest.TestReport) -> bool:
        return "comfyui" in report.keywords and not _is_elsewhere(report.nodeid)

    counts = {kind: sum(map(of_here, reporter.getreports(kind))) for kind in kinds}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "not tested"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds a fit that another has finished, or a person's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / f"cache-{uuid4().hex}"))


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test can see that a file outlives a power cut, and a small fit waits a dozen times for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # fails as it does, where there is no such file
        yield


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """ComfyUI's `comfy` package, e.g. comfyui.samplers. Mark tests that use it `comfyui`."""
    if HERE is None:
        pytest.skip("no ComfyUI that this Python runs: set COMFYUI_PATH")
    os.environ["COMFYUI_PATH"] = str(HERE.checkout)  # the product finds the same one
    try:
        return import_comfyui(HERE.checkout, tmp_path_factory.mktemp("comfyui"))
    except ImportError as error:
        pytest.fail(f"{HERE}, cannot be imported: {error}. See tests/comfyui-requirements.txt", pytrace=False)


@pytest.fixture(scope="session")
def k_diffusion() -> ModuleType:
    """k-diffusion's sampling module."""
    try:
        return load_k_diffusion()
    except ImportError as error:
        pytest.skip(f"no k-diffusion oracle: {error}")
