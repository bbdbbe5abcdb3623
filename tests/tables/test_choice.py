"""A row is chosen by what is to be run: its number of steps, where it begins, and the errors from there."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dode_nodes.errors import DodeError
from dode_nodes.tables.choice import cfg_range, part_for_steps, rows_of, steps_of
from dode_nodes.tables.free_outputs import FreeOutputs
from dode_nodes.tables.provenance import PLAIN, HeldOutErrors, Origin
from dode_nodes.tables.remarks import steps_remarks
from dode_nodes.tables.table import LambdaTable
from tests.tables.rows import refined_row, row_of

EIGHT = (*np.geomspace(14.6, 0.05, 8).tolist(), 0.0)
FOUR = EIGHT[::2]


def eight(whole, last_four=None, **facts):
    """A row of eight steps with these held-out errors."""
    errors = [whole, *[None] * 7]
    errors[4] = last_four
    return row_of(sigmas=EIGHT, error=tuple(errors), **facts)


def test_the_best_row_is_the_one_that_is_best_at_what_is_run():
    whole, late = eight(0.1, 0.3), eight(0.2, 0.05)
    for order in ([whole, late], [late, whole]):
        table = LambdaTable(order)
        assert part_for_steps(table, 8).row is whole
        assert part_for_steps(table, 8, denoise=0.5).row is late


def test_where_a_part_was_not_measured_the_whole_decides_then_the_first():
    good, bad, same, part = eight(0.1), eight(0.3), eight(0.1, weights=np.zeros(8)), eight(0.3, 0.2)
    for order in itertools.permutations([good, bad, same]):
        first = next(row for row in order if row is not bad)
        assert part_for_steps(LambdaTable(order), 8, 0.5).row is first
    assert part_for_steps(LambdaTable([good, part]), 8, 0.5).row is part


def with_stock(row, later_stock):
    """The row, and what its plain solver was found to do from its later steps."""
    return replace(row, errors=replace(row.errors, stock=0.5, later_stock=later_stock))


def test_a_part_is_run_by_the_plain_solver_where_that_is_nearer():
    row = with_stock(eight(0.1, last_four=0.2), [0.01, 0.01, 0.01, 0.15, 0.01, 0.01, 0.01])
    table = LambdaTable([row])
    assert part_for_steps(table, 8).row is row
    part = part_for_steps(table, 8, 0.5)
    assert (part.row.origin.kind, part.row.solver, part.start, part.row.error_from(4)) == (
        PLAIN,
        "euler",
        4,
        0.15,
    )
    assert not part.row.weights.any()
    assert part_for_steps(LambdaTable([row, eight(0.3, last_four=0.1)]), 8, 0.5).row.error_from(4) == 0.1
    assert part_for_steps(table, 8, denoise=0).row is row
    nearer = replace(row, errors=replace(row.errors, stock=0.01))
    assert part_for_steps(LambdaTable([nearer]), 8).row is nearer  # of a whole the fit has decided


def test_a_free_first_step_is_run_with_the_whole_alone():
    row = row_of(
        weights=np.zeros((1, 3, 4)), form="history", free=FreeOutputs(True, True, None),
        origin=Origin("refined", "euler", {}, (8.0, 2.0, 0.0)),
    )  # fmt: skip
    table = LambdaTable([row])
    assert [part_for_steps(table, 2, denoise)[1] for denoise in (1.0, 0.5)] == [0, 2]
    assert [part_for_steps(table, 2, denoise).evaluations for denoise in (1.0, 0.5)] == [2, 1]


def test_a_part_that_is_given_by_its_sigmas_is_run_by_the_plain_solver_where_that_is_nearer():
    row = with_stock(eight(0.1, last_four=0.2), [None] * 3 + [0.15] + [None] * 3)
    table = LambdaTable([row])
    assert table.match(EIGHT).row is row
    assert table.match(EIGHT[4:]).row.origin.kind == PLAIN
    assert table.match(EIGHT[5:]).row is row
    assert LambdaTable([with_stock(row, [0.4] * 7)]).match(EIGHT[4:]).row == with_stock(row, [0.4] * 7)


def test_where_guidance_is_too_strong_for_refined_rows_others_are_taken():
    """At twice the guidance that they were made with they were worse than stock; at 1.5 times far better."""
    greedy = row_of(error=0.2, settings={"cfg": 2.0})
    refined = refined_row(errors=HeldOutErrors(4, (0.1, None, None)), settings={"cfg": 2.0})
    both, alone = LambdaTable([greedy, refined]), LambdaTable([refined])
    for cfg, expected in ((None, refined), (0.5, refined), (3.0, refined), (3.2, refined), (3.3, greedy)):
        assert part_for_steps(both, 3, cfg=cfg).row is expected
    part = part_for_steps(alone, 3, cfg=4.0)
    assert (part.row.origin.kind, part.row.solver, part.start) == (PLAIN, "ipndm", 0)
    ranged = replace(refined, settings={"cfg": 2.0, "cfg_range": [2.0, 7.0]})
    assert part_for_steps(LambdaTable([greedy, ranged]), 3, cfg=8.0).row is ranged
    unknown = replace(refined, settings={})
    assert part_for_steps(LambdaTable([unknown]), 3, cfg=99.0).row is unknown


def test_the_range_of_guidance_is_that_of_the_row_or_the_one_number_it_was_made_with():
    for settings, known in (
        ({"cfg": 2.0, "cfg_range": [1.5, 7.0]}, (1.5, 7.0)),
        ({"cfg": 2.0}, (2.0, 2.0)),
        ({}, (None, None)),
    ):
        assert cfg_range(row_of(settings=settings)) == known


@pytest.mark.parametrize(
    ("denoise", "steps"),
    [(1.0, 8), (0.95, 8), (0.5, 4), (0.3, 2), (0.1, 1), (0.06, 1), (0.0, 0), (0.3125, 3)],
)
def test_denoise_is_a_share_of_the_steps_halves_up_and_never_none(denoise, steps):
    part = part_for_steps(LambdaTable([row_of(sigmas=EIGHT), row_of(sigmas=FOUR)]), 8, denoise)
    assert part.row.steps == 8
    assert part.start == 8 - steps
    expected = torch.tensor(EIGHT[-1 - steps :]) if steps else torch.empty(0)
    assert part.sigmas.dtype == torch.float32
    assert torch.equal(part.sigmas, expected)


def test_halves_are_rounded_up_whatever_floating_point_makes_of_them():
    assert [steps_of(25, 0.58), steps_of(50, 0.29), steps_of(45, 0.7)] == [15, 15, 32]


def test_a_part_counts_the_evaluations_of_its_steps():
    heun = row_of("heun", EIGHT, (2,) * 7 + (1,))
    counts = [part_for_steps(LambdaTable([heun]), 8, denoise) for denoise in (1.0, 0.5, 0.1, 0.0)]
    assert [(part.steps, part.evaluations) for part in counts] == [(8, 15), (4, 7), (1, 1), (0, 0)]


def test_where_nothing_is_run_a_row_is_chosen_all_the_same():
    good, bad = eight(0.1), eight(0.2)
    assert part_for_steps(LambdaTable([bad, good]), 8, denoise=0.0).row is good


def test_a_solver_of_merged_steps_begins_where_it_can():
    merged = row_of("dpm_solver_3", EIGHT, (3, 0, 0, 3, 0, 0, 1, 1))
    table = LambdaTable([merged])
    assert part_for_steps(table, 8, 5 / 8).start == 3
    with pytest.raises(
        DodeError,
        match=r"dpm_solver_3 cannot run only the last 4 of these 8 steps. It can run \[1, 2, 5, 8\]",
    ):
        part_for_steps(table, 8, 0.5)
    euler = eight(0.9)
    assert part_for_steps(LambdaTable([merged, euler]), 8, 0.5).row is euler


def test_only_rows_of_the_solver():
    euler, heun = eight(0.1), row_of("heun", EIGHT, (2,) * 7 + (1,), error=0.5)
    refined = eight(0.01, weights=np.tri(8), form="history", origin=Origin("refined", "dpmpp_2m", {}, EIGHT))
    table = LambdaTable([euler, heun, refined])
    assert rows_of(table) == [euler, heun, refined]
    assert rows_of(table, "euler") == [euler, refined]
    assert rows_of(table, "dpmpp_2m") == [refined]
    assert part_for_steps(table, 8, solver="heun").row is heun
    with pytest.raises(DodeError, match=r"no row for the solver 'ipndm'\. It has: euler, 8 steps .*; heun"):
        part_for_steps(table, 8, solver="ipndm")


def test_a_table_without_rows_of_so_many_steps_says_what_it_has():
    rows = [row_of(sigmas=EIGHT), row_of(), row_of(sigmas=FOUR), row_of(sigmas=FOUR)]
    with pytest.raises(DodeError, match=r"than 5: this table has 3, 4 and 8 steps$"):
        part_for_steps(LambdaTable(rows), 5)
    with pytest.raises(DodeError, match=r"than 5: this table has 1 step$"):
        part_for_steps(LambdaTable([row_of(sigmas=(1.0, 0.0))]), 5)
    with pytest.raises(DodeError, match="another number of steps than 5: this table has 8 steps"):
        part_for_steps(LambdaTable([eight(0.1)]), 5)


@given(st.sets(st.integers(1, 12), min_size=1), st.integers(1, 20))
def test_the_nearest_number_of_steps_and_of_two_the_larger(counts, asked):
    table = LambdaTable(
        [row_of("euler", (*np.geomspace(14.6, 0.05, count), 0.0), (1,) * count) for count in counts]
    )
    part = part_for_steps(table, asked, nearest=True)
    distances = [abs(count - asked) for count in counts]
    assert abs(part.row.steps - asked) == min(distances)
    assert part.row.steps == max(count for count in counts if abs(count - asked) == min(distances))
    told = steps_remarks(part, asked, table)
    assert bool(told) == (asked not in counts)
    assert not told or told[0].startswith(f"{part.row.steps} steps are run, not {asked}: this table has ")
