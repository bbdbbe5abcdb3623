"""The search for the best stock setting, what it is measured with, and what a fit makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dode_nodes import DodeError, Latents, Pipeline, Recipe, Teacher, plan_teacher, run_teacher, sample_dode
from dode_nodes.fit.race import entrants
from dode_nodes.fit.stock import StockSearch, steps_needed
from dode_nodes.sampling.schedules import NoiseSchedule, schedules_of
from dode_nodes.tables.provenance import PLAIN
from tests.oracles import two_peaks
from tests.toys import Counting, Telling, latents

SD = NoiseSchedule.stable_diffusion()
schedule_of = schedules_of(SD)
TEACHER = Teacher(scale=4)


KARRAS = schedule_of("karras", 5, False)


def subject(count=8, model=two_peaks):
    return Latents.of(model, latents(count, sigma=float(KARRAS[0])))


def found(count=8, model=two_peaks):
    targets = run_teacher(subject(count, model), KARRAS, TEACHER)
    return StockSearch(targets, 5, KARRAS, schedule_of)(targets), targets


def test_the_best_is_near_the_best_of_all_that_entered():
    result, targets = found(16)
    runners = entrants(
        5, float(KARRAS[0]), flow=False, make_sigmas=schedule_of, lender=None, free_first=False
    )
    assert result.setting.tried == len(runners) == len(result.ranked)
    assert {each.name for each in result.ranked} == {each.name for each in runners}

    def error(entrant):
        row = entrant.as_row()
        made = sample_dode(two_peaks, targets.latents.groups[0].x, row.sigmas, disable=True, row=row)
        distances = (made - targets.ends[0]).flatten(1).square().mean(1).sqrt().numpy()
        return float(np.exp(np.log(distances).mean()))

    by_all = {each.name: error(each) for each in runners}
    assert by_all[result.best.name] <= 1.1 * min(by_all.values())
    assert len(result.best.distances) > len(result.ranked[-1].distances)


def test_its_cost_is_known_before_and_kept_to():
    model, tell = Counting(), Telling()
    planned = plan_teacher(subject(model=model), KARRAS, TEACHER)
    search = StockSearch(planned, 5, KARRAS, schedule_of)
    before = model.evaluations
    targets = planned()
    of_teacher = model.evaluations - before
    assert of_teacher == planned.cost
    search(targets, tell)
    spent = model.evaluations - before - of_teacher
    tell.check(planned=search.cost, spent=spent)
    assert spent == search.cost


def test_it_is_a_row_that_hosts_can_sample():
    result, targets = found()
    row = result.as_row(targets, {"cfg": 2.0, "scheduler": "simple"})
    assert row.origin.kind == PLAIN
    assert not row.weights.any()
    assert row.settings["cfg"] == 2.0
    assert row.settings.get("scheduler", result.best.scheduler) == result.best.scheduler
    x = targets.latents.groups[0].x
    assert row.solver == result.best.solver
    made = sample_dode(two_peaks, x, row.sigmas, disable=True, row=row)
    as_weights = result.best.as_row()
    other = sample_dode(two_peaks, x, as_weights.sigmas, disable=True, row=as_weights)
    assert float((made - other).abs().max()) < 1e-4
    held = targets.latents.held_out
    rms = (made - targets.ends[0])[held].square().mean().sqrt()
    assert row.error_from() == pytest.approx(float(rms), rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_latents(count):
    result, _ = found(count)
    assert math.isfinite(result.setting.error)
    assert result.setting.latents >= 1


def test_a_model_that_gives_nan_only_is_refused():
    targets = run_teacher(subject(), KARRAS, TEACHER)
    broken = run_teacher(subject(), KARRAS, TEACHER)
    object.__setattr__(
        broken, "latents", Latents.of(lambda x, sigma: x * math.nan, targets.latents.groups[0].x)
    )
    with pytest.raises(DodeError, match="no stock setting ends in finite numbers"):
        StockSearch(targets, 5, KARRAS, schedule_of)(broken)


def test_there_is_none_with_one_evaluation_too_many():
    def none(name, steps, discard):
        raise DodeError("no such schedule")

    with pytest.raises(DodeError, match="no stock setting with 5 evaluations"):
        StockSearch(plan_teacher(subject(), KARRAS, TEACHER), 5, KARRAS, none)


@given(st.integers(2, 40), st.floats(0.01, 1), st.floats(0.5, 3))
def test_the_steps_needed_are_the_fewest(steps, error, order):
    def error_with(count):
        return (steps / count) ** order

    needed = steps_needed(steps, error, error_with)
    assert steps < needed <= 2 * steps + 1
    assert needed == 2 * steps + 1 or error_with(needed) <= error
    assert needed == steps + 1 or error_with(needed - 1) > error


# --- In a pipeline ------------------------------------------------------------------------------------


def pipeline(**recipe):
    sigmas = schedule_of("karras", 4, False)
    fitted, unseen = (latents(n, sigma=float(sigmas[0]), seed=s) for n, s in ((12, 0), (8, 7)))
    settings = {"teacher": TEACHER, "predictions": ["noise"], "make_sigmas": schedule_of} | recipe
    return Pipeline(
        Latents.of(two_peaks, fitted), [sigmas], Recipe(**settings), Latents.of(two_peaks, unseen)
    )


def test_without_a_refinement_the_setting_is_looked_for_and_told():
    work, tell = pipeline(), Telling()
    rows = work.run(tell)
    assert "looking for the best stock setting" in str(work.cost)
    assert tell[0].total == work.cost.total
    assert tell[-1].done == tell[-1].total <= work.cost.total
    assert [row.origin.kind for row in rows] == ["distilled"]
    assert rows[0].best_stock.tried >= 8


def test_where_the_setting_is_nearer_it_becomes_a_row_if_that_is_asked_for():
    (greedy,) = pipeline().run()
    rows = pipeline(or_stock=True).run()
    if greedy.error_from() <= greedy.best_stock.error:
        assert len(rows) == 1
        return
    assert [row.origin.kind for row in rows] == ["distilled", PLAIN]
    assert rows[1].error_from() == rows[1].best_stock.error < greedy.error_from()
    assert rows[1].errors.later_stock == rows[1].errors.dode[1:]
    assert rows[1].unseen.dode == pytest.approx(rows[1].unseen.stock, rel=1e-3)


def test_a_row_that_is_nearer_says_how_many_evaluations_stock_would_need():
    rows = pipeline(refine_budget=float("inf")).run()
    best = min(rows, key=lambda row: row.error_from())
    assert best.is_refined
    unseen = best.unseen
    assert unseen.dode.rms < unseen.stock.rms
    assert 4 < unseen.stock_needs <= 9
    assert all(row.unseen.stock_needs is None for row in rows if row is not best)
