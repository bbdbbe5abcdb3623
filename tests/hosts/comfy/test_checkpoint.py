"""The command line on a checkpoint: loaded by ComfyUI's own loader, evaluated in its own sampling path."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dode_nodes import LambdaTable, Progress, Recipe, Teacher
from dode_nodes.cli.bar import Bar
from dode_nodes.cli.commands import main
from dode_nodes.hosts.comfy.launch import find_comfyui
from tests.checkpoints import write_sd15
from tests.import_comfyui import REPOSITORY

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def checkpoint(comfyui: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    write_sd15(path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "mine.safetensors"


def arguments(checkpoint: Path, out: Path, *more: str) -> list[str]:
    return ["distill", "--checkpoint", str(checkpoint), "--prompt", "a cat", "--size", "16x16", "--cfg", "2",
            "--steps", "3", "--latents", "4", "--scale", "1", "--out", str(out), *more]  # fmt: skip


@pytest.mark.slow_host
def test_as_a_program(checkpoint: Path, out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dode_nodes", *arguments(checkpoint, out, "--refine-budget", "0")],
        capture_output=True, text=True, timeout=120, cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COMFYUI_PATH": str(find_comfyui())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "evaluations: teacher" in done.stdout.splitlines()[0]
    assert done.stdout.endswith(f"The table: {out}\n")
    table = LambdaTable.load(out)
    assert (table.model["family"], table.model["prediction_type"]) == ("sd15", "eps")
    assert [row.steps for row in table.rows] == [3]


def test_the_nodes_take_the_table(
    checkpoint: Path, out: Path, pack: ModuleType, run_node: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two prompts, refined; then ComfyUI's own nodes load the model, and the pack's sample with the table."""
    import nodes
    import torch

    more = ["--prompt", "a dog", "--negative", "blurry", "--refine-budget", "4", "--solver", "dpmpp_2m"]
    assert main(arguments(checkpoint, out, *more)) == 0
    again = out.with_name("again.safetensors")
    assert main(arguments(checkpoint, again, *more)) == 0
    assert "\nthis was fitted before" in capsys.readouterr().out
    assert LambdaTable.load(again) == LambdaTable.load(out)
    table = LambdaTable.load(out)
    greedy = table.rows[0]
    assert "refined" in table.rows[-1].report
    expected = {"cfg": 2.0, "seed": 0, "prompts": 2, "scheduler": "karras", "latent_shape": [4, 2, 2]}
    assert expected.items() <= greedy.settings.items()

    model, clip, _ = load(checkpoint)
    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a cat", "blurry"))
    (latent,) = run_node(
        pack.DodeKSampler, model=model, positive=positive, negative=negative, cfg=2.0, seed=1, steps=3,
        denoise=1.0, table=table, solver="dpmpp_2m", latent_image={"samples": torch.zeros(1, 4, 2, 2)},
    )  # fmt: skip
    assert latent["samples"].isfinite().all()


def load(checkpoint: Path) -> tuple[Any, ...]:
    """As the node 'Load Checkpoint'."""
    import comfy.sd

    return comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, pack: ModuleType) -> tuple[Any, Any]:
    """Model and text encoder, as the command line loads them: that takes most of a test's time."""
    from dode_nodes.hosts.comfy.checkpoint import _load

    return _load(checkpoint)


@pytest.fixture
def loaded_once(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line has them, whatever it is asked to load."""
    from dode_nodes.hosts.comfy import checkpoint as loading

    monkeypatch.setattr(loading, "_load", lambda path: loaded)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--size", "60x64"], "must be multiples of 8 pixels"),
        (["--schedule", "none"], "this ComfyUI has"),
        (["--solver", "none"], "no solver is called"),
        (["--teacher", "dpm_adaptive"], "dpm_adaptive"),
        (["--latents", "2", "--prompt", "b", "--prompt", "c"], "need at least 3 latents"),
    ],
)
def test_what_cannot_be_is_refused(
    options: list[str],
    why: str,
    checkpoint: Path,
    out: Path,
    loaded_once: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(checkpoint, out, *options)) == 2
    assert why in capsys.readouterr().err
    assert not out.exists()


def test_files_that_will_not_do(
    checkpoint: Path, out: Path, pack: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without, cut = tmp_path / "without.safetensors", tmp_path / "cut.safetensors"
    write_sd15(without, text_encoder=False)
    with checkpoint.open("rb") as file:
        cut.write_bytes(file.read(100_000))
    for file, why in ((without, "it has no text encoder"), (cut, "ComfyUI cannot load it as a checkpoint")):
        assert main(arguments(file, out)) == 2
        assert f"error: {file}: {why}" in capsys.readouterr().err


@pytest.mark.slow_host
def test_interrupted_it_saves_what_was_found(
    checkpoint: Path,
    out: Path,
    pack: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(self: Bar, progress: Progress) -> None:
        if progress.stage == "refining":
            raise KeyboardInterrupt

    monkeypatch.setattr(Bar, "__call__", interrupt)
    assert main(arguments(checkpoint, out, "--refine-budget", "8")) == 130
    partial = out.with_name("mine-partial.safetensors")
    assert f"interrupted: the rows found so far are saved in {partial}" in capsys.readouterr().err
    assert LambdaTable.load(partial).model["family"] == "sd15"


# --- distill-lora -------------------------------------------------------------------------------------


@pytest.fixture
def tiny_lora(loaded_once: None, checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command on little."""
    import dode_nodes.fit.quality as quality
    from dode_nodes.cli import train_lora_checkpoint
    from dode_nodes.fit import lora_pipeline
    from dode_nodes.hosts.comfy import job

    monkeypatch.setattr(lora_pipeline, "TEACHER_STEPS", 3)
    monkeypatch.setattr(job, "UNSEEN", 1)
    monkeypatch.setattr(train_lora_checkpoint, "Recipe", partial(Recipe, teacher=Teacher(scale=1)))
    monkeypatch.setitem(quality.QUALITIES, "quick", replace(quality.QUALITIES["quick"], latents=2))
    return ["distill-lora", "--checkpoint", str(checkpoint), "--prompt", "a cat", "--size", "32x32", "--cfg", "2",
            "--steps", "2", "--quality", "quick", "--latents", "3", "--iterations", "2", "--rank", "2",
            "--batch-size", "2", "--out", str(out)]  # fmt: skip


@pytest.mark.slow_host
def test_a_lora_for_a_checkpoint_is_one_that_comfyui_loads(
    tiny_lora: list[str], loaded: tuple[Any, Any], out: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The rows are made first. Stopped while it trains, it leaves them and goes on; then the table names the LoRA."""
    import comfy.sd
    import safetensors.torch

    from dode_nodes.hosts.comfy.own_lora import loras_on
    from dode_nodes.tables.lora_file import content_hash, factors_of

    tell = Bar.__call__

    def ending(self: Bar, progress: Progress) -> None:
        if progress.stage.startswith("training") and progress.done > 0.5 * progress.total:
            raise KeyboardInterrupt
        tell(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Bar, "__call__", ending)
        assert main(tiny_lora) == 130
    partial = out.with_stem(f"{out.stem}-partial")
    told = capsys.readouterr()
    assert str(partial) in told.err
    assert [row.nfe for row in LambdaTable.load(partial).rows] == [2]

    assert main(tiny_lora) == 0
    printed = capsys.readouterr().out
    assert "this was fitted before" in printed
    assert "this was stopped before" in printed
    assert "GiB of memory so far" in printed
    (row,) = LambdaTable.load(out).rows
    assert f"{row.trained_lora.error_without:#.3g}" in printed
    lora = safetensors.torch.load_file(out.with_stem(f"{out.stem}-lora"))
    assert row.trained_lora.content == content_hash(factors_of(lora))
    on = comfy.sd.load_lora_for_models(loaded[0], None, lora, row.trained_lora.strength, 0)[0]
    assert loras_on(on) == {row.trained_lora.content: [row.trained_lora.strength]}


@pytest.mark.slow_host
def test_what_a_lora_cannot_be_trained_from_is_refused(
    tiny_lora: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dode_nodes import LambdaRow

    other = tmp_path / "other.safetensors"
    rows = [LambdaRow("euler", np.array([14.6146, 1, 0]), (1, 1), np.zeros(2))]
    LambdaTable(rows, model={"family": "sdxl"}).save(other)
    without = [each for each in tiny_lora if each not in ("--prompt", "a cat")]
    for arguments_, why in (
        ([*tiny_lora, "--table", str(other)], "another kind of model"),
        ([*tiny_lora, "--table", str(other), "--steps", "3"], "no row of 3"),
        ([*tiny_lora, "--size", "60x64"], "must be multiples of 8 pixels"),
        (without, "at least one --prompt"),
        ([*tiny_lora, "--batch-size", "0"], "one latent in each"),
        ([*tiny_lora, "--rank", "0"], "at least 1"),
    ):
        assert main(arguments_) == 2
        assert why in capsys.readouterr().err
