"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dode_nodes import LambdaRow, LambdaTable, Pipeline
from dode_nodes.cli.commands import main
from dode_nodes.demo import experiment
from dode_nodes.demo.results import FILES
from dode_nodes.tables.provenance import HeldOutErrors
from tests.demo.small import FRESH, make_small

pytest.importorskip("matplotlib")

REPORT = {
    "fitted_latents": 6,
    "held_out_latents": 2,
    "checked": True,
    "teacher_error": 0.0012,
    "lambda_standard_error": [None, 0.0345, 0.0567],
    "after_steps": {"stock": [0.5, 0.4, 0.2], "dode": [0.5, 0.3, 0.1]},
    "shrunk_to": 1.0,
    "evaluations": {"teacher": 300, "student": 24, "stock": 6},
}


def row(**fields: object) -> LambdaRow:
    """A row of three steps, with all that was measured."""
    facts = {
        "solver": "euler",
        "sigmas": [10.0, 3.0, 0.5, 0.0],
        "evaluations": (1, 1, 1),
        "weights": [0.0, 0.4321, -0.1234],
        "settings": {"teacher": "dpmpp_2m", "cfg": 2.0, "latent_shape": [4, 8, 8]},
        "errors": HeldOutErrors(2, (0.1, None, 0.05), 0.2),
        "report": REPORT,
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


def with_report(file: Path, report: dict) -> None:
    """Write another report into a table's file."""
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    facts = json.loads(metadata["table"])
    facts["rows"][0]["report"] = report
    save_file(load_file(file), file, metadata | {"table": json.dumps(facts)})


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
        assert shown["report"] == REPORT
        assert shown["errors"] == {"latents": 2, "dode": [0.1, None, 0.05], "stock": 0.2}

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"errors": None, "report": {"checked": False}}, "not checked"),
            ({"report": {"shrunk_to": 0}}, "set to 0"),
            ({"report": {"shrunk_to": 0.25}}, "shrunk to 0.25"),
            ({"report": {"undetermined": [1, 2]}}, "at evaluation 2, 3"),
            ({"solver": "ipndm", "solver_options": {"max_order": 2}}, "max_order 2"),
            ({"form": "history", "weights": np.tril(np.full((3, 3), 0.5))}, "+0.5000 +0.5000 +0.5000"),
            ({"evaluations": (2, 0, 1)}, "euler, 3 steps"),
            ({"errors": HeldOutErrors(2, (0.0, None, None), 0.0)}, "D-ODE 0.00"),
            ({"errors": HeldOutErrors(2, (1e300, None, None), 5e-324)}, "1.00e+300"),
        ],
    )
    def test_every_kind_of_row(
        self, fields: dict, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        LambdaTable([row(**fields)]).save(tmp_path / "table.safetensors")
        assert main(["show", str(tmp_path / "table.safetensors")]) == 0
        assert words in capsys.readouterr().out

    @pytest.mark.parametrize(
        "odd",
        [
            {"after_steps": 1},
            {"after_steps": {"stock": {}, "dode": ["?"]}},
            {"lambda_standard_error": "?"},
            {"evaluations": [1]},
            {"teacher_error": 10**400},
            {"shrunk_to": "x"},
            {"undetermined": ["?"]},
        ],
    )
    @pytest.mark.parametrize("more", [[], ["--json"]])
    def test_odd_reports_are_one_line(
        self, odd: dict, more: list[str], table_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with_report(table_file, REPORT | odd)
        assert main(["show", str(table_file), *more]) == 2
        printed = capsys.readouterr()
        (name,) = odd
        assert re.fullmatch(rf"error: {re.escape(str(table_file))}: row 0: .*'{name}'.+\n", printed.err)
        assert printed.out == ""

    def test_a_file_cannot_steer_the_terminal(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hostile = "\x1b[2J\r\x07"
        table = LambdaTable([row(settings={hostile: hostile})], model={hostile: hostile})
        table.save(tmp_path / "table.safetensors")
        main(["show", str(tmp_path / "table.safetensors")])
        assert not set(hostile[:1] + "\r\x07") & set(capsys.readouterr().out)

    def test_a_fingerprint_is_a_hash_and_not_its_48_values(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        values = [0.12345 + i for i in range(48)]
        fingerprint = {"layout": "0123456789abcdef", "values": values}
        facts = {"family": "SD15", "fingerprint": fingerprint, "patches": {"weights": 0, "strengths": []}}
        LambdaTable([row()], model=facts).save(tmp_path / "table.safetensors")
        assert main(["show", str(tmp_path / "table.safetensors")]) == 0
        printed = capsys.readouterr().out
        assert "fingerprint: 01234567" in printed
        assert "12345" not in printed.replace("01234567", "")
        assert "strengths" not in printed
        assert main(["show", "--json", str(tmp_path / "table.safetensors")]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["fingerprint"]["values"] == values


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
            ["demo", "--steps", "0", "8"],
            ["demo", "--steps", "1001"],
            ["demo", "--seed", "-1"],
            ["demo", "--cfg", "nan"],
            ["demo", "--cfg", "-3"],
            ["demo", "--out", "a-file/results"],
            ["distill", "--steps", "0"],
            ["distill", "--steps", "5", "1000"],
            ["distill", "--seed", "-1"],
            ["distill", "--cfg", "inf"],
            ["distill", "--cfg", "-3"],
            ["distill", "--latents", "1"],
            ["distill", "--scale", "-1"],
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
        ids=" ".join,
    )
    def test_one_line_and_2_before_any_work(
        self,
        arguments: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.delattr(Pipeline, "run")
        monkeypatch.chdir(tmp_path)
        Path("a-file").write_text("")
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert re.fullmatch(r"error: .+\n", printed.err)
        assert "Errno" not in printed.err
        assert printed.out == ""
        assert [path.name for path in tmp_path.iterdir()] == ["a-file"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["demo", "--cfg", "-3"], ["cfg", "at least 0", "-3"]),
            (["distill", "--cfg", "-3"], ["cfg", "at least 0", "-3"]),
            (["demo", "--out", "a-file/results"], ["a-file/results cannot be written", "--out"]),
        ],
    )
    def test_the_line_says_what_to_do(
        self,
        arguments: list[str],
        words: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("a-file").write_text("")
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert all(word in printed for word in words)

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
    make_small(monkeypatch)


class TestDemo:
    @pytest.mark.usefixtures("small_demo")
    def test_prints_what_it_writes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        arguments = ["demo", "--model", "flow", "--steps", "3", "2", "3", "--out", str(out), "--cfg", "1.5"]
        assert main(arguments) == 0
        assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
        printed = capsys.readouterr()
        assert "ETA" in printed.err or "<" in printed.err

        facts = json.loads((out / "demo.json").read_text(encoding="utf-8"))
        assert facts["command"].startswith("python -m dode_nodes demo --model flow")
        assert facts["settings"]["steps"] == [2, 3]
        assert facts["settings"]["cfg"] == 1.5
        assert not set(facts["settings"]["latent_seeds"]) & set(facts["settings"]["fresh_seeds"])
        for pair in facts["comparison"]:
            words = [pair["what"], *(f"{pair[name]:#.3g}" for name in ("stock_error", "dode_error"))]
            words.append(f"{pair['closer']} of {FRESH}")
            assert any(all(word in line for word in words) for line in printed.out.splitlines()), words

        table = LambdaTable.load(out / "lambda.safetensors")
        refined = [row for row in table.rows if row.is_refined]
        assert len(table.rows) - len(refined) == 2 * len(experiment.STUDENTS)
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
        def interrupt(*_: object, progress: experiment.Tell, **__: object) -> None:
            progress(experiment.Progress(10))
            raise KeyboardInterrupt

        monkeypatch.setattr(experiment, "run_demo", interrupt)
        if existing:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a-picture.png").write_text("mine")
        assert main(["demo", "--out", str(tmp_path / "out")]) == 130
        assert "interrupted" in capsys.readouterr().err
        left = [path.name for path in tmp_path.rglob("*")]
        assert left == (["out", "a-picture.png"] if existing else [])

    def test_a_disk_that_fills_up_is_said_without_its_number(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "grid.png")

        monkeypatch.setattr(experiment, "run_demo", full)
        assert main(["demo", "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == "error: grid.png: No space left on device"
        assert list(tmp_path.iterdir()) == []

    def test_terminated_it_ends_as_interrupted_and_leaves_nothing(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        process = subprocess.Popen(
            [sys.executable, "-m", "dode_nodes", "demo", "--out", str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            end = time.monotonic() + 60
            while not any(out.glob(".part-*")) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            assert any(out.glob(".part-*"))
            process.send_signal(signal.SIGTERM)
            printed, complaint = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130, complaint
        assert complaint.splitlines()[-1] == "interrupted: nothing was written"
        assert "Traceback" not in complaint
        assert printed == ""
        assert list(tmp_path.iterdir()) == []
