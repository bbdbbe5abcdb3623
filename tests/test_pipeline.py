"""The pipeline: its rows are those of its parts, it says before what it may cost, and keeps what it found."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dode_nodes import Group, distill, refine, run_teacher
from dode_nodes.errors import DodeError
from dode_nodes.pipeline import Pipeline
from dode_nodes.table import end_error
from tests.oracles import two_peaks
from tests.toys import Counting, Interrupted, karras, latents

SCHEDULES = [karras(3), karras(4)]


def groups_on(model=two_peaks):
    return [Group(model, latents(5)), Group(model, latents(3, seed=1))]


def test_rows_are_those_of_its_parts():
    rows = Pipeline(groups_on(), SCHEDULES, solver="dpmpp_2m", scale=4, refine_budget=6).run()
    groups = groups_on()
    targets = run_teacher(groups, None, SCHEDULES, solvers="dpmpp_2m", scale=4)
    greedy = [
        min(
            (distill(groups, None, s, solver="dpmpp_2m", prediction=p, targets=targets) for p in ("noise", "data")),
            key=end_error,
        )
        for s in SCHEDULES
    ]  # fmt: skip
    assert rows[:2] == greedy
    for row, begun in zip(rows[2:], greedy, strict=True):
        again = refine(groups, None, begun, targets=targets)
        assert row.report["refined"]["stages"][0] == again.report["refined"]["stages"][0]
        assert end_error(row) < end_error(begun)


@pytest.mark.parametrize("budget", [0, 3])
def test_cost_is_known_before_and_counted_down(budget):
    model, told = Counting(), []
    pipeline = Pipeline(groups_on(model), SCHEDULES, scale=4, refine_budget=budget)
    assert model.evaluations == 0
    cost = pipeline.cost
    words = f"{cost.total} evaluations: teacher {cost.teacher}"
    assert str(cost).startswith(words)
    assert ("refining" in str(cost)) == bool(budget)
    pipeline.run(told.append)
    assert told[0].total == cost.total
    assert model.evaluations == told[-1].done <= cost.total
    assert all(p.done <= p.total for p in told)
    assert [p.done for p in told] == sorted(p.done for p in told)
    assert sum(plan.evaluations for plan in cost.refining) <= budget * cost.teacher


def test_a_budget_is_shared_so_that_all_schedules_fit_as_many_latents():
    plans = Pipeline(groups_on(), SCHEDULES, refine_budget=2).cost.refining
    assert abs(plans[0].fitted - plans[1].fitted) <= 1


@pytest.mark.parametrize(
    ("budget", "why"),
    [(0.01, "shares a refine budget of 0.01: .* too small"), (-1, "positive"), (float("nan"), "positive")],
)
def test_a_budget_that_pays_for_nothing_is_refused_at_once(budget, why):
    with pytest.raises(DodeError, match=why):
        Pipeline(groups_on(), SCHEDULES, refine_budget=budget)


@pytest.mark.parametrize("part", ["teacher", "student", "refining"])
def test_interrupt_leaves_what_was_found(part):
    interrupt = Interrupted()

    def stop(p):
        if p.stage == part and (part != "refining" or p.done > 0.9 * p.total):
            raise interrupt

    pipeline = Pipeline(groups_on(), SCHEDULES, scale=4, refine_budget=30)
    with pytest.raises(Interrupted) as caught:
        pipeline.run(stop)
    assert caught.value is interrupt
    refined = [row for row in pipeline.found if row.is_refined]
    assert len(pipeline.found) - len(refined) == {"teacher": 0, "student": 0, "refining": 2}[part]
    assert bool(refined) == (part == "refining")


def test_one_prediction_costs_half_and_is_kept():
    both, one = (Pipeline(groups_on(), SCHEDULES, scale=2, **o) for o in ({}, {"predictions": ["data"]}))
    assert [2 * cost for cost in one.cost.students] == list(both.cost.students)
    assert {row.prediction for row in one.run()} == {"data"}


def test_a_callable_solver_is_refined_too():
    def ralston(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma, sigma_next in pairwise(sigmas):
            d = (x - model(x, sigma.expand(len(x)), **extra_args)) / sigma
            if sigma_next > 0:
                mid = sigma + (sigma_next - sigma) * 2 / 3
                x_mid = x + d * (mid - sigma)
                d = d / 4 + (x_mid - model(x_mid, mid.expand(len(x)), **extra_args)) / mid * 3 / 4
            x = x + d * (sigma_next - sigma)
        return x

    rows = Pipeline(groups_on(), SCHEDULES[:1], solver=ralston, scale=4, refine_budget=20).run()
    assert [row.solver for row in rows] == ["<ralston>"] * len(rows)
    assert torch.isfinite(torch.tensor(rows[-1].weights)).all()
