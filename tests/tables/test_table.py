"""Tables: found by σ, the same after a round trip through a file, and any other file is refused with a reason."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import pickle
import sys
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from dode_nodes.errors import DodeError, TableError
from dode_nodes.tables.describe import table_text
from dode_nodes.tables.provenance import HeldOutErrors
from dode_nodes.tables.table import LambdaTable
from tests.tables import rows
from tests.tables.rows import BEGAN, SIGMAS, arrays, changed, refined_row, row_of, write

# --- Round trips --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(table=rows.tables)
def test_table_survives_a_file(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("tables") / "t.safetensors"
    assert table.save(path) == path
    loaded = LambdaTable.load(path)
    assert loaded == table
    assert loaded.sha256 == table.sha256
    assert [row.sha256 for row in loaded.rows] == [row.sha256 for row in table.rows]
    for name, value in table.unknown_arrays.items():
        np.testing.assert_array_equal(loaded.unknown_arrays[name], value, strict=True)
    loaded.save(path, overwrite=True)  # and a second one
    assert LambdaTable.load(path) == table


@settings(max_examples=10, deadline=None)
@given(table=rows.tables)
def test_table_survives_copies_and_pickling(table):
    assert copy.deepcopy(table) == pickle.loads(pickle.dumps(table)) == table  # noqa: S301


def test_arrays_are_read_in_any_language(tmp_path):
    """float64 tensors and JSON under plain names: nothing but safetensors is needed."""
    path = LambdaTable([row_of(error=0.1)], {"family": "SD15"}).save(tmp_path / "t.safetensors")
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == {"rows.0.sigmas", "rows.0.weights"}
        np.testing.assert_array_equal(file.get_tensor("rows.0.weights"), [0, 0.1, 0.2])
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("dode-lambda-table", "2")
    facts = json.loads(metadata["table"])
    assert facts["model"] == {"family": "SD15"}
    assert facts["rows"][0]["requires"] == ["lambda"]
    assert facts["rows"][0]["errors"] == {"latents": 4, "dode": [0.1, None, None], "stock": None}
    assert {"best_stock", "loras"}.isdisjoint(facts["rows"][0])


def test_rows_from_the_tenth_on_have_their_own_arrays(tmp_path):
    table = LambdaTable([row_of(weights=np.full(3, float(i))) for i in range(12)])
    assert LambdaTable.load(table.save(tmp_path / "t.safetensors")) == table


def test_odd_text_survives(tmp_path):
    table = LambdaTable([row_of(settings={"prompt": ["\ud83d lone", "λ\n\0", "日本"]})])
    assert LambdaTable.load(table.save(tmp_path / "t.safetensors")) == table


def test_reading_takes_twice_as_long_for_twice_the_rows(tmp_path):
    def calls(count):
        path = LambdaTable([row_of()] * count).save(tmp_path / f"{count}.safetensors")
        counted = 0

        def count_it(frame, event, arg):
            nonlocal counted
            counted += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(count_it)
        try:
            LambdaTable.load(path)
        finally:
            sys.setprofile(before)
        return counted

    calls(1)
    assert calls(300) <= 2.2 * calls(150)


# --- Tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[], ["a row"], row_of(), None])
def test_table_without_rows_is_refused(rows):
    with pytest.raises(DodeError, match="at least one LambdaRow"):
        LambdaTable(rows)


def test_table_is_frozen():
    table = LambdaTable([row_of()], {"family": "SD15"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.rows = ()
    with pytest.raises(TypeError):
        table.model["family"] = "SDXL"


def test_tables_are_equal_if_everything_is():
    assert LambdaTable([row_of()], {"a": 1}) == LambdaTable([row_of()], {"a": 1})
    assert LambdaTable([row_of()], {"a": 1}) != LambdaTable([row_of()], {"a": 2})
    assert LambdaTable([row_of()]) != LambdaTable([row_of()] * 2)
    assert LambdaTable([row_of()]) != LambdaTable([row_of()], unknown={"x": 1})
    assert LambdaTable([row_of()]) != LambdaTable([row_of()], unknown_arrays={"x": np.ones(1)})


def test_the_hash_is_of_the_rows_in_their_order():
    a, b = row_of(), row_of("heun")
    table = LambdaTable([a, b])
    assert table.sha256 == LambdaTable([a, b], {"family": "SD15"}, {"x": 1}).sha256
    assert len({each.sha256 for each in (table, LambdaTable([b, a]), LambdaTable([a]))}) == 3
    assert table.sha256.startswith(table_text(table).split()[1])


# --- Finding ------------------------------------------------------------------------------------------


def test_table_says_what_it_has_where_nothing_matches():
    table = LambdaTable([row_of(), row_of("heun", evaluations=(2, 2, 1))])
    why = table.match([9.0, 0.0]).why
    assert why.startswith("no row's schedule contains these σ. The table has: euler, 3 steps")
    assert "heun, 3 steps (5 evaluations, noise)" in why
    assert table.match([9.0, 0.0], "heun").why.startswith("no step of heun, 3 steps")
    assert table.match(SIGMAS, "ipndm").why.startswith(
        "this λ table has no row for the solver 'ipndm'. It has: euler"
    )


def test_smallest_held_out_error_is_taken_among_equals_the_first():
    bad, good, same, unchecked = (
        row_of(error=error, settings={"n": n}) for n, error in enumerate([0.3, 0.1, 0.1, None])
    )
    for order in itertools.permutations([bad, good, same, unchecked]):
        expected = next(row for row in order if row in (good, same))
        assert LambdaTable(order).match(SIGMAS).row is expected


def test_a_part_is_judged_by_the_errors_from_its_start():
    whole, late = row_of(error=(0.1, 0.3, None)), row_of(error=(0.2, 0.05, None))
    for order in ([whole, late], [late, whole]):
        table = LambdaTable(order)
        assert table.match(SIGMAS).row is whole
        assert table.match(SIGMAS[1:]).row is late


def test_only_rows_of_the_solver():
    euler, heun = row_of(error=0.1), row_of("heun", evaluations=(2, 2, 1), error=0.2)
    table = LambdaTable([euler, heun])
    assert table.match(SIGMAS).row is euler
    assert table.match(SIGMAS, "heun").row is heun


def test_a_refined_row_is_found_by_the_solver_it_began_with_on_the_sigmas_it_has():
    row = refined_row()
    assert LambdaTable([row]).match(SIGMAS, "ipndm").row is row
    assert LambdaTable([row]).match(BEGAN["sigmas"]).row is None


def test_whole_schedule_goes_before_a_part_of_a_longer_one():
    """Whose error, over more steps from another σ, is not to be compared."""
    longer = row_of(sigmas=(16.0, *SIGMAS), error=(0.01, 0.01, 0.01, 0.01))
    own = row_of(error=0.5)
    assert LambdaTable([longer, own]).match(SIGMAS).row is own
    assert LambdaTable([longer, own]).match(SIGMAS[1:]).row is longer


# --- Files --------------------------------------------------------------------------------------------


def test_table_of_another_program_is_read(tmp_path):
    assert LambdaTable.load(write(tmp_path / "t.safetensors")).rows == (row_of(),)


def without(*names):
    """The JSON of a table of one row without these of its fields."""
    return {"facts": changed(**dict.fromkeys(names))}


BROKEN = {
    "another format": ({"format": "a LoRA"}, "a safetensors file, but not a λ table"),
    "a later version": ({"version": "3"}, "it has version 3, and this pack reads up to 2: update the pack"),
    "version 0": ({"version": "0"}, "its version is not a number"),
    "version of words": ({"version": "two"}, "its version is not a number"),
    "version of many digits": ({"version": "1" * 5000}, "its version is not a number"),
    "no rows": ({"facts": {}}, "its metadata has no rows"),
    "rows of no list": ({"facts": {"rows": {}}}, "its metadata has no rows"),
    "empty rows": ({"facts": {"rows": []}}, "at least one LambdaRow"),
    "a list": ({"facts": "[]"}, "its metadata has no rows"),
    "no JSON": ({"facts": "{"}, "its metadata is not valid JSON"),
    "NaN": ({"facts": '{"rows": [NaN]}'}, "NaN is not JSON"),
    "Infinity": ({"facts": '{"rows": [-Infinity]}'}, "-Infinity is not JSON"),
    "deep": ({"facts": "[" * 100_000 + "]" * 100_000}, "not valid JSON"),
    "deep in a field": (
        {"facts": changed(settings={"x": json.loads("[" * 900 + "]" * 900)})},
        "row 0: settings: nested more than 32 deep|JSON",
    ),
    "row of no object": ({"facts": {"rows": [3]}}, "row 0: it is not an object"),
    "model of no object": ({"facts": changed() | {"model": 3}}, "model must be an object"),
    "no solver": (without("solver"), "row 0: it lacks solver"),
    "no requires": (without("requires"), "row 0: it lacks requires"),
    "no prediction, no form": (without("prediction", "form"), "row 0: it lacks form, prediction"),
    "no sigmas": ({"tensors": arrays(sigmas=None)}, "row 0: it lacks sigmas"),
    "no tensors": ({"tensors": {}}, "row 0: it lacks sigmas, weights"),
    "requires text": ({"facts": changed(requires="lambda")}, "'requires' must be a list of names"),
    "requires numbers": ({"facts": changed(requires=[1])}, "'requires' must be a list of names"),
    "unknown feature": (
        {"facts": changed(requires=["lambda", "quantum", "λ²"])},
        "row 0: it requires 'quantum', 'λ²', which this version does not know: update",
    ),
    "unknown feature of the table": ({"facts": changed() | {"requires": ["guidance"]}}, "it requires 'guidance'"),
    "evaluations of text": ({"facts": changed(evaluations="111")}, "'evaluations' must be a list"),
    "evaluations of floats": ({"facts": changed(evaluations=[1.0, 1, 1])}, "whole numbers"),
    "huge evaluations": ({"facts": changed(evaluations=[10**30, 1, 1])}, "1 to 256 evaluations"),
    "solver_options of a list": (
        {"facts": changed(solver_options=[["a", 1]])},
        "row 0: solver_options must be an object",
    ),
    "prediction of a list": ({"facts": changed(prediction=[])}, "prediction must be one of"),
    "form of an object": ({"facts": changed(form={})}, "form must be"),
    "origin of text": ({"facts": changed(origin="refined")}, "row 0: 'origin' must be an object"),
    "errors of another length": (
        {"facts": changed(errors={"latents": 4, "dode": [0.1]})},
        "row 0: a row of 3 steps must have 3 held-out errors",
    ),
    "errors of a list": ({"facts": changed(errors=[0.1])}, "row 0: 'errors' must be an object"),
    "negative errors": (
        {"facts": changed(errors={"latents": 4, "dode": [-1, None, None]})},
        "row 0: held-out errors must be numbers of at least 0",
    ),
    "stock of text": ({"facts": changed(best_stock="heun")}, "row 0: 'best_stock' must be an object"),
    "loras of an object": ({"facts": changed(loras={})}, "row 0: 'loras' must be a list"),
    "a LoRA of text": ({"facts": changed(loras=["x"])}, "row 0: 'loras' must be an object"),
    "began at another σ": (
        {"facts": changed(origin=BEGAN | {"kind": "refined", "sigmas": [9, 4, 2, 0]})},
        "row 0: a refined row must start at the σ",
    ),
    "float32": ({"tensors": arrays(weights=np.zeros(3, "f4"))}, "its numbers must be float64"),
    "integers": ({"tensors": arrays(sigmas=np.array([3, 2, 1, 0]))}, "its numbers must be float64"),
    "weights per channel": ({"tensors": arrays(weights=np.zeros((3, 4)))}, "do not fit 3 evaluations"),
    "wrong shape": ({"tensors": arrays(weights=np.zeros((3, 3, 3)))}, "do not fit 3 evaluations"),
    "scalar": ({"tensors": arrays(sigmas=np.zeros(()))}, "must descend"),
    "NaN in an array": ({"tensors": arrays(weights=np.full(3, np.nan))}, "weights has NaN"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "why"), BROKEN.values(), ids=BROKEN)
def test_broken_table_is_refused_with_file_and_reason(tmp_path, content, why):
    path = write(tmp_path / "broken.safetensors", **content)
    with pytest.raises(TableError, match=why) as caught:
        LambdaTable.load(path)
    assert str(caught.value).startswith(f"{path}: ")


ODD = {
    "shift of text": ({"model": {"shift": "3.0"}}, "model: 'shift' cannot be \"3.0\""),
    "shift of a list": ({"model": {"shift": [3.0]}}, r"model: 'shift' cannot be \[3\.0\]"),
    "fingerprint of text": ({"model": {"fingerprint": "89cb"}}, "model: 'fingerprint' cannot be"),
    "fingerprint of nothing": ({"model": {"fingerprint": None}}, "model: 'fingerprint' cannot be null"),
    "values of text": ({"model": {"fingerprint": {"values": ["0.1"]}}}, "model: 'fingerprint' cannot be"),
    "latent_shape of two kinds": ({"settings": {"latent_shape": [4, "8"]}}, "settings: 'latent_shape' cannot be"),
    "teacher of a list": ({"settings": {"teacher": ["x"]}}, r"settings: 'teacher' cannot be \[\"x\"\]"),
    "cfg of text": ({"settings": {"cfg": "7"}}, "settings: 'cfg' cannot be \"7\""),
    "scale 0": ({"settings": {"scale": 0}}, "settings: 'scale' cannot be 0"),
    "teacher of markup": ({"settings": {"teacher": "<img src=x onerror=alert(1)>"}}, "settings: 'teacher'"),
    "solver of markup": ({"solver": "<img src=x onerror=alert(1)>"}, "a row's solver must be a name"),
    "origin of markup": (
        {"origin": BEGAN | {"kind": "refined", "solver": "<img src=x>"}}, "an origin's solver must be a name",
    ),
    "stock setting of markup": (
        {"best_stock": {"sampler": "<img src=x>", "scheduler": "x", "error": 1, "latents": 4}}, "a stock setting needs",
    ),
    "settings of a list": ({"settings": [1]}, "settings must be an object"),
    "report of text": ({"report": "good"}, "report must be an object"),
    "checked of text": ({"report": {"checked": "yes"}}, "report: 'checked' cannot be \"yes\""),
    "shrunk_to of nothing": ({"report": {"shrunk_to": None}}, "report: 'shrunk_to' cannot be null"),
    "errors of text": ({"report": {"after_steps": {"dode": ["x"]}}}, "report: 'after_steps' cannot be"),
    "huge number": ({"report": {"teacher_error": 10**400}}, "report: 'teacher_error' cannot be 1000"),
    "stages of numbers": ({"report": {"refined": {"stages": [3]}}}, "report: 'refined' cannot be"),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "why"), ODD.values(), ids=ODD)
def test_odd_fact_is_refused_with_file_and_field(tmp_path, facts, why):
    facts = dict(facts)
    of_table = {name: facts.pop(name) for name in ("model",) if name in facts}
    path = write(tmp_path / "odd.safetensors", changed(**facts) | of_table)
    row = "" if of_table else "row 0: "
    with pytest.raises(TableError, match=row + why) as caught:
        LambdaTable.load(path)
    assert str(caught.value).startswith(f"{path}: {row}")


def test_a_function_of_the_callers_is_a_legal_name(tmp_path):
    facts = changed(solver="<mine>", settings={"teacher": "<mine>"})
    (row,) = LambdaTable.load(write(tmp_path / "t.safetensors", facts)).rows
    assert (row.is_callable, row.settings["teacher"]) == (True, "<mine>")


def test_another_safetensors_file(tmp_path):
    save_file({"lora.weight": np.zeros(3)}, tmp_path / "lora.safetensors")
    with pytest.raises(TableError, match=r"lora\.safetensors: a safetensors file, but not a λ table"):
        LambdaTable.load(tmp_path / "lora.safetensors")


def test_what_is_not_known_is_kept_and_does_nothing(tmp_path):
    """Optional fields and arrays, of rows and of the table, with their types."""
    odd = {"x-note": "kept", "x-deep": {"a": [None, {"b": 1}]}}
    facts = changed(**odd, settings=odd, report=odd)
    facts |= {"x-table": [1, {"a": None}], "requires": ["lambda"], "model": odd}
    extra = {
        "rows.0.x-curve": np.array([1, np.nan], "f4"),
        "x-basis": np.arange(4, dtype="u1"),
        "rows.7.x": np.ones(1),
        "rows.00.x": np.ones(1),
    }
    table = LambdaTable.load(write(tmp_path / "t.safetensors", facts, arrays() | extra))
    (row,) = table.rows
    assert row.unknown == row.settings == row.report == table.model == odd
    assert table.unknown == {"x-table": [1, {"a": None}]}
    plain = LambdaTable.load(write(tmp_path / "plain.safetensors"))
    assert table.sha256 == plain.sha256
    assert table.match(SIGMAS) == (row, *plain.match(SIGMAS)[1:])
    assert (row.label, row.error_from(), row.origin.kind) == (row_of().label, float("inf"), "distilled")

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


def known_facts():
    """The JSON of a table of one row in which every field that is known is there."""
    row = refined_row(
        errors=HeldOutErrors(4, (0.1, None, 0.2), 0.3),
        settings={"cfg": 2.0, "teacher": "heun", "latent_shape": [4, 8, 8]},
        report={
            "lambda_standard_error": [None, 0.1],
            "after_steps": {"stock": [0.1], "dode": [0.1]},
            "refined": {"kept": "a", "stages": [{"stage": "a", "fitted_error": 0.1}]},
            "evaluations": {"teacher": 3},
        },
    )
    extra = {
        "best_stock": {"sampler": "a", "scheduler": "b", "error": 0.1, "latents": 4},
        "loras": [{"sha256": "0" * 64}],
    }
    model = {"shift": 3.0, "fingerprint": {"layout": "89cb", "values": [0.1]}, "patches": {"weights": 3}}
    return {"rows": [row.to_json() | extra], "model": model, "requires": ["lambda"]}


def places(value, path=()):
    """The path of every value in JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from places(inner, (*path, name))


@pytest.mark.parametrize("odd", [None, True, -1, 1.5, "text", "<b>", [], ["x"], [-1], {}, {"a": {}}, 10**400])
def test_whatever_stands_in_a_field_is_a_table_that_can_be_shown_or_a_table_error(tmp_path, odd):
    tensors = {f"rows.0.{name}": value for name, value in refined_row().arrays().items()}
    for path in list(places(known_facts()))[1:]:
        facts = known_facts()
        *above, last = path
        inner = facts
        for name in above:
            inner = inner[name]
        inner[last] = odd
        file = write(tmp_path / "t.safetensors", facts, tensors)
        with suppress(TableError):
            table_text(LambdaTable.load(file))


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


def test_whether_a_table_can_be_saved_is_known_before(tmp_path):
    LambdaTable.check_new(tmp_path / "new.safetensors")
    (tmp_path / "old.safetensors").write_text("mine")
    for name, why in (("old.safetensors", "exists already"), ("t.ckpt", r"ends in \.safetensors")):
        with pytest.raises(TableError, match=why):
            LambdaTable.check_new(tmp_path / name)


def test_people_are_told_a_tables_name_and_its_digits_once():
    table = LambdaTable([row_of()])
    digits = table.sha256[:8]
    called = {
        "": digits,
        "mine": f"mine {digits}",
        table.named("mine"): f"mine-{digits}",
        f"{table.named('mine')}-2": f"mine-{digits}-2",  # as where that name was taken
        "mine-12345678": f"mine-12345678 {digits}",  # of other numbers
    }
    assert {name: replace(table, name=name).called for name in called} == called
