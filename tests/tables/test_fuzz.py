"""Files and codes of an enemy's: a few of those that ``python -m tests.fuzzing`` makes by the million."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dode_nodes.tables.code import from_code
from dode_nodes.tables.table import LambdaTable
from tests.fuzzing import Mutator, Watch, import_and_merge

ROUND = 25


@pytest.mark.parametrize(
    ("make", "take", "share"), [(Mutator.file, LambdaTable.from_bytes, 0.2), (Mutator.code, from_code, 0.2)]
)
def test_every_input_is_a_table_or_a_table_error_and_many_come_to_a_row(make, take, share):
    total = Watch()

    @settings(max_examples=12, deadline=None, database=None)
    @given(seed=st.integers(0, 2**32))
    def round_of(seed):
        mutator = Mutator(seed)
        with total.on_rows():
            for _ in range(ROUND):
                total(take, make(mutator))
        assert total.is_clean, total.failures[:1] or str(total)

    round_of()
    assert total.counts["came to a row"] >= share * total.counts["inputs"]
    assert total.counts["accepted"] > 0
    assert total.counts["refused"] > 0


def test_what_is_imported_stays_in_its_folder(tmp_path):
    mutator, watch, take = Mutator(1), Watch(), import_and_merge(tmp_path)
    for _ in range(40):
        watch(take, mutator.file())
    assert watch.is_clean, watch.failures[:1]
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "lambdas"}
