"""Where ComfyUI is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dode_nodes.hosts.comfy import launch as comfyui


def checkout(folder: Path) -> Path:
    """What can be taken for a ComfyUI."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "samplers.py").write_text("")
    return folder


def test_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert comfyui.find_comfyui() is None
    at_home = checkout(tmp_path / "home" / "comfy" / "ComfyUI")
    assert comfyui.find_comfyui() == at_home
    around = checkout(tmp_path / "around")
    monkeypatch.setattr(comfyui, "PACK", around / "custom_nodes" / "dode-nodes")
    assert comfyui.find_comfyui() == around
    named = checkout(tmp_path / "named")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert comfyui.find_comfyui() == named
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nothing"))
    assert comfyui.find_comfyui() is None
