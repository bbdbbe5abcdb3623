"""What the demo leaves behind: its folder whole or not at all, and the numbers it tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dode_nodes import DodeError
from dode_nodes.demo.results import demo_json, pairs, results_folder


def test_results_appear_together_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with results_folder(folder) as part:
        (part / "grid.png").write_text("a picture")
        assert [path for path in folder.iterdir() if not path.name.startswith(".")] == []
    assert [path.name for path in folder.iterdir()] == ["grid.png"]


def write_and_stop(file: Path) -> None:
    file.write_text("a picture")
    raise KeyboardInterrupt


@pytest.mark.parametrize("existing", [True, False])
def test_where_it_fails_nothing_is_left(existing: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if existing:
        folder.mkdir()
        (folder / "a-picture.png").write_text("mine")
    with pytest.raises(KeyboardInterrupt), results_folder(folder) as part:
        write_and_stop(part / "grid.png")
    left = [path.name for path in tmp_path.rglob("*")]
    assert left == (["out", "a-picture.png"] if existing else [])


def test_results_of_another_demo_that_ended_meanwhile_are_not_overwritten(tmp_path: Path) -> None:
    def write_both() -> None:
        with results_folder(tmp_path) as part:
            (part / "grid.png").write_text("ours")
            (tmp_path / "grid.png").write_text("theirs")

    with pytest.raises(DodeError, match="nothing is overwritten"):
        write_both()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("name", ["file", "file/out"])
def test_a_folder_that_cannot_be_written_is_a_sentence_with_a_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DodeError, match=r"cannot be written.*--out") as refused,
        results_folder(tmp_path / name),
    ):
        pytest.fail("there is no such folder")
    assert "Errno" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pair_has_as_many_evaluations_on_both_sides(demo) -> None:
    for budget in demo.budgets:
        of_budget = pairs(demo, budget)
        assert len(of_budget) == len(demo.distilled(budget)) + 1
        for pair in of_budget:
            assert pair.stock.trial.evaluations == pair.dode.trial.evaluations == budget
            closer = [dode < stock for dode, stock in zip(pair.dode.errors, pair.stock.errors, strict=True)]
            assert pair.closer == sum(closer)
        best = of_budget[-1]
        assert (best.stock, best.dode) == (demo.best_stock(budget), demo.chosen(budget))


def test_the_json_has_every_number(demo) -> None:
    facts = json.loads(json.dumps(demo_json(demo, "a command", 1.26), allow_nan=False))
    assert (facts["command"], facts["seconds"]) == ("a command", 1.3)
    assert facts["settings"]["latent_seeds"] == list(demo.latent_seeds)
    assert facts["settings"]["cfg"] == 1.5
    for told, result in zip(facts["results"], demo.results, strict=True):
        assert told["error"] == result.error
        assert told["errors"] == result.errors.tolist()
        assert told["prediction"] == (result.trial.row and result.trial.row.prediction)
    for told, row in zip(facts["table"]["rows"], demo.table.rows, strict=True):
        assert told["weights"] == row.weights.tolist()
    compared = [(told["evaluations"], told["what"]) for told in facts["comparison"]]
    assert compared == [(budget, pair.what) for budget in demo.budgets for pair in pairs(demo, budget)]
