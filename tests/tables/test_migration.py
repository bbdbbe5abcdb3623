"""Tables of every version are read: the same numbers, the same pictures, and their reports' facts as data."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from dode_nodes.errors import DodeError, TableError
from dode_nodes.sampling.sample import sample_dode
from dode_nodes.tables.migration import to_current
from dode_nodes.tables.provenance import HeldOutErrors, Lora, StockSetting
from dode_nodes.tables.row import LambdaRow
from dode_nodes.tables.table import LambdaTable
from tests.oracles import two_peaks
from tests.tables.rows import BEGAN, row_of, write
from tests.toys import latents

FILES = Path(__file__).parent / "files"
TABLES = {
    "demo_eps": "853913115f93f59d376cd020474d67cc190ae5822ad94332819d3e9da5239453",
    "demo_flow": "fa90c50a4dc315cb06ca465a0076b75d2a488a98225c7ba54f36e02d19054d08",
    "version_1": "f49fff5004cf66fcf529330cae1b87e90562ee3611f8c5b2efe973150e23e08b",
    "version_2": "d4c842b16ea5a7ea85356741dc88e077848aee80f834233fdd8592b5a74e220b",
}
"""All there are, and their hashes; make_version_1.py and make_version_2.py say what is in them."""
VERSION_1 = ["demo_eps", "demo_flow", "version_1"]


def load(name):
    """The table."""
    return LambdaTable.load(FILES / f"{name}.safetensors")


def as_written(name):
    """The JSON of a file and its tensors, read by nothing of ours."""
    with safe_open(FILES / f"{name}.safetensors", "numpy") as file:
        assert file.metadata()["version"] == ("1" if name in VERSION_1 else "2")
        return json.loads(file.metadata()["table"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", TABLES)
def test_numbers_are_what_was_written(name):
    table, (facts, tensors) = load(name), as_written(name)
    assert table.sha256 == TABLES[name]
    assert table.model == facts["model"]
    assert len(table.rows) == len(facts["rows"])
    for i, (row, written) in enumerate(zip(table.rows, facts["rows"], strict=True)):
        np.testing.assert_array_equal(row.sigmas, tensors[f"rows.{i}.sigmas"], strict=True)
        np.testing.assert_array_equal(row.weights, tensors[f"rows.{i}.weights"], strict=True)
        assert list(row.evaluations) == written["evaluations"]
        for field in ("solver", "prediction", "form", "solver_options", "settings"):
            assert getattr(row, field) == written[field]


@pytest.mark.parametrize("name", TABLES)
def test_rows_sample_what_they_did(name):
    ends = load_file(FILES / f"{'version_2' if name == 'version_2' else 'version_1'}_ends.safetensors")
    for i, row in enumerate(load(name).rows):
        x = latents(1, sigma=float(row.sigmas[0]), seed=5)
        end = sample_dode(two_peaks, x, row.sigmas, disable=True, row=row)
        torch.testing.assert_close(end, torch.from_numpy(ends[f"{name}.{i}"]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TABLES)
def test_what_was_read_can_be_saved_and_read_again(name, tmp_path):
    table = load(name)
    assert LambdaTable.load(table.save(tmp_path / "t.safetensors")) == table


@pytest.mark.parametrize("name", VERSION_1)
def test_version_1_had_its_errors_in_the_report(name):
    for row, written in zip(load(name).rows, as_written(name)[0]["rows"], strict=True):
        report, error = written["report"], written["report"]["error"]
        assert row.errors == HeldOutErrors(
            report["held_out_latents"],
            (error["dode_end"], *[None] * (row.steps - 1)),
            error["stock_end"],
        )
        assert "error" not in row.report
        assert row.report["after_steps"] == {"stock": error["stock"], "dode": error["dode"]}
        for field in ("fitted_latents", "held_out_latents", "checked", "teacher_error", "evaluations"):
            assert row.report[field] == report[field]


@pytest.mark.parametrize("name", ["demo_eps", "demo_flow"])
def test_the_shipped_tables_are_of_greedy_rows(name):
    for row in load(name).rows:
        assert row.origin.to_json() == {"kind": "distilled"}
        assert row.error_from() < 0.7 * row.errors.stock
        np.testing.assert_array_equal(row.plain.sigmas, row.sigmas)


def test_version_1_refined_rows():
    history, heun, plain, given, _ = load("version_1").rows
    written = [row["report"]["refined"] for row in as_written("version_1")[0]["rows"][:4]]

    assert (history.is_refined, history.form, history.solver) == (True, "history", "euler")
    assert history.has_own_sigmas
    assert history.plain.solver == history.origin.solver == "dpmpp_2m"
    assert history.plain.sigmas.tolist() == written[0]["from"]["sigmas"]

    assert (heun.is_refined, heun.form, heun.has_own_sigmas) == (True, "lambda", False)
    assert (heun.plain.solver, heun.plain.evaluations) == ("heun", (2, 2, 1))
    assert heun.plain.sigmas.tolist() == written[1]["from"]["sigmas"]

    assert (plain.origin.to_json(), plain.is_refined) == ({"kind": "plain"}, False)
    assert not plain.weights.any()
    assert (given.origin.to_json(), given.is_refined) == ({"kind": "distilled"}, False)
    assert given.weights.any()
    for row, refined in zip((history, heun, plain, given), written, strict=True):
        assert row.report["refined"] == {name: refined[name] for name in ("kept", "stages")}


def test_version_1_gave_the_scatter_of_what_was_fitted_not_of_what_was_kept():
    row = load("version_1").rows[4]
    report = as_written("version_1")[0]["rows"][4]["report"]
    assert row.report["shrunk_to"] == report["shrunk_to"] == 0.5
    unscaled = report["lambda_standard_error"]
    assert unscaled[1] > 0
    assert row.report["lambda_standard_error"] == [None, *(0.5 * value for value in unscaled[1:])]

    whole = load("version_1").rows[3]  # nothing was shrunk: nothing is scaled
    report = as_written("version_1")[0]["rows"][3]["report"]
    assert whole.report["lambda_standard_error"] == report["lambda_standard_error"]


def test_version_2_fields():
    table = load("version_2")
    greedy, history, heun, plain = table.rows
    assert [row.origin.kind for row in table.rows] == ["distilled", "refined", "refined", "plain"]
    assert greedy.solver_options == {"max_order": 2}
    assert greedy.unknown == {"x-note": "kept"}
    np.testing.assert_array_equal(greedy.unknown_arrays["x-curve"], np.arange(3, dtype="f4"), strict=True)
    assert table.unknown == {"x-table": [1, {"a": None}]}
    np.testing.assert_array_equal(table.unknown_arrays["x-basis"], np.eye(2), strict=True)

    assert (history.origin.solver, heun.origin.solver) == ("ipndm", "heun")
    assert (history.has_own_sigmas, heun.has_own_sigmas) == (True, False)
    assert history.best_stock == StockSetting("dpmpp_2m", "karras", 0.125, 16, discard_penultimate=True)
    assert history.loras == (Lora("0123456789abcdef" * 4, 0.8, "detail.safetensors"),)
    for row, written in zip(table.rows[:3], as_written("version_2")[0]["rows"], strict=False):
        assert row.errors.to_json() == written["errors"]
        assert all(error is not None for error in row.errors.dode)
    assert plain.errors is None


# --- Version 1 in detail ------------------------------------------------------------------------------


def version_1(**report):
    """A row of version 1 with this report, as this version reads it."""
    facts = row_of().to_json() | {"report": report}
    del facts["origin"]
    return LambdaRow.from_json(to_current(facts, 1), row_of().arrays())


def test_the_present_version_is_left_as_it_is():
    facts = row_of(error=0.1).to_json()
    assert to_current(copy.deepcopy(facts), 2) == facts


@pytest.mark.parametrize("report", [{}, {"checked": False}, {"error": {}}, {"error": {"dode_end": None}}])
def test_a_row_that_was_not_checked_has_no_errors(report):
    assert version_1(**report).errors is None
    assert version_1(**report).error_from() == float("inf")


@pytest.mark.parametrize("kept", ["Jacobian 2", "iPNDM-3"])
def test_what_a_refinement_kept_is_refined(kept):
    row = version_1(refined={"kept": kept, "from": BEGAN | {"kind": "plain"}, "stages": []})
    assert (row.is_refined, row.plain.solver) == (True, "ipndm")
    unknown = version_1(refined={"kept": kept})
    assert (unknown.is_refined, unknown.plain.solver) == (True, "euler")


def test_nothing_of_lambda_kept_is_nothing_of_its_scatter():
    row = version_1(shrunk_to=0.0, lambda_standard_error=[None, 0.1, 0.2])
    assert row.report["lambda_standard_error"] == [None, 0, 0]


@pytest.mark.parametrize(
    "report",
    [
        "text",
        {"error": {"dode_end": "x"}, "held_out_latents": 4},
        {"error": {"dode_end": -1.0}, "held_out_latents": 4},
        {"error": {"dode_end": 0.1}, "held_out_latents": "4"},
        {"error": {"stock": "none", "dode": [0.1]}},
        {"shrunk_to": "x", "lambda_standard_error": [None, 0.1]},
        {"refined": 3},
        {"refined": {"kept": 5}},
        {"refined": {"kept": "Jacobian 1", "from": {"solver": "heun"}}},
        {"refined": {"kept": "Jacobian 1", "from": BEGAN | {"solver": ""}}},
        {"refined": {"kept": "Jacobian 1", "from": BEGAN | {"solver_options": [1]}}},
        {"refined": {"kept": "Jacobian 1", "from": BEGAN | {"sigmas": [9.0, 4.0, 2.0, 0.0]}}},
        {"refined": {"kept": "Jacobian 1", "from": BEGAN | {"sigmas": [8.0, 4.0, 0.0]}}},
    ],
)
def test_an_odd_report_of_version_1_is_refused(report, tmp_path):
    facts = {"rows": [row_of().to_json() | {"report": report}]}
    path = write(tmp_path / "t.safetensors", facts, version="1")
    with pytest.raises(TableError, match=r"t\.safetensors: row 0: ") as caught:
        LambdaTable.load(path)
    assert isinstance(caught.value.__cause__, DodeError)


@pytest.mark.parametrize("name", ["told-sigmas", "per-channel"])
def test_what_version_1_could_do_and_no_reader_does_is_refused_by_name(name, tmp_path):
    facts = {"rows": [row_of().to_json() | {"requires": ["lambda", name]}]}
    with pytest.raises(TableError, match=f"row 0: it requires '{name}', which this version does not know"):
        LambdaTable.load(write(tmp_path / "t.safetensors", facts, version="1"))
