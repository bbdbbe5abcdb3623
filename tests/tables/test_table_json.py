"""A table as JSON, for hosts that keep nothing else: the same numbers, the same gate."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings

from dode_nodes import LambdaTable, TableError
from tests.tables.rows import row_of, tables


@settings(deadline=None, max_examples=100)
@given(table=tables)
def test_all_that_this_version_knows_comes_back(table):
    rows = [replace(row, unknown_arrays={}) for row in table.rows]
    known = LambdaTable(rows, table.model, table.unknown)
    again = LambdaTable.from_json(json.loads(json.dumps(table.to_json(), allow_nan=False)))
    assert again == known
    assert again.sha256 == table.sha256


@pytest.mark.parametrize(("spoil", "why"), [
    (lambda facts: facts.clear(), "does not have the format"),
    (lambda facts: facts.update(version="a"), "version is not a number"),
    (lambda facts: facts.update(version=99), "it has version 99"),
    (lambda facts: facts.pop("arrays"), "no arrays"),
    (lambda facts: facts.pop("table"), "no rows"),
    (lambda facts: facts["arrays"].update({"rows.0.weights": [[1], [1, 2]]}), "must be numbers"),
    (lambda facts: facts["arrays"].update({"rows.0.weights": [float("nan")] * 3}), "JSON"),
    (lambda facts: facts["table"]["rows"][0].update(form="x"), "row 0: a row's form"),
])  # fmt: skip
def test_what_is_no_table_is_refused(spoil, why):
    facts = LambdaTable([row_of()]).to_json()
    spoil(facts)
    with pytest.raises(TableError, match=f"the λ table: .*{why}"):
        LambdaTable.from_json(facts)


@pytest.mark.parametrize("value", [None, [], "table", 1])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(TableError, match="does not have the format"):
        LambdaTable.from_json(value)
