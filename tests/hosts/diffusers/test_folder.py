"""``python -m dode_nodes distill --pipeline``, on a folder that diffusers has saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dode_nodes import LambdaTable
from dode_nodes.cli.commands import main
from dode_nodes.hosts.diffusers import DODEScheduler
from dode_nodes.hosts.diffusers.folder import load
from tests.hosts.diffusers.tiny_pipelines import SIZE, call

OPTIONS = ("--prompt", "a cat", "--steps", "2", "--latents", "2", "--scale", "2", "--refine-budget", "0")


@pytest.fixture(scope="module")
def folder(_made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    _made("sd with words").save_pretrained(path)
    return path


def distil(folder: Path, out: Path, *more: str) -> int:
    return main(["distill", "--pipeline", str(folder), "--out", str(out), *OPTIONS, *more])


def test_a_folder_is_distilled(folder, tmp_path, capsys):
    out = tmp_path / "mine.safetensors"
    assert distil(folder, out, "--negative", "a dog", "--size", f"{2 * SIZE}x{SIZE}") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("at most ")
    assert f"The table: {out}" in printed
    table = LambdaTable.load(out)
    assert table.rows[0].settings["latent_shape"] == [4, SIZE, 2 * SIZE]
    assert table.rows[0].settings["cfg"] == 7
    pipe = load(folder)
    pipe.scheduler = DODEScheduler.from_table(out, pipe.scheduler.config, strict=True)
    assert call(pipe, 2).isfinite().all()


def only_pickled_weights(folder: Path) -> None:
    """Which diffusers would load, if it were not told otherwise."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(file), file.with_suffix(".bin"))
    file.unlink()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "it has no model_index.json"),
        (lambda folder: shutil.rmtree(folder / "unet"), "diffusers cannot load it as a pipeline"),
        (only_pickled_weights, "diffusers cannot load it as a pipeline"),
    ],
)
def test_a_folder_that_is_not_all_there_is_refused(folder, tmp_path, capsys, change, why):
    broken = shutil.copytree(folder, tmp_path / "broken")
    change(broken)
    assert distil(broken, tmp_path / "mine.safetensors") == 2
    assert why in capsys.readouterr().err


def test_no_code_of_a_folder_is_run(folder, tmp_path, capsys):
    """A component of a module that the folder brings along, as a stranger's may."""
    theirs = shutil.copytree(folder, tmp_path / "theirs")
    flag = tmp_path / "ran"
    (theirs / "scheduler" / "evil.py").write_text(f"open({str(flag)!r}, 'w')\nclass Evil: pass\n")
    index = json.loads((theirs / "model_index.json").read_text())
    index["scheduler"] = ["evil", "Evil"]
    (theirs / "model_index.json").write_text(json.dumps(index))
    assert distil(theirs, tmp_path / "mine.safetensors") == 2
    assert "cannot load it" in capsys.readouterr().err
    assert not flag.exists()


def test_it_needs_a_prompt(folder, tmp_path, capsys):
    assert main(["distill", "--pipeline", str(folder), "--out", str(tmp_path / "t.safetensors")]) == 2
    assert "give at least one --prompt with --pipeline" in capsys.readouterr().err
