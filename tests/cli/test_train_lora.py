"""``distill-lora`` for an embedded model: what it says, writes, and leaves when it is ended."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dode_nodes import LambdaRow, LambdaTable, Progress, sample_dode
from dode_nodes.cli.bar import Bar
from dode_nodes.cli.commands import main
from dode_nodes.demo.models import DemoModel, load_demo_model
from dode_nodes.fit.lora_pipeline import LoraPipeline
from dode_nodes.tables.lora_file import content_hash, factors_of

TINY = ["distill-lora", "--quality", "quick", "--latents", "4", "--iterations", "3"]


TEACHER_STEPS = 4


@pytest.fixture(autouse=True)
def quick_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dode_nodes.fit.lora_pipeline.TEACHER_STEPS", TEACHER_STEPS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "tables" / "mine.safetensors"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A table of two plain rows, as if distilled: nothing has to be fitted first."""
    model = load_demo_model("eps")
    found = []
    for steps in (1, 2):
        sigmas = model.make_sigmas("karras", steps, True).double().numpy()
        found.append(LambdaRow("euler", sigmas, (1,) * steps, np.zeros(steps), settings={"cfg": 1.5}))
    return LambdaTable(found, model=model.facts).save(tmp_path / "rows.safetensors")


def merged(model: DemoModel, lora: Path, strength: float) -> DemoModel:
    """The model with the file's products in its weights, as a loader that knows nothing else has it."""
    state = safetensors.torch.load_file(lora)
    for name, module in model.network.named_modules():
        key = f"lora_unet_network_{name.replace('.', '_')}"
        if f"{key}.alpha" in state:
            up, down = (state[f"{key}.lora_{part}.weight"].float().flatten(1) for part in ("up", "down"))
            scale = strength * float(state[f"{key}.alpha"]) / len(down)
            module.weight += scale * (up @ down).reshape(module.weight.shape)
    return model


def test_it_says_the_cost_and_saves_a_table_that_names_the_lora(
    out: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--table", str(rows), "--steps", "2", "1", "--rank", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    cost, *_ = printed.splitlines()
    # 4 noises over twice the teacher's steps, 1 over the steps; 3 batches of 3 for each row, backward as two; 8 looks
    training = 3 * 3 * 3 * (2 + 1) + 8 * (2 + 1)
    teacher, trial = (4 * 2 + 1) * TEACHER_STEPS, 3 * 2 * 3
    assert (
        cost
        == f"at most {trial + teacher + training + 3} evaluations: trying a batch {trial}, teacher {teacher}, "
        f"training the LoRA {training}"
    )
    table, lora = LambdaTable.load(out), out.with_name("mine-lora.safetensors")
    state = safetensors.torch.load_file(lora)
    assert max(len(value) for name, value in state.items() if "lora_down" in name) == 3
    assert [row.nfe for row in table.rows] == [2, 1]
    named = [row.trained_lora for row in table.rows if row.trained_lora is not None]
    assert named
    for each in named:
        assert each.content == content_hash(factors_of(state))
        assert each.name == lora.name
        assert each.error < each.error_without
        assert each.latents == 1
        assert f"{each.error:#.3g}" in printed
    assert printed.splitlines()[-2:] == [str(out), str(lora)]
    assert {file.name for file in out.parent.iterdir()} == {out.name, lora.name}


def test_the_file_does_in_the_weights_what_it_did_beside_them(out: Path, rows: Path) -> None:
    """The error that the table tells is that of any loader's network."""
    assert main([*TINY, "--table", str(rows), "--iterations", "6", "--out", str(out)]) == 0
    (row,) = LambdaTable.load(out).rows
    assert row.trained_lora is not None
    model = load_demo_model("eps")
    x = model.noise(range(50, 54))
    labels = {"labels": torch.arange(4)}
    sigmas = torch.tensor(row.sigmas, dtype=torch.float32)

    def ends(of: DemoModel) -> torch.Tensor:
        return sample_dode(of.denoiser(1.5), x, sigmas, dict(labels), row=row)

    alone = ends(model)
    fine = model.make_sigmas("karras", 8, False)
    goal = sample_dode(model.denoiser(1.5), x, fine, dict(labels), solver="dpmpp_2m")
    lora = out.with_name("mine-lora.safetensors")
    with_lora = ends(merged(load_demo_model("eps"), lora, row.trained_lora.strength))
    assert (with_lora - goal).square().mean() < (alone - goal).square().mean()


@pytest.mark.whole_race
def test_rows_are_distilled_first_where_no_table_is_given(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--model", "flow", "--latents", "2", "--out", str(out)]) == 0
    assert re.match(
        r"at most \d+ evaluations: rows \d+, trying a batch \d+, teacher", capsys.readouterr().out
    )
    (row,) = LambdaTable.load(out).rows
    assert row.best_stock is not None
    assert row.settings["cfg"] == 2.0


@pytest.mark.parametrize(
    ("stage", "left"), [("teacher", ["end-partial"]), ("the best", ["end-partial", "end-partial-lora"])]
)
def test_what_there_is_when_it_is_ended_is_saved(
    stage: str, left: list[str], tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tell = Bar.__call__

    def ending(self: Bar, progress: Progress) -> None:
        late = progress.done >= 0.95 * progress.total
        if progress.stage == stage or (stage == "the best" and late):
            raise KeyboardInterrupt
        tell(self, progress)

    monkeypatch.setattr(Bar, "__call__", ending)
    out = tmp_path / "tables" / "end.safetensors"
    assert main([*TINY, "--table", str(rows), "--out", str(out)]) == 130
    assert sorted(file.stem for file in out.parent.iterdir()) == left
    assert str(out.with_stem("end-partial")) in capsys.readouterr().err
    (row,) = LambdaTable.load(out.with_stem("end-partial")).rows
    assert (row.trained_lora is not None) == (len(left) == 2)


def test_a_lora_that_makes_nothing_better_is_not_saved(
    out: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--table", str(rows), "--rate", "1e-30", "--iterations", "1", "--out", str(out)]) == 0
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    assert LambdaTable.load(out).rows[0].trained_lora is None
    assert "the LoRA makes no row better" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "lake"], "--prompt"),
        (["--latents", "1"], "--latents"),
        (["--iterations", "0"], "iteration"),
        (["--rate", "-1"], "learning rate"),
        (["--rank", "0"], "rank"),
        (["--size", "64x64"], "only with --checkpoint"),
        (["--cfg", "nan"], "cfg"),
        (["--steps", "3"], "no row of 3 evaluations"),
        (["--model", "flow"], "table of this model"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_evaluated(
    options: list[str], words: str, out: Path, rows: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delattr(LoraPipeline, "run")
    assert main([*TINY, "--table", str(rows), *options, "--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert not list(out.parent.iterdir())


def test_neither_file_is_overwritten(
    out: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(LoraPipeline, "run")
    out.parent.mkdir()
    lora = out.with_name("mine-lora.safetensors")
    lora.write_text("mine")
    assert main([*TINY, "--table", str(rows), "--out", str(out)]) == 2
    assert lora.read_text() == "mine"
    assert str(lora) in capsys.readouterr().err


def test_above_five_steps_it_advises_against(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(LoraPipeline, "run")
    with pytest.raises(AttributeError):
        main([*TINY, "--steps", "6", "--out", str(out)])
    assert "hardly pays" in capsys.readouterr().out
