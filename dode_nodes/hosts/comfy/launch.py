"""Finds ComfyUI and uses it as a library, in a plain process, without its server."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path

import torch

from ...errors import DodeError
from ...fit.ranks import is_first_rank

PACK = Path(__file__).resolve().parents[3]


def find_comfyui() -> Path | None:
    """$COMFYUI_PATH if it is set, else the ComfyUI whose custom_nodes the pack lies in, else ~/comfy/ComfyUI."""
    if "COMFYUI_PATH" in os.environ:
        candidates = [Path(os.environ["COMFYUI_PATH"])]
    else:
        candidates = [Path.home() / "comfy" / "ComfyUI"]
        if PACK.parent.name == "custom_nodes":
            candidates.insert(0, PACK.parents[1])
    return next((path for path in candidates if (path / "comfy" / "samplers.py").is_file()), None)


def start_comfyui() -> None:
    """Make ComfyUI's modules importable, as a checkpoint's loading and sampling need them.

    Raises:
        DodeError: there is none, or not with all that it needs.
    """
    checkout = find_comfyui()
    if checkout is None:
        raise DodeError(
            "set COMFYUI_PATH to the folder of your ComfyUI, or use --model: a checkpoint needs ComfyUI, and none "
            "was found"
        )
    if not is_first_rank():
        logging.disable()  # the first says the same
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, of image files that are not read here
            open_comfyui(checkout, cpu=not _has_gpu())
            importlib.import_module("comfy.sd")
    except ImportError as error:
        raise DodeError(
            f"the ComfyUI at {checkout} cannot be imported: {error}. Run this with ComfyUI's own Python, and "
            "install the pack's requirements there"
        ) from error


def open_comfyui(checkout: Path, *, cpu: bool, base_directory: Path | None = None) -> None:
    """Put ComfyUI on the path, with the options that its modules read as they are imported.

    Args:
        base_directory: where it looks for models and writes; None for its own folder.

    Raises:
        ImportError: something that it needs is not installed.
    """
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    # Before any other of its modules: they look for a GPU. It reads sys.argv only where its main.py asks for it.
    options = importlib.import_module("comfy.cli_args").args
    options.cpu = options.cpu or cpu
    if base_directory is not None:
        options.base_directory = str(base_directory)


def _has_gpu() -> bool:
    xpu = getattr(torch, "xpu", None)
    return torch.cuda.is_available() or torch.backends.mps.is_available() or bool(xpu and xpu.is_available())
