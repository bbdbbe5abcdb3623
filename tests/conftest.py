"""Fixtures that several test modules share."""

from __future__ import annotations

from types import ModuleType

import pytest

from dode_nodes.hosts.comfy.launch import find_comfyui
from tests.import_comfyui import import_comfyui
from tests.oracles import load_k_diffusion


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """ComfyUI's `comfy` package, e.g. comfyui.samplers. Mark tests that use it `comfyui`."""
    checkout = find_comfyui()
    if checkout is None:
        pytest.skip("no ComfyUI checkout: set COMFYUI_PATH")
    try:
        return import_comfyui(checkout, tmp_path_factory.mktemp("comfyui"))
    except ImportError as error:
        pytest.skip(f"the ComfyUI at {checkout} cannot be imported: {error}")


@pytest.fixture(scope="session")
def k_diffusion() -> ModuleType:
    """k-diffusion's sampling module."""
    try:
        return load_k_diffusion()
    except ImportError as error:
        pytest.skip(f"no k-diffusion oracle: {error}")
