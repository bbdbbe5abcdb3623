"""Rows and tables: validated, frozen, found by σ, and the same after a round trip through a file."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import pickle
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from safetensors import safe_open
from safetensors.numpy import save_file

from dode_nodes.errors import DodeError, TableError
from dode_nodes.sampling.denoiser import MAX_EVALUATIONS
from dode_nodes.tables.table import LambdaRow, LambdaTable, end_error

SIGMAS = (8.0, 4.0, 2.0, 0.0)


def row_of(solver="euler", sigmas=SIGMAS, evaluations=None, weights=None, error=None, **facts):
    evaluations = (1,) * (len(sigmas) - 1) if evaluations is None else evaluations
    weights = np.arange(sum(evaluations)) / 10 if weights is None else weights
    report = {} if error is None else {"error": {"dode_end": error}}
    return LambdaRow(solver, np.array(sigmas), evaluations, weights, **{"report": report} | facts)


# --- Round trips --------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=4)
unknown_objects = st.dictionaries(st.text().map(lambda name: "x-" + name), json_values, max_size=3)
unknown_arrays = st.dictionaries(
    st.text(alphabet="abcλ. ", min_size=1, max_size=5).map(lambda name: "x-" + name),
    np_st.arrays(
        st.sampled_from(["f8", "f4", "f2", "i8", "i4", "u1", "bool"]),
        np_st.array_shapes(min_dims=0, max_side=3),
    ),
    max_size=2,
)


@st.composite
def rows(draw):
    steps = draw(st.integers(1, 5))
    sigmas = draw(st.lists(st.floats(1e-3, 1e3), min_size=steps, max_size=steps, unique=True))
    counts = [
        draw(st.integers(1, 3)),
        *draw(st.lists(st.integers(0, 3), min_size=steps - 1, max_size=steps - 1)),
    ]
    n = sum(counts)
    form = draw(st.sampled_from(["lambda", "history"]))
    channels = draw(st.none() | st.integers(1, 4))
    shape = ((n,) if form == "lambda" else (n, n)) + (() if channels is None else (channels,))
    weights = draw(np_st.arrays("f8", shape, elements=finite))
    if form == "history":
        lower = np.tril(np.ones((n, n)))
        weights = weights * (lower if channels is None else lower[..., None])
    told = draw(st.none() | st.lists(st.floats(1e-3, 1e3), min_size=n, max_size=n))
    return LambdaRow(
        solver=draw(st.text(min_size=1)),
        sigmas=np.array([*sorted(sigmas, reverse=True), 0.0]),
        evaluations=tuple(counts),
        weights=weights,
        prediction=draw(st.sampled_from(["noise", "data"])),
        form=form,
        solver_options=draw(json_objects),
        told_sigmas=told,
        settings=draw(json_objects),
        report=draw(json_objects),
        unknown=draw(unknown_objects),
        unknown_arrays=draw(unknown_arrays),
    )


tables = st.builds(
    LambdaTable,
    rows=st.lists(rows(), min_size=1, max_size=3),
    model=json_objects,
    unknown=unknown_objects,
    unknown_arrays=unknown_arrays,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(table=tables)
def test_table_survives_a_file(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("tables") / "t.safetensors"
    assert table.save(path) == path
    loaded = LambdaTable.load(path)
    assert loaded == table
    for mine, other in zip(loaded.rows, table.rows, strict=True):
        for field in dataclasses.fields(LambdaRow):
            a, b = getattr(mine, field.name), getattr(other, field.name)
            if field.name == "unknown_arrays":
                assert a.keys() == b.keys()
                for name in a:
                    np.testing.assert_array_equal(a[name], b[name], strict=True)
            else:
                np.testing.assert_array_equal(a, b)
    loaded.save(path, overwrite=True)  # and a second one
    assert LambdaTable.load(path) == table


@settings(max_examples=30, deadline=None)
@given(row=rows())
def test_row_survives_json_copies_and_pickling(row):
    assert LambdaRow.from_json(json.loads(json.dumps(row.to_json())), row.arrays()) == row
    assert copy.deepcopy(row) == copy.copy(row) == pickle.loads(pickle.dumps(row)) == row  # noqa: S301
    table = LambdaTable([row], {"a": [1]})
    assert copy.deepcopy(table) == pickle.loads(pickle.dumps(table)) == table  # noqa: S301


def test_arrays_are_read_in_any_language(tmp_path):
    """float64 tensors and JSON under plain names: nothing but safetensors is needed."""
    told = np.array([8.0, 3.9, 2.1])
    path = LambdaTable([row_of(told_sigmas=told)], {"family": "SD15"}).save(tmp_path / "t.safetensors")
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == {"rows.0.sigmas", "rows.0.weights", "rows.0.told_sigmas"}
        np.testing.assert_array_equal(file.get_tensor("rows.0.weights"), [0, 0.1, 0.2])
        metadata = file.metadata()
    assert metadata["format"] == "dode-lambda-table"
    facts = json.loads(metadata["table"])
    assert facts["model"] == {"family": "SD15"}
    assert facts["rows"][0]["requires"] == ["lambda", "told-sigmas"]


def test_rows_from_the_tenth_on_have_their_own_arrays(tmp_path):
    table = LambdaTable([row_of(weights=np.full(3, float(i))) for i in range(12)])
    assert LambdaTable.load(table.save(tmp_path / "t.safetensors")) == table


def test_odd_text_survives(tmp_path):
    table = LambdaTable([row_of(settings={"prompts": ["\ud83d lone", "λ\n\0", "日本"]})])
    assert LambdaTable.load(table.save(tmp_path / "t.safetensors")) == table


# --- Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"solver": ""}, "solver must be a name"),
        ({"solver": 3}, "solver must be a name"),
        ({"prediction": "eps"}, "prediction must be one of .*not 'eps'"),
        ({"form": "triangle"}, "form must be 'lambda' or 'history', not 'triangle'"),
        ({"sigmas": [4.0, 8.0, 2.0, 0.0]}, "must descend"),
        ({"sigmas": [8.0, 4.0, 4.0, 0.0]}, "without repetition"),
        ({"sigmas": [8.0, 4.0, 2.0, 1.0]}, "to 0"),
        ({"sigmas": [8.0, 4.0, 2.0, float("nan")]}, "sigmas has NaN"),
        ({"sigmas": [[8.0, 4.0, 2.0, 0.0]]}, "must descend"),
        ({"sigmas": ["a", "b"]}, "sigmas must be numbers"),
        ({"sigmas": [10**400, 0]}, "sigmas must be numbers"),
        ({"sigmas": [0.0], "evaluations": ()}, "must descend"),
        ({"evaluations": (1, 1)}, "evaluations must be 3 whole numbers"),
        ({"evaluations": (1, 1, 1.0)}, "evaluations must be 3 whole numbers"),
        ({"evaluations": (1, 1, True)}, "evaluations must be 3 whole numbers"),
        ({"evaluations": (1, -1, 3)}, "evaluations must be 3 whole numbers"),
        ({"evaluations": (0, 2, 1)}, "the first in the first step"),
        ({"evaluations": (255, 1, 1), "weights": np.zeros(257)}, "1 to 256 evaluations"),
        ({"weights": np.zeros(4)}, r"weights of shape \(4,\) do not fit 3 evaluations in the form 'lambda'"),
        ({"weights": np.zeros((3, 0))}, "do not fit"),
        ({"weights": np.zeros((3, 3)), "form": "history", "evaluations": (2, 1, 1)}, "do not fit 4"),
        ({"weights": np.ones((3, 3)), "form": "history"}, "lower triangle"),
        ({"weights": np.array([0, 0.1, np.inf])}, "weights has NaN or infinite"),
        ({"told_sigmas": [1.0, 2.0]}, "told_sigmas must be 3 positive numbers"),
        ({"told_sigmas": [1.0, 2.0, 0.0]}, "told_sigmas must be 3 positive numbers"),
        ({"settings": {"x": {1}}}, "settings cannot be stored as JSON"),
        ({"report": {"x": float("nan")}}, "report cannot be stored as JSON"),
        ({"solver_options": [1, 2]}, "solver_options cannot be stored as JSON"),
        ({"unknown_arrays": {"names": np.array(["a"])}}, "'names' must hold numbers"),
    ],
)
def test_invalid_row_is_refused(changes, why):
    facts = {"solver": "euler", "sigmas": SIGMAS, "evaluations": (1, 1, 1), "weights": np.zeros(3)} | changes
    with pytest.raises(DodeError, match=why):
        LambdaRow(**facts)


def test_largest_row():
    sigmas = np.linspace(1, 0, MAX_EVALUATIONS + 1)
    row = LambdaRow("euler", sigmas, (1,) * MAX_EVALUATIONS, np.zeros((MAX_EVALUATIONS, 16)))
    assert row.corrections.shape == (256, 256, 16)


def test_row_is_frozen_and_detached_from_what_it_was_made_of():
    sigmas, weights, options = np.array(SIGMAS), np.zeros(3), {"a": {"b": 1}}
    row = LambdaRow("euler", sigmas, [1, 1, 1], weights, solver_options=options)
    sigmas[0], weights[0], options["a"]["b"] = 99, 99, 99
    assert row.sigmas[0] == 8.0
    assert row.weights[0] == 0.0
    assert row.solver_options == {"a": {"b": 1}}
    assert row.evaluations == (1, 1, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.solver = "heun"
    with pytest.raises(ValueError, match="read-only"):
        row.weights[0] = 1
    with pytest.raises(TypeError):
        row.settings["a"] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        LambdaTable([row]).rows = ()


def test_what_a_row_says_of_itself():
    row = row_of("heun", SIGMAS, (2, 2, 1), weights=np.array([0, 0.1234, -3, 0.5, 0]))
    assert (row.steps, row.nfe, row.channels, row.is_callable) == (3, 5, None, False)
    assert [row.first_evaluation(i) for i in range(4)] == [0, 2, 4, 5]
    assert row.requires == ["lambda"]
    assert row.label == "heun, 3 steps (5 evaluations, noise)"
    assert repr(row) == f"<LambdaRow {row.label}: λ = 0, 0.123, -3, 0.5, 0>"

    triangle = row_of(
        "<mine>", weights=np.ones((3, 3, 4)) * np.tri(3)[..., None], form="history", told_sigmas=[1, 1, 1]
    )
    assert (triangle.channels, triangle.is_callable) == (4, True)
    assert triangle.requires == ["history", "per-channel", "told-sigmas"]
    assert "history weights of shape (3, 3, 4)" in repr(triangle)
    assert row_of(weights=np.ones((3, 4))).channels == 4


def test_rows_are_equal_if_everything_is():
    assert row_of() == row_of()
    different = [
        row_of("heun"),
        row_of(weights=np.array([0, 0.1, 0.2 + 1e-16])),
        row_of(sigmas=(8.0, 4.0, 2.5, 0.0)),
        row_of(told_sigmas=[8, 4, 2]),
        row_of(settings={"cfg": 1}),
        row_of(unknown_arrays={"x": np.zeros(1)}),
        row_of(unknown_arrays={"x": np.zeros(1, "f4")}),
    ]
    for a, b in itertools.combinations([row_of(), *different], 2):
        assert a != b
    assert row_of() != "a row"
    assert LambdaTable([row_of()], {"a": 1}) != LambdaTable([row_of()], {"a": 2})
    assert LambdaTable([row_of()]) != LambdaTable([row_of()] * 2)


# --- Finding ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(row=rows(), data=st.data())
def test_every_part_is_found_at_its_step(row, data):
    gaps = np.diff(row.sigmas[:-1]) / row.sigmas[1:-1] if row.steps > 1 else np.array([-1.0])
    if (np.abs(gaps) < 1e-3).any():
        return  # σ that hosts could not tell apart
    noise = data.draw(st.sampled_from([0.0, 1e-7, -3e-5]))
    for i in range(row.steps):
        for end in range(i + 2, row.steps + 2):
            part = torch.tensor(row.sigmas[i:end] * (1 + noise)).float()
            match = LambdaTable([row]).match(part)
            if row.evaluations[i]:
                assert (match.row, match.step) == (row, i)
            else:
                assert match.row is None
                assert f"cannot be started at step {i}" in match.why


def test_reasons_of_a_match():
    row = row_of()
    assert row.find(SIGMAS).why == "the whole schedule of euler, 3 steps (3 evaluations, noise)"
    assert row.find(SIGMAS[1:]).why.startswith("steps 1 to 2 of euler")
    assert row.find(SIGMAS[:2]).why.startswith("steps 0 to 0 of euler")
    assert row.find([3.0, 0.0]).why.startswith(
        "no step of euler, 3 steps (3 evaluations, noise) starts at σ = 3"
    )
    assert row.find([8.0, 2.0, 0.0]).why.startswith("σ = 2 at position 1 is not in euler")
    assert row.find([8.0, 4.0, 2.0, 0.0, -1.0]).why.startswith("σ = -1 at position 4 is not in")
    assert row.find([0.0, 0.0]).row is None
    assert row.find([8.0]).why == row.find([]).why == "there is no step to take"


def test_table_says_what_it_has_where_nothing_matches():
    table = LambdaTable([row_of(), row_of("heun", evaluations=(2, 2, 1))])
    why = table.match([9.0, 0.0]).why
    assert why.startswith("no row's schedule contains these σ. The table has: euler, 3 steps")
    assert "heun, 3 steps (5 evaluations, noise)" in why
    assert table.match([9.0, 0.0], "heun").why.startswith("no step of heun, 3 steps")
    assert table.match(SIGMAS, "ipndm").why.startswith(
        "this table has no row for the solver 'ipndm'. It has: euler"
    )


def test_smallest_held_out_error_is_taken_among_equals_the_first():
    bad, good, same, unchecked = (
        row_of(error=error, settings={"n": n}) for n, error in enumerate([0.3, 0.1, 0.1, None])
    )
    for order in itertools.permutations([bad, good, same, unchecked]):
        expected = next(row for row in order if row in (good, same))
        assert LambdaTable(order).match(SIGMAS).row is expected
    assert end_error(unchecked) == float("inf")
    assert (
        end_error(row_of(report={"error": "odd"}))
        == end_error(row_of(report={"error": {"dode_end": "x"}}))
        == float("inf")
    )


def test_only_rows_of_the_solver():
    euler, heun = row_of(error=0.1), row_of("heun", evaluations=(2, 2, 1), error=0.2)
    table = LambdaTable([euler, heun])
    assert table.match(SIGMAS).row is euler
    assert table.match(SIGMAS, "heun").row is heun


BEGAN = {"solver": "dpmpp_2m", "solver_options": {"a": 1}, "sigmas": [8.0, 5.0, 1.0, 0.0]}


def refined_row(began=BEGAN, kept="Jacobian 2"):
    triangle = np.tri(3)
    return row_of(weights=triangle, form="history", report={"refined": {"kept": kept, "from": began}})


def test_a_refined_row_serves_the_solver_it_began_with_and_is_measured_against_it():
    row = refined_row()
    assert (row.is_refined, row.has_own_sigmas) == (True, True)
    plain = row.plain
    assert (plain.solver, plain.solver_options, plain.form) == ("dpmpp_2m", {"a": 1}, "lambda")
    assert plain.sigmas.tolist() == BEGAN["sigmas"]
    assert not plain.weights.any()
    assert [row.serves(solver) for solver in ("euler", "dpmpp_2m", "heun")] == [True, True, False]
    assert row.label == (
        "euler, 3 steps (3 evaluations, noise, weights over the history, refined from dpmpp_2m)"
    )
    assert LambdaTable([row]).match(SIGMAS, "dpmpp_2m").row is row
    assert LambdaTable([row]).match(BEGAN["sigmas"]).row is None

    same = refined_row(kept="row given")
    assert (same.is_refined, same.label) == (
        False,
        "euler, 3 steps (3 evaluations, noise, weights over the history)",
    )
    greedy = row_of("heun", evaluations=(2, 2, 1))
    assert (greedy.is_refined, greedy.has_own_sigmas, greedy.serves("heun")) == (False, False, True)
    assert greedy.plain == row_of("heun", evaluations=(2, 2, 1), weights=np.zeros(5))


@pytest.mark.parametrize(
    "began",
    [
        None,
        "dpmpp_2m",
        {},
        BEGAN | {"solver": 3},
        BEGAN | {"solver": ""},
        BEGAN | {"solver_options": [1]},
        BEGAN | {"solver_options": None},
        BEGAN | {"sigmas": None},
        BEGAN | {"sigmas": "8 4 2 0"},
        BEGAN | {"sigmas": [8.0, 4.0, 0.0]},
        BEGAN | {"sigmas": [8.0, [4.0], 2.0, 0.0]},
        BEGAN | {"sigmas": [10**400, 4.0, 2.0, 0.0]},
        BEGAN | {"sigmas": [9.0, 4.0, 2.0, 0.0]},
    ],
)
def test_what_a_row_cannot_have_begun_with_is_not_believed(began):
    row = refined_row(began)
    assert row.is_refined
    assert row.plain == row_of(weights=np.zeros(3))
    assert row.serves("euler")
    assert not row.serves("dpmpp_2m")


@pytest.mark.parametrize("refined", [None, 3, [], {}, {"kept": None}, {"kept": 5, "from": BEGAN}])
def test_an_odd_report_makes_no_refined_row(refined):
    row = row_of(report={"refined": refined})
    assert not row.is_refined
    assert row.plain == row_of(weights=np.zeros(3))


def test_whole_schedule_goes_before_a_part_of_a_longer_one():
    """Whose error, over more steps from another σ, is not to be compared."""
    longer = row_of(sigmas=(16.0, *SIGMAS), error=0.01)
    own = row_of(error=0.5)
    assert LambdaTable([longer, own]).match(SIGMAS).row is own
    assert LambdaTable([longer, own]).match(SIGMAS[1:]).row is longer


# --- Tables and their files ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[], ["a row"], row_of(), None])
def test_table_without_rows_is_refused(rows):
    with pytest.raises(DodeError, match="at least one LambdaRow"):
        LambdaTable(rows)


def write(path, facts=None, tensors=None, **metadata):
    """A file like a table's, as another program might write it."""
    row = row_of()
    facts = {"rows": [row.to_json()]} if facts is None else facts
    tensors = (
        {f"rows.0.{name}": value for name, value in row.arrays().items()} if tensors is None else tensors
    )
    text = facts if isinstance(facts, str) else json.dumps(facts)
    save_file(tensors, path, {"format": "dode-lambda-table", "version": "1", "table": text} | metadata)
    return path


def changed(**facts):
    """The JSON of a table of one row, with these of its fields changed; None leaves one out."""
    row = row_of().to_json() | facts
    return {"rows": [{name: value for name, value in row.items() if value is not None}]}


def arrays(**changes):
    return {
        f"rows.0.{name}": value for name, value in (row_of().arrays() | changes).items() if value is not None
    }


def test_table_of_another_program_is_read(tmp_path):
    assert LambdaTable.load(write(tmp_path / "t.safetensors")).rows == (row_of(),)


BROKEN = {
    "another format": ({"format": "a LoRA"}, "a safetensors file, but not a λ table"),
    "no rows": ({"facts": {}}, "its metadata has no rows"),
    "rows of no list": ({"facts": {"rows": {}}}, "its metadata has no rows"),
    "empty rows": ({"facts": {"rows": []}}, "at least one LambdaRow"),
    "a list": ({"facts": "[]"}, "its metadata has no rows"),
    "no JSON": ({"facts": "{"}, "its metadata is not valid JSON"),
    "NaN": ({"facts": '{"rows": [NaN]}'}, "NaN is not JSON"),
    "Infinity": ({"facts": '{"rows": [-Infinity]}'}, "-Infinity is not JSON"),
    "deep": ({"facts": "[" * 100_000 + "]" * 100_000}, "not valid JSON"),
    "deep in a field": ({"facts": '{"rows": [], "x": ' + "[" * 900 + "]" * 900 + "}"}, "at least one|JSON"),
    "row of no object": ({"facts": {"rows": [3]}}, "row 0 is not an object"),
    "model of no object": ({"facts": changed() | {"model": 3}}, "'model' must be an object"),
    "no solver": ({"facts": changed(solver=None)}, "row 0: it lacks solver"),
    "no requires": ({"facts": changed(requires=None)}, "row 0: it lacks requires"),
    "no sigmas": ({"tensors": arrays(sigmas=None)}, "row 0: it lacks sigmas"),
    "no tensors": ({"tensors": {}}, "row 0: it lacks sigmas, weights"),
    "requires text": ({"facts": changed(requires="lambda")}, "'requires' must be a list of names"),
    "requires numbers": ({"facts": changed(requires=[1])}, "'requires' must be a list of names"),
    "unknown feature": (
        {"facts": changed(requires=["lambda", "quantum", "λ²"])},
        "row 0: it requires 'quantum', 'λ²', which this version does not know: update",
    ),
    "unknown feature of the table": ({"facts": changed() | {"requires": ["mixture"]}}, "it requires 'mixture'"),
    "evaluations of text": ({"facts": changed(evaluations="111")}, "'evaluations' must be a list"),
    "evaluations of floats": ({"facts": changed(evaluations=[1.0, 1, 1])}, "whole numbers"),
    "huge evaluations": ({"facts": changed(evaluations=[10**30, 1, 1])}, "1 to 256 evaluations"),
    "settings of a list": ({"facts": changed(settings=[1])}, "'settings' must be an object"),
    "prediction": ({"facts": changed(prediction=None)}, "it lacks prediction"),
    "prediction of a list": ({"facts": changed(prediction=[])}, "prediction must be one of"),
    "form of an object": ({"facts": changed(form={})}, "form must be"),
    "float32": ({"tensors": arrays(weights=np.zeros(3, "f4"))}, "its numbers must be float64"),
    "integers": ({"tensors": arrays(sigmas=np.array([3, 2, 1, 0]))}, "its numbers must be float64"),
    "wrong shape": ({"tensors": arrays(weights=np.zeros((3, 3, 3)))}, "do not fit 3 evaluations"),
    "scalar": ({"tensors": arrays(sigmas=np.zeros(()))}, "must descend"),
    "NaN in an array": ({"tensors": arrays(weights=np.full(3, np.nan))}, "weights has NaN"),
    "told of another length": ({"tensors": arrays(told_sigmas=np.ones(9))}, "told_sigmas must be 3"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "why"), BROKEN.values(), ids=BROKEN)
def test_broken_table_is_refused_with_file_and_reason(tmp_path, content, why):
    path = write(tmp_path / "broken.safetensors", **content)
    with pytest.raises(TableError, match=why) as caught:
        LambdaTable.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_another_safetensors_file(tmp_path):
    save_file({"lora.weight": np.zeros(3)}, tmp_path / "lora.safetensors")
    with pytest.raises(TableError, match=r"lora\.safetensors: a safetensors file, but not a λ table"):
        LambdaTable.load(tmp_path / "lora.safetensors")


def test_table_of_a_later_version_keeps_what_this_one_does_not_know(tmp_path):
    """Optional fields and arrays, of rows and of the table, with their types."""
    facts = changed(**{"x-note": "kept"}) | {"x-table": [1, {"a": None}], "requires": ["lambda"]}
    extra = {
        "rows.0.x-curve": np.array([1, np.nan], "f4"),
        "x-basis": np.arange(4, dtype="u1"),
        "rows.7.x": np.ones(1),
    }
    path = write(tmp_path / "t.safetensors", facts, arrays() | extra, version="2")
    table = LambdaTable.load(path)
    assert table.rows[0].unknown == {"x-note": "kept"}
    assert table.unknown == {"x-table": [1, {"a": None}], "requires": ["lambda"]}
    again = LambdaTable.load(table.save(tmp_path / "again.safetensors"))
    assert again == table
    with safe_open(tmp_path / "again.safetensors", "numpy") as file:
        for name, value in extra.items():
            np.testing.assert_array_equal(file.get_tensor(name), value, strict=True)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_file_is_a_table_or_a_table_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(write(folder / "t.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "d.safetensors"
    path.write_bytes(bytes(content))
    with suppress(TableError):
        assert LambdaTable.load(path).rows


def test_saving(tmp_path):
    table, other = LambdaTable([row_of()]), LambdaTable([row_of("heun", evaluations=(2, 2, 1))])
    path = tmp_path / "t.safetensors"
    table.save(str(path))
    with pytest.raises(TableError, match="exists already"):
        other.save(path)
    assert LambdaTable.load(str(path)) == table
    other.save(path, overwrite=True)
    assert LambdaTable.load(path) == other
    with pytest.raises(TableError, match=r"t\.ckpt: a table's file name ends in \.safetensors"):
        table.save(tmp_path / "t.ckpt")
    large = LambdaTable([row_of(unknown_arrays={"x": np.zeros(3_000_000)})])
    with pytest.raises(TableError, match="too many for a table"):
        large.save(tmp_path / "large.safetensors")
    assert os.listdir(tmp_path) == ["t.safetensors"]
