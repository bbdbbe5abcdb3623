"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch

from tests.comfyui_hosts import HERE
from tests.import_comfyui import import_comfyui
from tests.oracles import load_k_diffusion


def pytest_configure(config: pytest.Config) -> None:
    """Where several processes test, each has a core, and so have those that they start."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest goes first: another process does the rest meanwhile."""
    items.sort(key=lambda item: "test_other_hosts" not in item.nodeid)


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
