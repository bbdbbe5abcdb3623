"""A real ComfyUI in this process, on the CPU, as an oracle and as a host to test in."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]


def find_comfyui() -> Path | None:
    """$COMFYUI_PATH if it is set, else the ComfyUI whose custom_nodes we lie in, else ~/comfy/ComfyUI."""
    if "COMFYUI_PATH" in os.environ:
        candidates = [Path(os.environ["COMFYUI_PATH"])]
    else:
        candidates = [Path.home() / "comfy" / "ComfyUI"]
        if REPOSITORY.parent.name == "custom_nodes":
            candidates.insert(0, REPOSITORY.parents[1])
    return next((path for path in candidates if (path / "comfy" / "samplers.py").is_file()), None)


def import_comfyui(checkout: Path, base_directory: Path) -> ModuleType:
    """Import `comfy` with what sampling needs; `base_directory` is where it looks for models and writes.

    Raises:
        ImportError: one of ComfyUI's own requirements is not installed.
    """
    (base_directory / "custom_nodes").mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(checkout))
    _stub_torchvision_if_broken()

    # Before any other module of ComfyUI, which look for a GPU as they are imported. ComfyUI reads sys.argv
    # only where its main.py asks for it.
    cli_args = importlib.import_module("comfy.cli_args")
    cli_args.args.cpu = True
    cli_args.args.base_directory = str(base_directory)

    for name in (
        "k_diffusion.sampling",
        "model_base",
        "model_patcher",
        "model_sampling",
        "sample",
        "samplers",
    ):
        importlib.import_module(f"comfy.{name}")
    return sys.modules["comfy"]


def _stub_torchvision_if_broken() -> None:
    """ComfyUI imports torchvision but samples without it; few of its versions import beside a CPU torch."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its image codecs are missing
            importlib.import_module("torchvision.transforms")
    except (ImportError, RuntimeError):
        stub = ModuleType("torchvision")
        stub.transforms = ModuleType("torchvision.transforms")
        sys.modules.update({"torchvision": stub, "torchvision.transforms": stub.transforms})
