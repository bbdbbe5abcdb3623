"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dode_nodes import LambdaRow, LambdaTable
from dode_nodes.__main__ import main
from dode_nodes.demo import demo as demo_module
from dode_nodes.demo.results import FILES

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
        assert len(table.rows) == 2 * len(demo_module.STUDENTS)
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
