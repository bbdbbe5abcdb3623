"""A WebUI's data folder with the pack in it, and pytest for its Python."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

from tests.import_comfyui import REPOSITORY
from tests.webui_hosts import WebUI

PACK_CONTENTS = ("dode_nodes", "scripts", "lambdas", "install.py")
OF_PYTEST = ("_pytest", "iniconfig", "pluggy", "py", "pytest")
"""Its other needs are gradio's as well."""


def data_folder(host: WebUI, base: Path, checkpoint: Path) -> Path:
    """Models, the pack as the only extension, and options that make pictures quickly."""
    models = base / "models" / "Stable-diffusion"
    models.mkdir(parents=True)
    for name in ("tiny", "other"):
        (models / f"{name}.safetensors").symlink_to(checkpoint)
    pack = base / "extensions" / "dode-nodes"
    pack.mkdir(parents=True)
    for name in PACK_CONTENTS:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, pack)
    builtin = host.checkout / "extensions-builtin"
    options = {
        "disabled_extensions": sorted(each.name for each in builtin.iterdir()),
        "sd_vae_decode_method": "Approx cheap",
        "live_previews_enable": False,
        "randn_source": "CPU",
        "enable_quantization": True,  # AUTOMATIC1111 alone does not round t
    }
    if host.kind == "AUTOMATIC1111":
        for name in ("tiny", "other"):
            (models / f"{name}.yaml").write_text(_config(host))
    (base / "config.json").write_text(json.dumps(options))
    (base / "pytest.ini").write_text(
        "[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\nmarkers = whole_network\n"
    )
    return base


def _config(host: WebUI) -> str:
    """The checkpoint's, from the host's own for Stable Diffusion 1."""
    text = (host.checkout / "configs" / "v1-inference.yaml").read_text()
    for of_sd1, ours in (
        ("channel_mult: [ 1, 2, 4, 4 ]", "channel_mult: [ 1 ]"),
        ("attention_resolutions: [ 4, 2, 1 ]", "attention_resolutions: [ 1 ]"),
        ("num_res_blocks: 2\n        channel", "num_res_blocks: 1\n        channel"),
    ):
        text = text.replace(of_sd1, ours)
    return text


def pytest_folder(base: Path) -> Path:
    """pytest and what it needs, and the tests: all else is the host's own."""
    folder = base / "pytest"
    folder.mkdir()
    for name in OF_PYTEST:
        file = Path(str(importlib.import_module(name).__file__))
        source = file.parent if file.name == "__init__.py" else file
        (folder / source.name).symlink_to(source)
    (folder / "tests").symlink_to(REPOSITORY / "tests")
    return folder
