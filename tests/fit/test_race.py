"""The race of starts: who enters, what it costs, and that the nearest come through."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from dode_nodes import (
    DodeError,
    Latents,
    Progress,
    Refinement,
    Teacher,
    distill,
    plan_refinement,
    plan_teacher,
    refine,
    run_teacher,
)
from dode_nodes.fit.evaluator import Evaluator
from dode_nodes.fit.levenberg_marquardt import LeastSquaresProblem
from dode_nodes.fit.race import admitted, entrants, favourites_of, finalists, half, kinds_of, race, race_cost
from dode_nodes.sampling.free_outputs import unit_variance
from dode_nodes.sampling.schedules import NoiseSchedule, make_sigmas, schedules_of
from dode_nodes.sampling.solvers import SOLVERS
from tests.oracles import two_peaks
from tests.toys import Counting, latents

SD, FLOW = NoiseSchedule.stable_diffusion(), NoiseSchedule.rectified_flow()


def field(evaluations=4, noise_schedule=SD):
    flow = noise_schedule is FLOW
    return entrants(
        evaluations,
        noise_schedule.sigma_max,
        flow=flow,
        make_sigmas=schedules_of(noise_schedule),
        lender=None,
    )


@pytest.mark.parametrize("noise_schedule", [SD, FLOW], ids=["eps", "flow"])
@pytest.mark.parametrize("evaluations", [2, 5, 8, 12])
def test_about_two_dozen_enter_and_each_takes_as_many_evaluations(evaluations, noise_schedule):
    runners = field(evaluations, noise_schedule)
    assert 8 <= len(runners) <= 24
    assert any(each.is_stock for each in runners)
    assert any(not each.is_stock for each in runners)
    x = latents(1, sigma=noise_schedule.sigma_max)
    for each in runners:
        model = Counting()
        (batch,) = Latents.of(model, x).batches()
        each.student.run(model, batch)
        assert model.evaluations == evaluations


def test_one_that_is_stock_is_the_sampler_itself():
    """On the schedule and with the ending that its name says."""
    x = latents(2)
    (batch,) = Latents.of(two_peaks, x).batches()
    stock = [each for each in field() if each.is_stock]
    for each in stock:
        sigmas = make_sigmas(each.scheduler, 4, SD, discard_penultimate=each.discard_penultimate).double()
        expected = SOLVERS[each.solver](two_peaks, x, sigmas, disable=True, **each.options)
        torch.testing.assert_close(each.student.run(two_peaks, batch)[0], expected, rtol=1e-6, atol=1e-6)
    assert len({each.name for each in stock}) == len(stock)


def test_a_first_step_that_is_free_begins_with_the_start():
    x = latents(2)
    (batch,) = Latents.of(two_peaks, x).batches()
    free = next(each for each in field() if not each.is_stock)
    asked = []

    def model(x, sigma, **extra_args):
        asked.append(x.clone())
        return two_peaks(x, sigma)

    free.student.run(model, batch)
    first, second = free.student.sigmas[:2]
    expected = x + (second - first) * unit_variance(x, float(first), flow=False)
    torch.testing.assert_close(asked[0], expected, rtol=1e-9, atol=1e-9)


def test_a_host_whose_first_evaluation_is_always_made_has_no_free_steps():
    runners = entrants(
        4, SD.sigma_max, flow=False, make_sigmas=schedules_of(SD), lender=None, free_first=False
    )
    assert [each.name for each in runners] == [each.name for each in field() if each.is_stock]


def test_a_schedule_that_begins_elsewhere_or_cannot_be_does_not_enter():
    def elsewhere(name, steps, discard):
        if name == "beta":
            raise DodeError("no such schedule")
        return schedules_of(SD)(name, steps, discard) * 1.1

    assert entrants(4, SD.sigma_max, flow=False, make_sigmas=elsewhere, lender=None) == []


def taught(x, model=two_peaks):
    sigmas = make_sigmas("karras", 4, SD)
    return run_teacher(Latents.of(model, x), sigmas, Teacher(scale=12)), sigmas


@pytest.mark.parametrize("count", [3, 7, 24])
def test_the_nearest_come_through_at_the_cost_that_is_said(count):
    targets, _ = taught(latents(count))
    evaluator = Evaluator(Progress(10**6))
    fitted, runners = targets.latents.fitted, field()
    on = partial(LeastSquaresProblem, targets, evaluator=evaluator, stage="refining")
    ranked = race(runners, fitted, on)
    assert {each.name for each in ranked} == {each.name for each in runners}
    through = ranked[: finalists(runners)]
    assert evaluator.spent() == race_cost(runners, len(fitted))
    kinds = [[each for each in runners if each.is_stock == stock] for stock in (True, False)]
    for kind, stock in zip(kinds, (True, False), strict=True):
        left = [each for each in through if each.is_stock == stock]
        assert len(left) == finalists(kind)
        everywhere = {
            each.name: np.exp(np.log(on(fitted).trial(each.student).distances).mean()) for each in kind
        }
        assert everywhere[left[0].name] < 1.1 * min(everywhere.values())
    assert [each.mean for each in through] == sorted(each.mean for each in through)


def of_kind(runners, stock):
    return [each for each in runners if each.is_stock == stock]


def test_of_another_number_of_evaluations_the_favourites_enter_alone():
    targets, _ = taught(latents(12))
    on = partial(LeastSquaresProblem, targets, evaluator=Evaluator(Progress(10**6)), stage="refining")
    ranked = race(field(), targets.latents.fitted, on)
    others = field(5)
    entered = admitted(others, favourites_of(ranked))
    for stock in (True, False):
        names = [each.name for each in of_kind(ranked, stock)]
        expected = set(names[: half(len(names))])
        found = [each.name for each in of_kind(entered, stock)]
        assert len(found) == half(len(of_kind(others, stock)))
        assert set(found) <= expected or set(found) >= expected
    # With many evaluations they run on other schedules: the favourites of few tell nothing of them.
    assert admitted(field(8), favourites_of(ranked)) != []
    assert len(admitted(field(8), favourites_of(ranked))) == len(field(8))


def test_as_many_enter_where_favourites_are_not_known_yet():
    stock, free = kinds_of(4)
    runners = field()
    planned = admitted(runners, {stock: []})
    assert len(of_kind(planned, True)) == half(len(of_kind(runners, True)))
    assert of_kind(planned, False) == of_kind(runners, False)
    known = admitted(runners, {stock: [runners[-1].name], free: [of_kind(runners, False)[-1].name]})
    assert of_kind(runners, False)[-1] in known
    assert admitted(runners, {}) == runners


def test_a_refinement_from_a_poor_start_ends_as_near_as_one_from_a_good_start():
    """Where the host's schedules are known."""
    starts = [("euler", make_sigmas("simple", 4, SD)), ("ipndm", make_sigmas("karras", 4, SD))]
    targets = run_teacher(
        Latents.of(two_peaks, latents(24)),
        [sigmas for _, sigmas in starts],
        Teacher(scale=20),
        solvers="euler",
    )
    distances = []
    for solver, sigmas in starts:
        row = distill(targets, sigmas, solver=solver)
        refinement = Refinement(targets, row, make_sigmas=schedules_of(SD))
        refined = refinement.run()
        stages = {stage.name: stage for stage in refinement.stages}
        distances.append(stages[refined.report["refined"]["kept"]].distance)
        assert refined.best_stock is not None
        assert refined.error_from() < refined.best_stock.error
        assert refined.nfe == 4
    assert max(distances) < 1.5 * min(distances)


@pytest.mark.whole_race
@pytest.mark.parametrize(("solver", "scheduler"), [("euler", "simple"), ("ipndm", "beta")])
def test_leaders_begin_on_different_schedules(solver, scheduler):
    """On one and the same they end alike."""
    sigmas = make_sigmas(scheduler, 5, SD)
    targets = run_teacher(Latents.of(two_peaks, latents(16)), sigmas, Teacher(scale=6), solvers=solver)
    row = distill(targets, sigmas, solver=solver)
    refinement = Refinement(targets, row, make_sigmas=schedules_of(SD))
    begun, leaders = [], []
    for stage in refinement.stage_by_stage():
        if stage.name.startswith("Jacobian 2"):
            break
        if stage.name.startswith("Jacobian 1 of "):
            leaders.append(stage.name.removeprefix("Jacobian 1 of "))
        else:
            begun.append(stage)
    students = refinement._family.starts | {each.name: each.student for each in refinement._scope.runners}
    of_start = {stage.name: tuple(students[stage.name].sigmas.round(4)) for stage in begun}
    assert len(set(of_start.values())) >= len(leaders) == 3
    assert len({of_start[name] for name in leaders}) == 3
    nearest = sorted(begun, key=lambda stage: stage.distance)
    for name in leaders:  # each is the best of its schedule
        assert name == next(stage.name for stage in nearest if of_start[stage.name] == of_start[name])


def test_what_a_refinement_with_a_race_costs_is_known_before():
    model = Counting()
    targets, sigmas = taught(latents(8), model)
    row = distill(targets, sigmas)
    teacher = plan_teacher(Latents.of(model, latents(8)), sigmas, Teacher(scale=12))
    plan = plan_refinement(teacher, row, make_sigmas=schedules_of(SD))
    assert plan.fitting > plan_refinement(teacher, row).fitting
    before = model.evaluations
    refine(targets, row, make_sigmas=schedules_of(SD))
    assert model.evaluations - before <= plan.evaluations
