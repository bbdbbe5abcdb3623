"""Which ComfyUIs are tested, and by which Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.comfyui_hosts import Host, find_hosts
from tests.import_comfyui import REPOSITORY

HERE = Path(sys.executable)


def checkout(folder: Path, version: str) -> Path:
    """What can be taken for a ComfyUI."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "samplers.py").write_text("")
    (folder / "comfyui_version.py").write_text(f'# generated\n__version__ = "{version}"\n')
    return folder


def test_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMFYUI_PATH", "COMFYUI_PATHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert find_hosts() == []
    newer = checkout(tmp_path / "comfy" / "ComfyUI-new", "0.33.0")
    own = newer / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to(HERE)
    older = checkout(tmp_path / "comfy" / "ComfyUI", "0.3.64")
    (tmp_path / "comfy" / "ComfyUI-models").mkdir()
    hosts = find_hosts()
    assert hosts == [Host(older, HERE), Host(newer, own)]
    assert [host.is_of_this_python for host in hosts] == [True, False]
    assert [str(host) for host in hosts] == [f"ComfyUI 0.3.64 at {older}", f"ComfyUI 0.33.0 at {newer}"]
    monkeypatch.setenv("COMFYUI_PATH", str(newer))
    assert find_hosts() == [Host(newer, HERE)]
    monkeypatch.setenv("COMFYUI_PATHS", f"{older}=/other/python{os.pathsep}{newer}{os.pathsep}/nothing")
    assert find_hosts() == [
        Host(older, Path("/other/python")),
        Host(newer, own),
        Host(Path("/nothing"), HERE),
    ]


def test_what_was_found_is_said_where_several_processes_test() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "1", "--dist", "loadfile", "tests/test_sigmas.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^found: ComfyUI: .*; browser: .*; GPU: ", done.stdout, re.M)
