"""Tables made of tables: what is kept, what is left out, and what does not go together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dode_nodes.errors import DodeError
from dode_nodes.tables import edit, gate
from dode_nodes.tables.provenance import Credit
from dode_nodes.tables.table import LambdaTable
from tests.tables import rows
from tests.tables.rows import row_of

A, B, C = (row_of(weights=np.full(3, float(i)), credit=Credit(author=f"author {i}")) for i in range(3))


def authors(table):
    return [row.credit.author for row in table.rows]


def test_rows_are_put_together_once_each_with_their_authors():
    same = replace(B, credit=Credit(author="another"), settings={"seed": 3})
    table = edit.merged([LambdaTable([A, B], {"family": "sd15"}), LambdaTable([same, C], {"family": "SD15"})])
    assert authors(table) == ["author 0", "author 1", "author 2"]
    assert table.model == {"family": "sd15"}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(table=rows.tables)
def test_what_is_not_known_is_left_out_and_nothing_else(table):
    whole = edit.merged([table])
    assert whole.model.keys() <= gate.MODEL.keys()
    assert not whole.unknown
    assert not whole.unknown_arrays
    assert whole.sha256 == edit.merged([whole]).sha256
    own = {row.sha256: row for row in reversed(table.rows)}
    for row in whole.rows:
        expected = own[row.sha256]
        assert not row.unknown
        assert not row.unknown_arrays
        assert row.settings == {name: v for name, v in expected.settings.items() if name in gate.SETTINGS}
        assert (row.errors, row.best_stock, row.loras, row.credit) == (
            expected.errors, expected.best_stock, expected.loras, expected.credit,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"family": "sdxl"}, "the family of table 2 is 'sdxl', that of the first is 'sd15'"),
        ({"prediction_type": "v"}, "the prediction type of table 2 is 'v'"),
        ({"channels": 16}, "the number of channels of table 2 is '16'"),
        ({"fingerprint": {"samples": [list(range(1, 17))]}}, "table 2 was made for another checkpoint"),
    ],
)
def test_tables_of_other_models_do_not_go_together(model, why):
    own = {"family": "SD15", "prediction_type": "eps", "channels": 4,
           "fingerprint": {"samples": [np.linspace(0.1, 0.9, 16).tolist()]}}  # fmt: skip
    with pytest.raises(DodeError, match=f"merge only tables of one model: .*{why}"):
        edit.merged([LambdaTable([A], own), LambdaTable([B], own | model)])
    assert len(edit.merged([LambdaTable([A], own), LambdaTable([B])]).rows) == 2


@pytest.mark.parametrize(
    ("which", "kept"),
    [
        ("", [0, 1, 2]),
        (" ", [0, 1, 2]),
        ("2", [1]),
        ("3, 1", [2, 0]),
        ("2-3", [1, 2]),
        ("1-2;2-3", [0, 1, 2]),
    ],
)
def test_rows_are_chosen_by_their_numbers(which, kept):
    assert authors(edit.chosen(LambdaTable([A, B, C]), which)) == [f"author {i}" for i in kept]


@pytest.mark.parametrize("which", ["x", "1.5", "-1", "1-", "1 - 2", "1" * 2000, "<img>", "1,,\u202e"])
def test_what_are_no_numbers_of_rows_is_refused(which):
    with pytest.raises(DodeError, match="give the rows to keep as numbers, such as '1, 3-5', not"):
        edit.chosen(LambdaTable([A]), which)


@pytest.mark.parametrize("which", ["0", "4", "3-1", "1-9999"])
def test_rows_that_are_not_there_are_named(which):
    with pytest.raises(DodeError, match=f'this table has the rows 1 to 3, not "{which}"'):
        edit.chosen(LambdaTable([A, B, C]), which)


def test_signing():
    bare = row_of(weights=np.ones(3))
    table = LambdaTable([A, bare])
    given_ = {"author": "me", "licence": "", "notes": "two\nlines"}
    assert [row.credit for row in edit.signed(table, given_, over=True).rows] == [
        Credit("me", "", "two\nlines"), Credit("me", "", "two\nlines"),
    ]  # fmt: skip
    assert [row.credit.author for row in edit.signed(table, given_, over=False).rows] == ["author 0", "me"]
    assert edit.signed(table, {"author": ""}, over=True) == table
    assert edit.signed(table, given_, over=True).sha256 == table.sha256
    with pytest.raises(DodeError, match="author and licence must be a line"):
        edit.signed(table, {"author": "two\nlines"}, over=True)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_a_row_is_kept_once(numbers):
    table = LambdaTable(
        [row_of(weights=np.full(3, float(i)), credit=Credit(author=f"author {i}")) for i in range(9)]
    )
    kept = edit.chosen(table, ",".join(map(str, numbers)))
    assert authors(kept) == [f"author {i - 1}" for i in dict.fromkeys(numbers)]


def test_facts_of_the_model_are_changed():
    table = edit.with_model_facts(LambdaTable([A], {"name": "old", "family": "sd15"}), {"name": "new"})
    assert table.model == {"name": "new", "family": "sd15"}


def test_too_many_rows_do_not_go_together(monkeypatch):
    monkeypatch.setattr(edit, "MAX_ROWS", 2)
    assert len(edit.merged([LambdaTable([A]), LambdaTable([B])]).rows) == 2
    with pytest.raises(DodeError, match="together these tables have 3 rows; a table has at most 2"):
        edit.merged([LambdaTable([A, B]), LambdaTable([C])])


def test_a_list_of_rows_is_read_up_to_a_thousand_characters():
    table = LambdaTable([A])
    assert edit.chosen(table, "1".ljust(1000)).rows == table.rows
    with pytest.raises(DodeError, match="give the rows to keep as numbers"):
        edit.chosen(table, "1".ljust(1001))


def test_who_signs_nothing_leaves_a_row_without_credit():
    table = LambdaTable([row_of()])
    assert edit.signed(table, {"author": "", "licence": ""}, over=True).rows[0].credit is None
