"""What the pack changes in ComfyUI by being there: nothing, but for its own nodes and folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dode_nodes.hosts.comfy.launch import find_comfyui
from tests.server import install_pack

pytestmark = [pytest.mark.comfyui, pytest.mark.slow_host]

SCRIPT = Path(__file__).parent / "host_process.py"
EMPTY = "NODE_CLASS_MAPPINGS = {}"
RELOADER = """
import importlib
import comfy.k_diffusion.sampling
importlib.reload(comfy.k_diffusion.sampling)
NODE_CLASS_MAPPINGS = {}
"""


class Host:
    """Folders to load packs from, and ComfyUI processes that load them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.pack = install_pack(base / "custom_nodes")
        self.empty = self._write("empty", EMPTY)
        self.reloader = self._write("reloader", RELOADER)
        self.defaults = base / "my tables"
        paths = f"mine:\n    base_path: {base}\n    is_default: true\n    lambdas: my tables\n"
        (base / "paths.yaml").write_text(paths)

    def _write(self, name: str, code: str) -> Path:
        folder = self.base / "custom_nodes" / name
        folder.mkdir()
        (folder / "__init__.py").write_text(code)
        return folder

    def run(self, *choices: Sequence[Path]) -> list[dict[str, Any]]:
        """host_process.py's reports."""
        done = subprocess.run(
            [sys.executable, SCRIPT, find_comfyui(), self.base, *(",".join(map(str, packs)) for packs in choices)],
            capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def host(comfyui: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def reports(host: Host) -> dict[str, dict[str, Any]]:
    """By which packs there are."""
    choices = {
        "none": [host.empty],
        "ours": [host.pack],
        "reloader, ours": [host.reloader, host.pack],
        "ours, reloader": [host.pack, host.reloader],
    }
    return dict(zip(choices, host.run(*choices.values()), strict=True))


@pytest.fixture
def without(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return reports["none"]


@pytest.fixture
def alone(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return reports["ours"]


def test_samplers_and_their_latents_are_the_same_with_and_without(without, alone):
    assert without["ours"] is None
    assert alone["loaded"] == [True]
    for what in ("samplers", "schedulers", "k_diffusion", "latents"):
        assert alone[what] == without[what], what


def test_loading_imports_next_to_nothing(without, alone):
    """Neither matplotlib nor scipy.stats, nor more of PIL than ComfyUI has imported itself."""
    new = set(alone["imported"]) - set(without["imported"])
    foreign = {name for name in new if "dode_nodes" not in name and not name.endswith("dode-nodes")}
    beyond_python = {name for name in foreign if name.partition(".")[0] not in sys.stdlib_module_names}
    assert beyond_python <= {"safetensors.numpy", "comfyui_version"}


def test_lambdas_is_a_folder_of_safetensors_only(host, alone):
    folders, extensions = alone["lambdas"]
    assert extensions == [".safetensors"]
    assert folders[0] == str(host.defaults)
    assert str(host.pack / "lambdas") in folders
    assert str(host.base / "models" / "lambdas") in folders


def test_tables_are_saved_to_the_users_default_folder(host, alone):
    saved = Path(alone["ours"]["saved"])
    assert saved.parent == host.defaults
    assert re.fullmatch(r"host_process-[0-9a-f]{8}\.safetensors", saved.name)
    assert saved.is_file()
    assert not (host.pack / "lambdas" / saved.name).exists()


@pytest.mark.parametrize("order", ["reloader, ours", "ours, reloader"])
def test_works_beside_a_pack_that_reloads_k_diffusion(order, reports, alone):
    report = reports[order]
    assert report["loaded"] == [True, True]
    assert report["ours"]["lambdas"] == pytest.approx(alone["ours"]["lambdas"], rel=1e-6)
    assert report["ours"]["patched is sampler"]
    assert report["ours"]["changed"] > 1e-3
