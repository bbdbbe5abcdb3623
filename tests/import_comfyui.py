"""A real ComfyUI in this process, on the CPU, as an oracle and as a host to test in."""

from __future__ import annotations

import collections
import gc
import importlib
import sys
import warnings
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

from dode_nodes.hosts.comfy.launch import open_comfyui

REPOSITORY = Path(__file__).resolve().parents[1]


def import_comfyui(checkout: Path, base_directory: Path) -> ModuleType:
    """Import `comfy` with what sampling needs; `base_directory` is where it looks for models and writes.

    Raises:
        ImportError: one of ComfyUI's own requirements is not installed.
    """
    (base_directory / "custom_nodes").mkdir(parents=True, exist_ok=True)
    _stub_torchvision_if_broken()
    open_comfyui(checkout, cpu=True, base_directory=base_directory)
    for name in (
        "k_diffusion.sampling",
        "model_base",
        "model_patcher",
        "model_sampling",
        "sample",
        "samplers",
    ):
        importlib.import_module(f"comfy.{name}")
    _spare_small_models()
    gc.collect()
    gc.freeze()  # it collects garbage before many runs: that need not look at its million objects of code each time
    return sys.modules["comfy"]


def _spare_small_models() -> None:
    """At each evaluation ComfyUI makes a class for every prompt, and asks how much memory is free: some hundred thousand
    times in these tests, whose networks take no longer. The same class and the same number will do."""
    import comfy.model_management
    import comfy.samplers
    import psutil

    @cache
    def one_class(name: str, *fields: str) -> type:
        return collections.namedtuple(name, fields)

    free = psutil.virtual_memory()
    for host, name, changes in (
        (comfy.samplers, "collections", {"namedtuple": lambda name, fields: one_class(name, *fields)}),
        (comfy.model_management, "psutil", {"virtual_memory": lambda: free}),
    ):
        setattr(host, name, SimpleNamespace(**vars(getattr(host, name)) | changes))


def _stub_torchvision_if_broken() -> None:
    """ComfyUI imports torchvision but samples without it; few of its versions import beside a CPU torch."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its image codecs are missing
            importlib.import_module("torchvision.transforms")
    except (ImportError, RuntimeError):
        stub, transforms, functional, ops = (
            module_from_spec(ModuleSpec(f"torchvision{name}", None))
            for name in ("", ".transforms", ".transforms.functional", ".ops")
        )
        stub.transforms, transforms.functional, stub.ops = transforms, functional, ops
        ops.roi_align = ops.deform_conv2d = None  # newer ones import them by name
        sys.modules.update({each.__name__: each for each in (stub, transforms, functional, ops)})
