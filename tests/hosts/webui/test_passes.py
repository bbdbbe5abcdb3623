"""Which row runs in a pass of the host. No host is needed."""

from __future__ import annotations

import numpy as np
import pytest

from dode_nodes.errors import DodeError
from dode_nodes.hosts.webui.passes import for_last_steps, for_steps
from dode_nodes.sampling.schedules import NoiseSchedule, make_sigmas
from dode_nodes.tables.free_outputs import FreeOutputs
from dode_nodes.tables.provenance import HeldOutErrors, Origin
from dode_nodes.tables.row import LambdaRow
from dode_nodes.tables.table import LambdaTable
from tests.tables.rows import row_of


def karras(steps: int) -> np.ndarray:
    return make_sigmas("karras", steps, NoiseSchedule.stable_diffusion()).double().numpy()


def table_of(*steps: int, **facts) -> LambdaTable:
    return LambdaTable([row_of(sigmas=karras(n), **facts) for n in steps])


def free_first(steps: int) -> LambdaRow:
    """So many steps that cost an evaluation, after one that costs none."""
    n = steps + 1
    weights = np.tril(np.full((1, n, n + 1), 0.1), 1)
    began = {"solver": "euler", "sigmas": np.array([14.614641, *karras(steps)[1:]])}
    sigmas = np.array([14.614641, *np.geomspace(9, 0.1, steps), 0.0])
    return row_of(
        sigmas=sigmas, weights=weights, form="history", free=FreeOutputs(first=True, start=True),
        origin=Origin("refined", **began),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "run"), [(1, 4), (4, 4), (5, 4), (6, 8), (7, 8), (8, 8), (10, 8), (12, 16), (99, 16)]
)
def test_the_nearest_number_of_steps_ties_going_to_more(asked, run):
    part = for_steps(table_of(4, 8, 16), asked, 5.0)
    assert (part.steps, part.start, len(part.sigmas)) == (run, 0, run + 1)


def test_steps_are_those_that_run_whatever_another_host_calls_them():
    table = table_of(7, settings={"steps": 6})
    assert for_steps(table, 7, None).steps == 7
    assert for_last_steps(table, 7, 3, float(karras(7)[4]), None).start == 4


def test_rows_whose_sampler_is_not_here_are_left_out():
    both = LambdaTable([row_of("res_multistep", sigmas=karras(4)), row_of(sigmas=karras(8))])
    assert for_steps(both, 4, 5.0).steps == 8
    with pytest.raises(DodeError, match="is for samplers that are not here: res_multistep, 4 steps"):
        for_steps(LambdaTable(both.rows[:1]), 4, 5.0)


def test_rows_that_a_probe_refuses_are_left_out():
    """Files may name any numbers with any sampler."""
    wrong = row_of("heun", sigmas=karras(4), evaluations=(1,) * 4)  # it asks seven times
    unknown = row_of("ipndm", sigmas=karras(4), solver_options={"max_order": 9})
    assert for_steps(LambdaTable([wrong, unknown, row_of(sigmas=karras(8))]), 4, 5.0).steps == 8
    with pytest.raises(DodeError, match="cannot be used: the sampler 'heun' asks the network 7 times"):
        for_steps(LambdaTable([wrong]), 4, 5.0)
    with pytest.raises(DodeError, match=r"cannot be used: .*ipndm"):
        for_last_steps(LambdaTable([unknown]), 4, 2, float(karras(4)[2]), 5.0)


def test_a_plain_solver_that_is_not_here_is_told_before_it_runs():
    """Guidance is too strong for the refined row, so that its plain solver would run."""
    origin = Origin("refined", solver="res_multistep", sigmas=karras(4))
    weak = row_of(sigmas=karras(4), weights=np.tri(4), form="history", settings={"cfg": 3.0}, origin=origin)
    assert for_steps(LambdaTable([weak]), 4, 3.0).row.is_refined
    with pytest.raises(DodeError, match="res_multistep"):
        for_steps(LambdaTable([weak]), 4, 9.0)


@pytest.mark.parametrize("run", range(1, 9))
def test_a_row_of_as_many_steps_runs_its_last(run):
    part = for_last_steps(table_of(4, 8), 8, run, float(karras(8)[8 - run]), 5.0)
    assert (part.row.paid_steps, part.steps) == (8, run)
    assert part.sigmas.tolist() == pytest.approx(karras(8)[8 - run :])


def test_another_row_runs_where_its_sigma_fits_the_nearest_first():
    begins = float(karras(16)[8])  # between the last eight of twelve and of twenty
    near = for_last_steps(table_of(12, 15, 17, 20), 16, 8, begins, 5.0)
    assert near.row.paid_steps in (15, 17)
    assert near.steps == 8
    with pytest.raises(
        DodeError, match=r"no row for the last 8 of 16 steps, which begin at σ = .*: distil 16 steps"
    ):
        for_last_steps(table_of(9, 40), 16, 8, begins, 5.0)
    with pytest.raises(DodeError, match="no row for the last 8 of 16 steps"):
        for_last_steps(table_of(4), 16, 8, begins, 5.0)


def test_of_two_rows_the_one_with_the_smaller_error_from_there():
    errors = [(0.1, None, 0.3, None), (0.2, None, 0.05, None)]
    rows = [row_of(sigmas=karras(4), errors=HeldOutErrors(4, each), settings={"cfg": 5.0}) for each in errors]
    table = LambdaTable(rows)
    assert for_steps(table, 4, 5.0).row.error_from() == 0.1
    assert for_last_steps(table, 4, 2, float(karras(4)[2]), 5.0).row.error_from(2) == 0.05


def test_a_first_step_that_costs_nothing_is_no_step_that_people_count():
    table = LambdaTable([free_first(4)])
    whole = for_steps(table, 4, 5.0)
    assert (whole.steps, len(whole.sigmas)) == (4, 6)
    part = for_last_steps(table, 4, 3, float(whole.sigmas[2]), 5.0)
    assert (part.steps, len(part.sigmas)) == (3, 4)
    assert len(for_last_steps(table, 4, 4, float(whole.sigmas[0]), 5.0).sigmas) == 6


def test_a_refined_row_does_not_run_at_twice_its_guidance():
    weak = row_of(
        sigmas=karras(4), weights=np.tri(4), form="history", settings={"cfg": 3.0},
        origin=Origin("refined", solver="euler", sigmas=karras(4)),
    )  # fmt: skip
    assert for_steps(LambdaTable([weak]), 4, 3.0).row.is_refined
    assert not for_steps(LambdaTable([weak]), 4, 9.0).row.is_refined
