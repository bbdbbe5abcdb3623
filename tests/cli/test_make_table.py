"""``distill`` for an embedded model: what it says, writes, and leaves when it is ended."""

from __future__ import annotations

import errno
import re
from collections import Counter
from pathlib import Path

import pytest

from dode_nodes import LambdaTable, Pipeline, Progress
from dode_nodes.cli.bar import Bar
from dode_nodes.cli.commands import main
from dode_nodes.demo.colour.models import load_colour_model
from dode_nodes.demo.models import load_demo_model, noise_schedule
from dode_nodes.sampling.schedules import make_sigmas
from dode_nodes.tables.describe import summary_text
from dode_nodes.tables.provenance import DISTILLED

SMALL = ["distill", "--steps", "3", "--latents", "4", "--scale", "2"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "tables" / "mine.safetensors"


def end_at(monkeypatch: pytest.MonkeyPatch, stage: str, evaluations: int, error: BaseException) -> None:
    """Raise after so many of a stage's evaluations, as Ctrl-C or a model may."""
    tell = Bar.__call__
    seen: Counter[Bar] = Counter()

    def ending(self: Bar, progress: Progress) -> None:
        seen[self] += progress.stage == stage
        if seen[self] > evaluations:
            raise error
        tell(self, progress)

    monkeypatch.setattr(Bar, "__call__", ending)


@pytest.mark.parametrize(("kind", "schedule"), [("eps", "karras"), ("flow", "simple")])
def test_says_the_cost_saves_and_shows_the_table(
    kind: str, schedule: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--model", kind, "--steps", "4", "3", "4", "--out", str(out)]) == 0
    table = LambdaTable.load(out)
    assert [r.steps for r in table.rows if r.origin.kind == DISTILLED] == [4, 3]
    assert any("refined" in r.report for r in table.rows)
    assert table.model == load_demo_model(kind).facts
    for found in table.rows:
        assert found.settings["schedule"] == schedule
        assert found.settings["cfg"] == 2.0
        assert found.report["held_out_latents"] == 1
    printed = capsys.readouterr()
    cost, *_, path = printed.out.splitlines()
    assert re.match(r"at most \d+ evaluations: teacher \d+, students \d+, refining \d+", cost)
    assert path == f"The table: {out}"
    assert summary_text(table.rows) in printed.out
    assert "evaluations/s" in printed.err
    assert [file.name for file in out.parent.iterdir()] == ["mine.safetensors"]


def test_the_model_of_pictures_takes_prompts_of_words_that_it_knows(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--model",
        "pictures",
        "--prompt",
        "night sea",
        "--prompt",
        "sunset over a lake",
        "--out",
        str(out),
    ]
    assert main([*SMALL, "--steps", "2", "--latents", "2", "--refine-budget", "0", *options]) == 0
    table = LambdaTable.load(out)
    assert table.model == load_colour_model("flow").facts
    assert table.rows[0].settings["cfg"] == 3.0
    monkeypatch.delattr(Pipeline, "run")  # from here on nothing is evaluated
    assert (
        main(
            ["distill", *options[:2], "--prompt", "flower", "--out", str(out.with_name("other.safetensors"))]
        )
        == 2
    )
    assert "'flower'" in capsys.readouterr().err
    assert (
        main(
            ["distill", "--model", "eps", "--prompt", "cat", "--out", str(out.with_name("other.safetensors"))]
        )
        == 2
    )
    assert "draw digits" in capsys.readouterr().err


def test_without_prompts_the_model_of_pictures_is_fitted_on_what_people_may_ask_for(out: Path) -> None:
    options = [*SMALL, "--model", "pictures", "--steps", "2", "--latents", "2", "--refine-budget", "0"]
    first, second = load_colour_model("flow").prompts()[0][:2]
    asked = ["--prompt", first, "--prompt", second]
    tables = []
    for name, prompts in (("own", []), ("given", asked), ("others", ["--prompt", "forest"])):
        path = out.with_stem(name)
        assert main([*options, *prompts, "--out", str(path)]) == 0
        tables.append(LambdaTable.load(path).rows[0].weights.tolist())
    assert tables[0] == tables[1] != tables[2]


def test_one_step_makes_a_row_and_says_that_there_is_nothing_to_fit(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--refine-budget", "0", "--steps", "1", "--out", str(out)]) == 0
    (found,) = LambdaTable.load(out).rows
    assert found.weights.tolist() == [0.0]
    printed = capsys.readouterr().out
    cost, remark, *_ = printed.splitlines()
    assert "refining" not in cost
    assert "with one evaluation there is nothing to fit" in remark
    assert printed.count(remark) == 1


def test_options_do_what_they_say(out: Path) -> None:
    options = ["--solver", "dpmpp_2m", "--prediction", "data", "--schedule", "exponential", "--cfg", "1"]
    assert main([*SMALL, *options, "--refine-budget", "0", "--seed", "7", "--out", str(out)]) == 0
    (found,) = LambdaTable.load(out).rows
    assert (found.solver, found.prediction) == ("dpmpp_2m", "data")
    assert found.sigmas.tolist() == pytest.approx(
        make_sigmas("exponential", 3, noise_schedule("eps")).tolist()
    )
    expected = {"cfg": 1.0, "seed": 7, "schedule": "exponential", "scale": 2, "latents": 4}
    assert expected.items() <= found.settings.items()


def test_what_is_there_stays_and_nothing_is_evaluated(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(Pipeline, "run")
    out.parent.mkdir()
    out.write_text("mine")
    assert main([*SMALL, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_a_name_that_is_taken_meanwhile_costs_no_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Pipeline.run

    def run_and_write(self: Pipeline, progress: object) -> None:
        run(self, progress)
        out.write_text("another's")

    monkeypatch.setattr(Pipeline, "run", run_and_write)
    assert main([*SMALL, "--refine-budget", "0", "--out", str(out)]) == 0
    assert out.read_text() == "another's"
    assert LambdaTable.load(out.with_name("mine-2.safetensors")).rows


@pytest.mark.whole_race
def test_interrupted_it_saves_what_was_found(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end_at(monkeypatch, "refining", 170, KeyboardInterrupt())
    for name in ("mine-partial", "mine-partial-2"):
        assert main([*SMALL, "--refine-budget", "20", "--out", str(out)]) == 130
        partial = out.with_name(f"{name}.safetensors")
        assert capsys.readouterr().err.endswith(
            f"interrupted: the rows found so far are saved in {partial}\n"
        )
        greedy, refined = LambdaTable.load(partial).rows
        assert not greedy.is_refined
        assert refined.report["refined"]["interrupted"]
    assert not out.exists()


def test_interrupted_before_there_is_anything(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end_at(monkeypatch, "teacher", 3, KeyboardInterrupt())
    assert main([*SMALL, "--out", str(out)]) == 130
    assert capsys.readouterr().err.endswith("interrupted: nothing was written\n")
    assert list(out.parent.iterdir()) == []


def test_an_error_costs_nothing_of_what_was_found(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end_at(monkeypatch, "refining", 2, OSError(errno.ENOMEM, "no memory"))
    assert main([*SMALL, "--out", str(out)]) == 2
    partial = out.with_name("mine-partial.safetensors")
    assert capsys.readouterr().err.endswith(
        f"the rows found so far are saved in {partial}\nerror: no memory\n"
    )
    assert not any(row.is_refined for row in LambdaTable.load(partial).rows)


def test_what_was_fitted_before_is_not_fitted_again(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*SMALL, "--steps", "2", "--refine-budget", "0", "--model", "eps"]
    ran: list[int] = []
    run = Pipeline.run
    monkeypatch.setattr(Pipeline, "run", lambda self, work: ran.append(1) or run(self, work))
    first, again, redone = (out.with_name(f"{name}.safetensors") for name in ("first", "again", "redone"))
    assert main([*quick, "--out", str(first)]) == 0
    capsys.readouterr()
    assert main([*quick, "--micro-batch", "2", "--out", str(again)]) == 0
    said, *_ = capsys.readouterr().out.splitlines()
    assert said == "this was fitted before, and the same table is written. To fit it again, add --redo"
    assert len(ran) == 1
    assert LambdaTable.load(again) == LambdaTable.load(first)
    for count, more in enumerate((["--seed", "1"], ["--cfg", "3"], ["--scale", "3"]), 2):
        assert main([*quick, *more, "--out", str(out.with_name(f"{count}.safetensors"))]) == 0
        assert len(ran) == count
    assert main([*quick, "--redo", "--out", str(redone)]) == 0
    assert len(ran) == 5
    assert "fitted before" not in capsys.readouterr().out


def test_interrupted_it_goes_on_from_there(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--refine-budget", "4", "--out", str(out)]
    with monkeypatch.context() as ending:
        end_at(ending, "refining", 5, KeyboardInterrupt())
        assert main(options) == 130
    stages: list[str] = []
    tell = Bar.__call__
    monkeypatch.setattr(Bar, "__call__", lambda self, work: stages.append(work.stage) or tell(self, work))
    capsys.readouterr()
    assert main(options) == 0
    assert "this was stopped before: it goes on from there" in capsys.readouterr().out
    assert stages[0] == "refining"  # what came before is not done twice
    monkeypatch.setenv("XDG_CACHE_HOME", str(out.parent / "elsewhere"))
    assert main([*options[:-1], str(out.with_name("whole.safetensors"))]) == 0
    assert LambdaTable.load(out) == LambdaTable.load(out.with_name("whole.safetensors"))


def test_without_comfyui(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"")
    arguments = ["distill", "--checkpoint", str(checkpoint), "--prompt", "a cat"]
    assert main([*arguments, "--out", str(tmp_path / "table.safetensors")]) == 2
    assert "set COMFYUI_PATH" in capsys.readouterr().err
