"""Figures from latents that nothing is fitted or chosen on: right, and without influence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dode_nodes import Latents, Pipeline, Recipe, Teacher, run_teacher, sample_dode
from dode_nodes.fit.headline import LATENTS
from dode_nodes.sampling.schedules import NoiseSchedule, schedules_of
from dode_nodes.sampling.solvers import SOLVERS
from tests.oracles import two_peaks
from tests.toys import Counting, Telling, karras, latents

SD = NoiseSchedule.stable_diffusion()
schedule_of = schedules_of(SD)
TEACHER = Teacher(scale=4)


SCHEDULES = (karras(3), karras(4))


def pipeline(seed=7, model=two_peaks, schedules=SCHEDULES, **recipe):
    settings = {"teacher": TEACHER, "predictions": ["noise"]} | recipe
    first = float(schedules[0][0])
    fitted, unseen = (latents(n, sigma=first, seed=s) for n, s in ((8, 0), (LATENTS, seed)))
    return Pipeline(
        Latents.of(model, fitted),
        list(schedules),
        Recipe(**settings),
        Latents.of(model, unseen, micro_batch=3),
    )


def raced(**recipe):
    """Of one schedule, with a race of starts."""
    schedules = (schedule_of("karras", 4, False),)
    return pipeline(schedules=schedules, refine_budget=float("inf"), make_sigmas=schedule_of, **recipe)


def distances(row, ends, x):
    made = sample_dode(two_peaks, x, row.sigmas, disable=True, row=row)
    return (made - ends).flatten(1).square().mean(1).sqrt().numpy()


def test_figures_are_those_of_runs_of_the_row_and_of_its_plain_solver():
    x = latents(LATENTS, seed=7)
    ends = run_teacher(Latents.of(two_peaks, x), [karras(3), karras(4)], TEACHER).ends[0]
    for row in pipeline().run():
        dode, stock = distances(row, ends, x), distances(row.plain, ends, x)
        assert row.unseen.latents == LATENTS
        for of, figures in ((dode, row.unseen.dode), (stock, row.unseen.stock)):
            expected = [np.sqrt(np.mean(of**2)), np.median(of), np.quantile(of, 0.1), np.quantile(of, 0.9)]
            assert list(vars(figures).values()) == pytest.approx(expected, rel=1e-9)
        assert row.unseen.nearer == (dode < stock).mean()


def test_other_latents_move_the_figures_and_nothing_else():
    one, other = raced(seed=7).run(), raced(seed=8).run()
    without = raced(seed=7)
    without._headline = None
    for a, b, c in zip(one, other, without.run(), strict=True):
        assert a.sha256 == b.sha256 == c.sha256
        assert a.errors == b.errors == c.errors
        assert a.report == b.report == c.report
        assert a.unseen != b.unseen
        assert c.unseen is None


def test_all_rows_of_a_schedule_are_measured_against_the_best_stock_setting():
    subject = raced()
    greedy, refined = subject.run()
    assert greedy.best_stock == refined.best_stock
    assert greedy.unseen.stock == refined.unseen.stock
    setting = refined.best_stock
    solver, *options = setting.sampler.split(", ")
    options = {name: int(value) for name, value in (option.split() for option in options)}
    sigmas = schedule_of(setting.scheduler, 4, setting.discard_penultimate)
    x = latents(LATENTS, sigma=float(sigmas[0]), seed=7)
    ends = run_teacher(Latents.of(two_peaks, x), [schedule_of("karras", 4, False)], TEACHER).ends[0]
    made = SOLVERS[solver](two_peaks, x, sigmas, disable=True, **options)
    expected = (made - ends).flatten(1).square().mean(1).mean().sqrt()
    assert refined.unseen.stock.rms == pytest.approx(float(expected), rel=1e-4)
    assert refined.unseen.dode.rms < refined.unseen.stock.rms


def test_a_sampler_of_the_callers_own_is_measured_as_its_name_leads_nowhere():
    def mine(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return SOLVERS["euler"](model, x, sigmas, extra_args, callback, disable)

    settings = {"schedules": (karras(4),), "refine_budget": 20}
    named, own = (pipeline(solvers=[solver], **settings).run() for solver in ("euler", mine))
    assert [row.origin.solver for row in own] == [None, "<mine>"]
    assert [row.unseen for row in own] == [row.unseen for row in named]
    assert own[0].errors.later_stock == named[0].errors.later_stock


@pytest.mark.parametrize("make", [pipeline, raced])
def test_what_they_cost_is_known_before(make):
    told, model = Telling(), Counting()
    subject = make(model=model)
    assert f"figures from unseen latents {subject.cost.unseen}" in str(subject.cost)
    subject.run(told)
    told.check(planned=subject.cost.total, spent=model.evaluations)
    assert told[-1].stage == "unseen latents"


def test_a_stock_setting_is_measured_once_for_all_rows_that_have_it():
    counts = []
    for measured in (True, False):
        model = Counting()
        subject = raced(model=model)
        if not measured:
            subject._headline = None
        rows = subject.run()
        counts.append(model.evaluations)
    assert len(rows) == 2
    assert counts[0] - counts[1] <= subject.cost.unseen - rows[0].nfe * LATENTS


def test_where_a_run_is_not_finite_there_are_no_figures_and_no_row_is_lost():
    x = latents(LATENTS, seed=7)

    def overflows(x_, sigma):
        """In the last of the steps that only students take, on the latents that nothing is fitted on."""
        is_unseen = torch.isclose(x_[0, 0, 0, 0] / x[0, 0, 0, 0], torch.ones_like(x_[0, 0, 0, 0]), rtol=1e-9)
        seen["unseen"] = seen["unseen"] or bool(is_unseen)
        seen["count"] += seen["unseen"]
        return two_peaks(x_, sigma) * (float("nan") if seen["count"] > seen["teacher"] else 1)

    seen = {"unseen": False, "count": 0, "teacher": 10**9}
    subject = pipeline(model=overflows)
    teacher = subject._headline._teacher.cost // LATENTS
    seen["teacher"] = teacher * 3  # in micro-batches
    rows = subject.run()
    assert [row.unseen for row in rows] == [None, None]
    assert all(row.errors.dode[0] < row.errors.stock for row in rows)
