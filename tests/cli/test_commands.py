"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dode_nodes import DodeError, LambdaRow, LambdaTable, Progress
from dode_nodes.__main__ import main
from dode_nodes.cli import make_table as headless
from dode_nodes.demo import experiment as demo_module
from dode_nodes.demo.models import noise_schedule
from dode_nodes.demo.results import FILES
from dode_nodes.sampling.schedules import make_sigmas
from dode_nodes.tables.describe import summary_text

pytest.importorskip("matplotlib")


def row(**fields: object) -> LambdaRow:
    facts = {
        "solver": "euler",
        "sigmas": [10.0, 3.0, 0.5, 0.0],
        "evaluations": (1, 1, 1),
        "weights": [0.0, 0.4321, -0.1234],
        "settings": {"teacher": "dpmpp_2m", "cfg": 2.0, "latent_shape": [4, 8, 8]},
        "report": {
            "fitted_latents": 6,
            "held_out_latents": 2,
            "checked": True,
            "teacher_error": 0.0012,
            "lambda_standard_error": [None, 0.0345, 0.0567],
            "error": {"stock": [0.5, 0.4, 0.2], "dode": [0.5, 0.3, 0.1], "stock_end": 0.2, "dode_end": 0.1},
            "shrunk_to": 1.0,
            "evaluations": {"teacher": 300, "student": 24, "stock": 6},
        },
    }
    return LambdaRow(**(facts | fields))


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    return LambdaTable([row()], model={"name": "a model"}).save(tmp_path / "table.safetensors")


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"not a table")
    return path


class TestShow:
    def test_prints_all_that_matters(self, table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["show", str(table_file)]) == 0
        printed = capsys.readouterr().out
        for words in ("a model", "euler, 3 steps (3 evaluations, noise)", "teacher dpmpp_2m", "cfg 2", "4×8×8",
                      "stock 0.200, D-ODE 0.100 (−50 %)", "2 held-out latents", "0.00120",
                      "teacher 300, student 24, stock 6"):  # fmt: skip
            assert words in printed
        lines = [line.split() for line in printed.splitlines() if re.match(r"\s+\d", line)]
        assert lines == [
            ["1", "10", "3", "1", "–", "–", "0.500", "0.500"],
            ["2", "3", "0.5", "2", "+0.4321", "0.0345", "0.400", "0.300"],
            ["3", "0.5", "0", "3", "-0.1234", "0.0567", "0.200", "0.100"],
        ]

    def test_json_has_the_same_numbers(self, table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["show", "--json", str(table_file)]) == 0
        (shown,) = json.loads(capsys.readouterr().out)["rows"]
        assert shown["sigmas"] == [10.0, 3.0, 0.5, 0.0]
        assert shown["weights"] == [0.0, 0.4321, -0.1234]
        assert shown["report"] == dict(row().report)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"report": {"checked": False}}, "not checked"),
            ({"report": {"shrunk_to": 0}}, "set to 0"),
            ({"report": {"shrunk_to": 0.25}}, "shrunk to 0.25"),
            ({"report": {"undetermined": [1, 2]}}, "at evaluation 2, 3"),
            ({"solver_options": {"max_order": 2}}, "max_order 2"),
            ({"told_sigmas": [9.0, 2.5, 0.75]}, "0.75"),
            ({"weights": [[0, 0], [1, 2], [3, 4]]}, "mean of 2 channels"),
            ({"form": "history", "weights": np.tril(np.full((3, 3), 0.5))}, "+0.5000 +0.5000 +0.5000"),
            ({"evaluations": (2, 0, 1)}, "euler, 3 steps"),
        ],
    )
    def test_every_kind_of_row(
        self, fields: dict, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        LambdaTable([row(**fields)]).save(tmp_path / "table.safetensors")
        assert main(["show", str(tmp_path / "table.safetensors")]) == 0
        assert words in capsys.readouterr().out

    @pytest.mark.parametrize(
        "report",
        [
            {
                "error": 1,
                "lambda_standard_error": "?",
                "evaluations": [1],
                "teacher_error": {},
                "shrunk_to": "x",
            },
            {"error": {"stock": {}, "dode": ["?"], "stock_end": 10**400, "dode_end": True}},
            {"error": {"stock_end": 0.0, "dode_end": 0.0}, "undetermined": {"a": 1}},
            {"error": {"stock_end": 5e-324, "dode_end": 1e300}, "undetermined": ["?"]},
        ],
    )
    def test_odd_reports(self, report: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        LambdaTable([row(report=report)]).save(tmp_path / "table.safetensors")
        assert main(["show", str(tmp_path / "table.safetensors")]) == 0

    def test_a_file_cannot_steer_the_terminal(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hostile = "\x1b[2J\r\x07"
        table = LambdaTable([row(solver=hostile, settings={hostile: hostile})], model={"name": hostile})
        table.save(tmp_path / "table.safetensors")
        main(["show", str(tmp_path / "table.safetensors")])
        assert not set(hostile[:1] + "\r\x07") & set(capsys.readouterr().out)


class TestValidate:
    def test_a_line_per_file_and_1_if_one_is_bad(
        self, table_file: Path, bad_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["validate", str(table_file)]) == 0
        assert capsys.readouterr().out == f"{table_file}: OK, 1 row\n"
        assert main(["validate", str(bad_file), str(table_file), str(bad_file.parent)]) == 1
        first, second, third = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{bad_file}: ")
        assert second == f"{table_file}: OK, 1 row"
        assert third == f"{bad_file.parent}: not a file"

    def test_no_table_but_safetensors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"weight": np.ones(3)}, path)
        assert main(["validate", str(path)]) == 1
        assert "not a λ table" in capsys.readouterr().out


class TestErrors:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["show", "missing.safetensors"],
            ["show", "."],
            ["demo", "--steps", "1", "8"],
            ["demo", "--steps", "1001"],
            ["demo", "--seed", "-1"],
            ["demo", "--cfg", "nan"],
            ["demo", "--out", "a-file/results"],
            ["distill", "--steps", "1"],
            ["distill", "--steps", "5", "1000"],
            ["distill", "--seed", "-1"],
            ["distill", "--cfg", "inf"],
            ["distill", "--latents", "1"],
            ["distill", "--scale", "0"],
            ["distill", "--micro-batch", "0"],
            ["distill", "--refine-budget", "-1"],
            ["distill", "--refine-budget", "nan"],
            ["distill", "--refine-budget", "0.001"],
            ["distill", "--solver", "none"],
            ["distill", "--schedule", "none"],
            ["distill", "--out", "a-file/table.safetensors"],
            ["distill", "--out", "table.pt"],
            ["distill", "--prompt", "a cat"],
            ["distill", "--size", "64x64"],
            ["distill", "--checkpoint", "a-file"],
            ["distill", "--checkpoint", "a-file", "--prompt", "a cat"],
            ["distill", "--checkpoint", "missing.safetensors", "--prompt", "a cat"],
        ],
    )
    def test_one_line_and_2(
        self,
        arguments: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("a-file").write_text("")
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert re.fullmatch(r"error: .+\n", printed.err)
        assert printed.out == ""
        assert [path.name for path in tmp_path.iterdir()] == ["a-file"]

    def test_as_a_program(self, bad_file: Path) -> None:
        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([sys.executable, "-m", "dode_nodes", *arguments], capture_output=True, text=True,
                                  timeout=60, env={"PYTHONIOENCODING": "ascii"})  # fmt: skip

        shown = run("show", str(bad_file))
        assert (shown.returncode, shown.stdout) == (2, "")
        assert shown.stderr.count("\n") == 1
        assert "Traceback" not in shown.stderr


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with as few latents as there are digits, few stock samplers and a short reference."""
    monkeypatch.setattr(demo_module, "STOCK_SOLVERS", ("euler", "dpmpp_2m", "ipndm"))
    monkeypatch.setattr(demo_module, "REFERENCE_STEPS", 24)
    monkeypatch.setattr(demo_module, "REFERENCE_SCALE", 1)
    small = functools.partial(demo_module.run_demo, latents=4, fresh_latents=10)
    monkeypatch.setattr(demo_module, "run_demo", small)


class TestDemo:
    @pytest.mark.usefixtures("small_demo")
    @pytest.mark.parametrize("kind", ["eps", "flow"])
    def test_prints_what_it_writes(
        self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        arguments = ["demo", "--model", kind, "--steps", "3", "2", "3", "--out", str(out), "--cfg", "1.5"]
        assert main(arguments) == 0
        assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
        printed = capsys.readouterr()
        assert "ETA" in printed.err or "<" in printed.err

        facts = json.loads((out / "demo.json").read_text(encoding="utf-8"))
        assert facts["command"].startswith("python -m dode_nodes demo --model " + kind)
        assert facts["settings"]["steps"] == [2, 3]
        assert facts["settings"]["cfg"] == 1.5
        assert not set(facts["settings"]["latent_seeds"]) & set(facts["settings"]["fresh_seeds"])
        for pair in facts["comparison"]:
            words = [pair["what"], *(f"{pair[name]:#.3g}" for name in ("stock_error", "dode_error"))]
            words.append(f"{pair['closer']} of 10")
            assert any(all(word in line for word in words) for line in printed.out.splitlines()), words

        table = LambdaTable.load(out / "lambda.safetensors")
        refined = [row for row in table.rows if row.is_refined]
        assert len(table.rows) - len(refined) == 2 * len(demo_module.STUDENTS)
        assert len(refined) == sum("refined D-" in pair["what"] for pair in facts["comparison"]) / 2 > 0
        for of_table, of_json in zip(table.rows, facts["table"]["rows"], strict=True):
            assert of_table.weights.tolist() == of_json["weights"]

        for name in ("grid.png", "error.png", "lambda.png"):
            header = (out / name).read_bytes()[:24]
            assert header.startswith(b"\x89PNG")
            width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
            assert 900 <= width <= 2700
            assert 900 <= height <= 2400

    def test_overwrites_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "demo.json").write_text("mine")
        assert main(["demo", "--out", str(tmp_path / "out")]) == 2
        assert f"--out {tmp_path / 'out-2'}" in capsys.readouterr().err
        monkeypatch.chdir(tmp_path / "out")
        assert main(["demo", "--out", "."]) == 2
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "demo.json"]
        assert (tmp_path / "out" / "demo.json").read_text() == "mine"

    @pytest.mark.parametrize("existing", [True, False])
    def test_interrupted_it_leaves_nothing(
        self,
        existing: bool,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def interrupt(*_: object, tell: demo_module.Tell, **__: object) -> None:
            tell("teacher", 1, 10)
            raise KeyboardInterrupt

        monkeypatch.setattr(demo_module, "run_demo", interrupt)
        if existing:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a-picture.png").write_text("mine")
        assert main(["demo", "--out", str(tmp_path / "out")]) == 130
        assert "interrupted" in capsys.readouterr().err
        left = [path.name for path in tmp_path.rglob("*")]
        assert left == (["out", "a-picture.png"] if existing else [])


SMALL = ["distill", "--steps", "3", "--latents", "4", "--scale", "2"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "tables" / "mine.safetensors"


def end_at(monkeypatch: pytest.MonkeyPatch, stage: str, evaluations: int, error: BaseException) -> None:
    """Raise after so many of a stage's evaluations, as Ctrl-C or a model may."""
    tell = headless.Reporter.__call__
    seen: Counter[headless.Reporter] = Counter()

    def ending(self: headless.Reporter, progress: Progress) -> None:
        seen[self] += progress.stage == stage
        if seen[self] > evaluations:
            raise error
        tell(self, progress)

    monkeypatch.setattr(headless.Reporter, "__call__", ending)


class TestDistill:
    @pytest.mark.parametrize(("kind", "schedule"), [("eps", "karras"), ("flow", "simple")])
    def test_says_the_cost_saves_and_shows_the_table(
        self, kind: str, schedule: str, out: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*SMALL, "--model", kind, "--steps", "4", "3", "4", "--out", str(out)]) == 0
        table = LambdaTable.load(out)
        assert [r.steps for r in table.rows if not r.is_refined] == [4, 3]
        assert any("refined" in r.report for r in table.rows)
        assert table.model == {"name": "embedded digits", "kind": kind}
        for found in table.rows:
            assert found.settings["schedule"] == schedule
            assert found.settings["cfg"] == 2.0
            assert found.report["held_out_latents"] == 1
        printed = capsys.readouterr()
        cost, *_, path = printed.out.splitlines()
        assert re.match(r"\d+ evaluations: teacher \d+, students \d+, refining at most \d+", cost)
        assert path == f"The table: {out}"
        assert summary_text(table.rows) in printed.out
        assert "evaluations/s" in printed.err
        assert [file.name for file in out.parent.iterdir()] == ["mine.safetensors"]

    def test_options_do_what_they_say(self, out: Path) -> None:
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
        self, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delattr(headless.Pipeline, "run")
        out.parent.mkdir()
        out.write_text("mine")
        assert main([*SMALL, "--out", str(out)]) == 2
        assert "exists already" in capsys.readouterr().err
        assert out.read_text() == "mine"

    def test_a_name_that_is_taken_meanwhile_costs_no_work(
        self, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = headless.Pipeline.run

        def run_and_write(self: headless.Pipeline, progress: object) -> None:
            run(self, progress)
            out.write_text("another's")

        monkeypatch.setattr(headless.Pipeline, "run", run_and_write)
        assert main([*SMALL, "--out", str(out)]) == 0
        assert out.read_text() == "another's"
        assert LambdaTable.load(out.with_name("mine-2.safetensors")).rows

    def test_interrupted_it_saves_what_was_found(
        self, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        end_at(monkeypatch, "refining", 60, KeyboardInterrupt())
        for name in ("mine-partial", "mine-partial-2"):
            assert main([*SMALL, "--refine-budget", "20", "--out", str(out)]) == 130
            partial = out.with_name(f"{name}.safetensors")
            assert capsys.readouterr().err.endswith(f"interrupted: what was found is in {partial}\n")
            greedy, refined = LambdaTable.load(partial).rows
            assert not greedy.is_refined
            assert refined.report["refined"]["interrupted"]
        assert not out.exists()

    def test_interrupted_before_there_is_anything(
        self, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        end_at(monkeypatch, "teacher", 3, KeyboardInterrupt())
        assert main([*SMALL, "--out", str(out)]) == 130
        assert capsys.readouterr().err.endswith("interrupted: nothing was written\n")
        assert list(out.parent.iterdir()) == []

    def test_an_error_costs_nothing_of_what_was_found(
        self, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        end_at(monkeypatch, "refining", 2, DodeError("no memory"))
        assert main([*SMALL, "--out", str(out)]) == 2
        partial = out.with_name("mine-partial.safetensors")
        assert capsys.readouterr().err.endswith(f"what was found is in {partial}\nerror: no memory\n")
        assert len(LambdaTable.load(partial).rows) == 1

    def test_without_comfyui(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
        checkpoint = tmp_path / "model.safetensors"
        checkpoint.write_bytes(b"")
        arguments = ["distill", "--checkpoint", str(checkpoint), "--prompt", "a cat"]
        assert main([*arguments, "--out", str(tmp_path / "table.safetensors")]) == 2
        assert "set COMFYUI_PATH" in capsys.readouterr().err
