"""Ranks under torchrun: the same rows as one process finds, and an end to all of them where one ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dode_nodes import LambdaRow, LambdaTable
from dode_nodes.cli.commands import main
from dode_nodes.demo.models import load_demo_model
from dode_nodes.fit.ranks import is_first_rank, process_group, rank_and_size, share
from tests import ranks
from tests.import_comfyui import REPOSITORY
from tests.server import free_port
from tests.toys import Note

RANKS = 2
SECONDS = 240
SMALL = ["distill", "--steps", "3", "--latents", "5", "--scale", "2"]


LORA = ["distill-lora", "--steps", "2", "--latents", "3", "--iterations", "4"]


def start(*module_and_arguments: str, cache: Path | None = None) -> subprocess.Popen[str]:
    """``python -m`` on every rank; on a free port of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", str(RANKS), "-m", *module_and_arguments]  # fmt: skip
    own = {"OMP_NUM_THREADS": "1"} | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
                            env=os.environ | own)  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Status, standard output and error of what must end by itself."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With rows to train a LoRA for; afterwards with what the commands have written together."""
    folder = tmp_path_factory.mktemp("ranks")
    sigmas = load_demo_model("eps").make_sigmas("karras", 2, True).double().numpy()
    rows = LambdaTable([LambdaRow("euler", sigmas, (1, 1), np.zeros(2))], model=load_demo_model("eps").facts)
    rows.save(folder / "rows.safetensors")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank of tests/ranks.py has found."""
    commands = [(free_port(), command(options, folder, "together")) for options in (SMALL, LORA)]
    process = start("tests.ranks", str(folder), json.dumps(commands), cache=folder / "cache")
    status, _, err = ended(process)
    assert status == 0, err
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def command(options: list[str], folder: Path, name: str) -> list[str]:
    table = ["--table", str(folder / "rows.safetensors")] if options == LORA else []
    return [*options, *table, "--out", str(folder / f"{options[0]}-{name}.safetensors")]


def by_both(
    options: list[str], folder: Path, found: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> tuple[Path, Path]:
    """What the command has written on all ranks, and writes in this process; it prints the same, once, by one rank."""
    assert main(command(options, folder, "alone")) == 0
    printed = capsys.readouterr().out.splitlines()
    by_first, by_last = (each["printed"][(SMALL, LORA).index(options)] for each in found)
    assert by_last == ""
    assert len(by_first.splitlines()) == len(printed)
    assert by_first.splitlines()[0] == printed[0]
    together, alone = (folder / f"{options[0]}-{name}.safetensors" for name in ("together", "alone"))
    return together, alone


def assert_same_rows(rows: list[dict[str, Any]], expected: list[LambdaRow]) -> None:
    """To rounding; evaluations exactly."""
    for row, alone in zip(rows, map(ranks.as_json, expected), strict=True):
        assert row["report"]["evaluations"] == alone["report"]["evaluations"]
        assert row["evaluations"] == alone["evaluations"]
        assert_same(row, alone)


def assert_same(one: Any, other: Any) -> None:
    """Nested containers of the same, numbers to rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    else:
        assert one == other


def test_rows_are_those_of_one_process_and_of_all_ranks_to_the_bit(found):
    assert [each["size"] for each in found] == [RANKS] * RANKS
    for rows, micro_batch in (("rows", None), ("rows after that", 1)):
        assert found[0][rows] == found[1][rows]
        assert_same_rows(found[0][rows], ranks.fitted(micro_batch))


def test_a_lora_is_that_of_one_process_and_of_all_ranks_to_the_bit(found):
    """Where a batch has nothing for a rank, too; with one gradient a batch, and with one after every step."""
    assert found[0]["lora"] == found[1]["lora"]
    assert_same(found[0]["lora"], ranks.trained())


def test_a_lora_s_numbers_end_on_all_ranks_where_they_end_on_one(found):
    assert found[0]["lora with nan"] == found[1]["lora with nan"]
    assert found[0]["lora with nan"][0] == 2


def test_every_rank_tells_of_the_progress_of_all(found):
    """Each part's total only shrinks; the first rank knows in the end what all have done."""
    for rank, each in enumerate(found):
        parts: list[list[Note]] = []
        for note in map(Note._make, each["told"]):
            if not parts or note.done < parts[-1][-1].done:
                parts.append([])
            parts[-1].append(note)
        for part in parts:
            assert all(a.total >= b.total >= b.done for a, b in pairwise(part))
            assert part[-1].done == part[-1].total
        if rank == 0:
            assert [part[0].stage for part in parts] == ["teacher", "student", "refining"]
            spent = each["rows"][-1]["report"]["evaluations"]
            assert sum(part[-1].done for part in parts) == sum(spent.values())


TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("missing", TORCHRUN)
def test_rank_alone_is_no_torchrun(missing, monkeypatch):
    """Others set it, too; that was a traceback."""
    for name in TORCHRUN:
        monkeypatch.setenv(name, "1")
    assert not is_first_rank()
    monkeypatch.delenv(missing)
    assert is_first_rank()
    with process_group():
        assert rank_and_size() == (0, 1)


def test_the_first_rank_is_known_before_there_is_a_group(monkeypatch):
    for name, value in zip(TORCHRUN, ("0", "2", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    assert is_first_rank()


def test_what_is_gathered_is_everybodys_in_order(found):
    assert found[0]["gathered"] == found[1]["gathered"]
    assert found[0]["sum"] == found[1]["sum"] == 0.1 + 1.1
    gathered = found[0]["gathered"]
    assert gathered["first has none"] == [[[1, 2], "torch.bfloat16", [[pytest.approx(0.1, rel=1e-2)] * 2]]]
    assert gathered["first has most"] == [[[3], "torch.int64", [0, 1, 2]], [[2], "torch.int64", [0, 1]]]
    assert gathered["last has none"] == [[[1, 2, 2], "torch.float64", [[[1.0, 0.0], [0.0, 1.0]]]]]
    assert [shape for shape, _, _ in gathered["no numbers"]] == [[1, 0, 0], [2, 0, 0]]
    assert gathered["none has any"] == []


def test_latents_are_shared_out_evenly_with_few_cuts(found):
    assert [each["shares"]["all"] for each in found] == [[[0, 1, 2, 3]], [[4], [5, 6]]]
    assert [each["shares"]["held out"] for each in found] == [[[6]], []]
    assert [each["shares"]["one at a time"] for each in found] == [[[0], [1], [2], [3]], [[4], [5], [6]]]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [0, 1, 2, 7, 16])
def test_shares_cover_everything_once(size, items, monkeypatch):
    parts = []
    for rank in range(size):
        monkeypatch.setattr("dode_nodes.fit.ranks.rank_and_size", lambda rank=rank: (rank, size))
        parts.append(list(share(range(items))))
    assert [item for part in parts for item in part] == list(range(items))
    assert len(parts[0]) == max(map(len, parts)) <= min(map(len, parts)) + 1


def test_where_one_rank_fails_all_do(found):
    """And none waits for ever for what the one that failed does not bring."""
    first, last = (each["nan"] for each in found)
    assert last[0] == "NotFinite"
    assert "NaN" in last[1]
    assert first == ["RankFailed", f"rank 1: {last[1]}"]


def test_a_signal_to_one_rank_ends_all_with_the_best_so_far(found):
    first, last = (each["signal"] for each in found)
    assert (first[0], last[0]) == ("RankInterrupted", "KeyboardInterrupt")
    first, last = (each["best after that"] for each in found)
    assert first == last
    assert [row["report"]["refined"]["interrupted"] for row in first] == [True]


def test_the_command_finds_what_one_process_finds(
    folder: Path, found: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    together, alone = by_both(SMALL, folder, found, capsys)
    (greedy, *_, refined), (alone_greedy, *_, alone_refined) = (
        LambdaTable.load(path).rows for path in (together, alone)
    )
    # The network is float32, and rounds otherwise in other batches; where an error is flat, weights follow.
    assert greedy.weights == pytest.approx(alone_greedy.weights, rel=1e-4)
    assert refined.error_from() == pytest.approx(alone_refined.error_from(), rel=1e-2)
    assert greedy.report["evaluations"] == alone_greedy.report["evaluations"]


def test_the_command_trains_the_lora_that_one_process_trains(
    folder: Path, found: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    together, alone = by_both(LORA, folder, found, capsys)
    (row,), (alone_row,) = (
        [row for row in LambdaTable.load(path).rows if row.trained_lora] for path in (together, alone)
    )
    assert row.trained_lora.error_without == pytest.approx(alone_row.trained_lora.error_without, rel=1e-4)
    assert row.trained_lora.error == pytest.approx(alone_row.trained_lora.error, rel=5e-2)
    # Adam goes as far along a gradient that is nothing but rounding as along any other: not number by number.
    one, other = (torch.cat([x.flatten() for name, x in load_file(path.with_stem(f"{path.stem}-lora")).items()
                             if "lora_up" in name]).float() for path in (together, alone))  # fmt: skip
    assert torch.cosine_similarity(one, other, dim=0) > 0.9


def test_interrupted_the_command_saves_once_what_was_found(tmp_path: Path) -> None:
    options = ["--latents", "16", "--refine-budget", "100"]
    process = start("dode_nodes", *SMALL, *options, "--out", str(tmp_path / "mine.safetensors"))
    before = ""
    while "refining" not in before and process.poll() is None:
        before += process.stderr.read(1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, _, err = ended(process)
    partial = tmp_path / "mine-partial.safetensors"
    assert err.count(f"interrupted: the rows found so far are saved in {partial}") == 1
    assert [file.name for file in tmp_path.iterdir()] == [partial.name]
    assert LambdaTable.load(partial).rows
