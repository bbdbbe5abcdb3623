"""The pack as ComfyUI loads it, an empty folder for its tables, and what it says."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.hosts.comfy.cases import subjects
from tests.hosts.comfy.cases.pack import Pack, load_pack
from tests.hosts.comfy.cases.subjects import Subject
from tests.short_race import shorten_race


@pytest.fixture
def pack_of_cases(comfyui: ModuleType) -> Pack:
    """See ``load_pack``."""
    return load_pack()


@pytest.fixture
def tables(pack_of_cases: Pack) -> Iterator[Path]:
    """models/lambdas, where tables are saved: there, and empty. Afterwards ComfyUI has forgotten that it was."""
    import folder_paths

    folder = Path(folder_paths.models_dir) / "lambdas"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)
    folder_paths.filename_list_cache.pop("lambdas", None)  # it would look for the folder


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matplotlib, which takes half of a small distillation's time."""
    loaded = [name for name in sys.modules if name.startswith("matplotlib.")]
    for name in ("matplotlib", *loaded):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def dode(dode_with_pictures: Pack, without_pictures: None) -> Pack:
    """The pack's nodes where no picture matters."""
    return dode_with_pictures


@pytest.fixture
def dode_with_pictures(pack_of_cases: Pack, tables: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pack]:
    """The pack's nodes, called as the server calls them; they save to ``tables``. Their figures are of few latents."""
    library = pack_of_cases.library.__name__
    shorten_race(importlib.import_module(f"{library}.fit.race"), monkeypatch)
    monkeypatch.setattr(f"{library}.hosts.comfy.job.UNSEEN", 2)
    with torch.inference_mode():
        yield pack_of_cases


@pytest.fixture(scope="session")
def checkpoint(comfyui: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.5."""
    path = tmp_path_factory.mktemp("checkpoint") / "sd15.safetensors"
    subjects.sd15(path)
    return path


@pytest.fixture
def sd15(checkpoint: Path) -> Subject:
    """The model of ``checkpoint``, loaded anew."""
    return subjects.sd15(checkpoint)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What the pack has warned of so far, a remark per line; but for that matplotlib is missing."""

    def text() -> str:
        records = [record for record in caplog.records if record.levelno >= logging.WARNING]
        lines = [record.getMessage() for record in records]
        return "\n".join(line for line in lines if "D-ODE" in line and "matplotlib" not in line)

    return text
