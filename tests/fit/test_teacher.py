"""The teacher passes exactly through every σ of its students, and one run serves several of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dode_nodes import DodeError, Group, IneligibleSampler, Latents, Teacher, plan_teacher, run_teacher
from dode_nodes.fit.latents import root_mean_square
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.solvers import SOLVERS, sample_dpmpp_2m, sample_euler
from tests.oracles import Gaussian, two_peaks
from tests.toys import Counting, Interrupted, Telling, in_shapes, karras, latents, uniform

SIGMAS = karras(4)


def on(x, model=two_peaks, **kwargs):
    return Latents.of(model, x, **kwargs)


def grid_for(schedule, solver="euler", scale=10, flow=False):
    asked = probe_student(SOLVERS[solver], schedule).sigmas
    return Teacher(scale=scale, flow=flow).grid([asked], [schedule]).tolist()


# --- What it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-1, -3, 2.5, True, "10", None])
def test_scale_must_be_a_whole_number(scale):
    with pytest.raises(DodeError, match=f"scale must be a whole number of at least 0, got {scale}"):
        Teacher(scale=scale)


# --- The grid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("schedule", "flow"), [(karras(5), False), (uniform(5), True)], ids=["VE", "flow"])
def test_grid_visits_every_sigma_that_the_student_asks_to_the_bit(schedule, flow, solver, dtype):
    schedule = schedule.to(dtype)
    grid = Teacher(flow=flow).grid([probe_student(SOLVERS[solver], schedule).sigmas], [schedule])
    model = Counting()
    SOLVERS[solver](model, latents(1).to(dtype), schedule, disable=True)
    assert set(model.sigmas) | {0.0} <= set(grid.to(dtype).tolist())
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("scale", [1, 2, 10, 30])
def test_every_step_has_so_many_parts_equal_in_log_sigma(scale):
    schedule = karras(5)
    grid = grid_for(schedule, scale=scale)
    assert len(grid) == 5 * scale + 1
    assert grid[::scale] == schedule.tolist()
    for i in range(4):
        ratios = [low / high for high, low in pairwise(grid[i * scale : (i + 1) * scale + 1])]
        assert ratios == pytest.approx([ratios[0]] * scale)
    into_zero = [high - low for high, low in pairwise(grid[4 * scale :])]
    assert into_zero == pytest.approx([into_zero[0]] * scale)


def test_parts_are_equal_in_sigma_for_flow_models():
    assert grid_for(uniform(5), flow=True) == pytest.approx(uniform(50).tolist())


def test_inner_stages_cut_a_step_into_shares():
    """DPM-Solver-2's lie in the middle of a step in log σ: of 10 parts 5 before and 5 after; of 5, 3 and 3."""
    assert len(grid_for(karras(3), "dpm_2", 10)) == 10 + 10 + 10 + 1
    assert len(grid_for(karras(3), "dpm_2", 5)) == 6 + 6 + 5 + 1


def test_several_students_have_what_each_has():
    schedules = [karras(5), karras(8)]
    grid = Teacher(scale=10).grid([s.tolist()[:-1] for s in schedules], schedules).tolist()
    assert set(karras(5).tolist()) | set(karras(8).tolist()) <= set(grid)
    for schedule in schedules:
        for high, low in pairwise(schedule.tolist()):
            assert sum(low < sigma <= high for sigma in grid) >= 10


def test_sigmas_that_differ_by_rounding_are_one():
    """Two such grid points would make a multistep teacher divide by their difference."""
    a, b = karras(5).float().double(), karras(5)
    assert not torch.equal(a, b)
    grid = Teacher(scale=10).grid([a.tolist()[:-1], b.tolist()[:-1]], [a, b])
    assert len(grid) == 51


@pytest.mark.parametrize(
    ("steps", "scale"), [((2,), 15), ((3,), 10), ((5,), 6), ((6,), 5), ((12,), 5), ((2, 12), 5)]
)
def test_what_is_not_said_is_enough_for_any_number_of_steps(steps, scale):
    """Few steps get more parts each: 30 in all, and never fewer than 5 each."""
    schedules = [karras(n) for n in steps]
    assert Teacher().over(schedules) == Teacher(scale=scale, flow=False)
    asked = [schedule.tolist()[:-1] for schedule in schedules]
    assert Teacher().grid(asked, schedules).tolist() == Teacher(scale=scale).grid(asked, schedules).tolist()
    assert run_teacher(on(latents(1)), schedules).teacher.scale == scale


def test_what_is_said_stays():
    assert Teacher(scale=2, flow=True).over([karras(5)]) == Teacher(scale=2, flow=True)
    assert Teacher().over([uniform(5)]) == Teacher(scale=8, flow=True)
    assert Teacher().over([uniform(3)]) == Teacher(scale=10, flow=True)


@pytest.mark.parametrize("low", [1e-4, 0.001, 0.02, 0.05])
@pytest.mark.parametrize("scale", [1, 5, 8])
def test_steps_of_a_flow_model_down_to_nearly_0_halve_sigma_at_most(low, scale):
    """A multistep teacher extrapolates by how much longer a step is in log σ than the one before."""
    schedule = torch.tensor([1.0, 0.6, 0.2, low, 0.0], dtype=torch.float64)
    grid = grid_for(schedule, scale=scale, flow=True)
    assert set(schedule.tolist()) <= set(grid)
    below = grid[grid.index(0.2) : -scale]
    assert max(high / point for high, point in pairwise(below)) <= 2.0001
    assert len(below) <= scale + math.ceil(math.log2(0.2 / low)) + 1


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
def test_it_may_divide_the_steps_of_another_schedule_than_its_students(solver):
    """Its states are those of its students' σ all the same."""
    usual = karras(4)
    student = torch.tensor([float(usual[0]), 1.2, 1.0, 0.9, 0.0], dtype=torch.float64)
    model = Counting()
    plan = plan_teacher(on(latents(3), model), student, Teacher(solver, 6), along=[usual])
    grid = plan.passes[0].run.sigmas.tolist()
    assert {*student.tolist(), *usual.tolist()} <= set(grid)
    for high, low in pairwise(usual.tolist()):
        assert 6 <= sum(low < sigma <= high for sigma in grid) <= 6 + 3
    targets = plan()
    assert model.evaluations == plan.cost == targets.evaluations
    assert set(targets.states) == set(student.tolist())
    finer = run_teacher(on(latents(3)), student, Teacher(solver, 100))
    own = run_teacher(on(latents(3)), student, Teacher(solver, 6))
    of_along, of_own = (root_mean_square(each.ends[0] - finer.ends[0]) for each in (targets, own))
    assert of_along < of_own / 2


def test_another_schedule_must_begin_where_its_students_do():
    with pytest.raises(DodeError, match="must start at the same σ"):
        plan_teacher(on(latents(1)), SIGMAS, along=[2 * SIGMAS])


# --- The states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["euler", "heun", "dpm_2", "dpmpp_2m", "dpmpp_3m", "ipndm", "deis"])
@pytest.mark.parametrize("student", ["euler", "dpm_2"])
def test_targets_are_the_teachers_states(student, teacher):
    x = latents(3)
    targets = run_teacher(on(x), SIGMAS, Teacher(teacher, 4), solvers=student)
    asked = probe_student(SOLVERS[student], SIGMAS).sigmas
    grid = Teacher(scale=4).grid([asked], [SIGMAS])
    assert set(targets.states) == {*asked, 0.0}
    for sigma in (*asked, 0.0):
        prefix = grid[: grid.tolist().index(sigma) + 1]
        expected = SOLVERS[teacher](two_peaks, x, prefix, disable=True)
        torch.testing.assert_close(targets.at(sigma), [expected], rtol=1e-12, atol=1e-12)
    assert targets.ends is targets.at(0.0)
    assert (targets.teacher.name, targets.teacher.scale, targets.teacher.flow) == (teacher, 4, False)


def test_state_is_found_by_sigma_to_rounding():
    targets = run_teacher(on(latents(2)), SIGMAS, Teacher(scale=2))
    sigma = SIGMAS[1].item()
    assert targets.at(sigma * (1 + 1e-7)) is targets.at(sigma)
    with pytest.raises(DodeError, match=r"run the teacher for this schedule.* no state at σ = 1\.234"):
        targets.at(1.234)


def test_one_run_serves_several_students_as_well_as_runs_of_their_own():
    x, schedules = on(latents(4)), [SIGMAS, karras(6)]
    both = run_teacher(x, schedules, solvers=["euler", "dpm_2"])
    for schedule in schedules:
        alone = run_teacher(x, schedule, solvers="dpm_2")
        for sigma, (state,) in alone.states.items():
            assert root_mean_square(both.at(sigma)[0] - state) < 2 * alone.own_error


def test_students_with_the_same_sigmas_share_a_grid_to_the_bit():
    x = on(latents(4))
    both = run_teacher(x, SIGMAS, solvers=["euler", "heun", "ipndm"])
    alone = run_teacher(x, SIGMAS, solvers="heun")
    assert both.states.keys() == alone.states.keys()
    assert all(torch.equal(both.states[sigma][0], alone.states[sigma][0]) for sigma in alone.states)
    assert both.own_error == alone.own_error


@pytest.mark.parametrize("teacher", ["euler", "heun", "dpmpp_2m", "ipndm"])
@pytest.mark.parametrize(
    ("model", "schedule"),
    [(Gaussian(flow=False), karras(6)), (Gaussian(flow=True), uniform(6))],
    ids=["VE", "flow"],
)
def test_end_is_as_near_the_exact_solution_as_the_teacher_says(model, schedule, teacher):
    x = latents(8, sigma=float(schedule[0]))
    targets = run_teacher(on(x, model), schedule, Teacher(teacher))
    error = root_mean_square(targets.ends[0] - model.solve(x, schedule[0], schedule[-1]))
    assert targets.own_error / 20 < error < 1.5 * targets.own_error


def test_flow_is_recognised_by_where_the_schedule_begins():
    model = Counting(Gaussian(flow=True))
    subject = on(latents(1, sigma=1.0), model)
    targets = run_teacher(subject, uniform(4), Teacher("euler", 2))
    assert targets.teacher.flow is True
    assert model.sigmas[:8] == pytest.approx(uniform(8).tolist()[:-1])
    model.sigmas.clear()
    run_teacher(subject, uniform(4), Teacher("euler", 2, flow=False))
    assert model.sigmas[1] == pytest.approx(math.sqrt(0.75))


def test_evaluations_and_progress():
    """The run, and the same at half the steps on the held-out latents."""
    model, told = Counting(), Telling()
    subject = on(latents(8), model, micro_batch=3)
    plan = plan_teacher(subject, SIGMAS, Teacher(scale=10))
    assert (plan.cost, model.evaluations) == (40 * 8 + 20 * 2, 0)
    targets = run_teacher(subject, SIGMAS, Teacher(scale=10), progress=told)
    assert targets.evaluations == model.evaluations == plan.cost
    assert max(model.batches) == 3
    told.check(planned=plan.cost, spent=plan.cost)
    assert [note.done for note in told[:-1]] == torch.tensor(model.batches).cumsum(0).tolist()
    assert {(note.stage, note.total) for note in told} == {("teacher", plan.cost)}
    assert told[0].shape == (3, 2, 3, 3)


@pytest.mark.parametrize("teacher", [Teacher("heun", 3), Teacher("euler", 1), Teacher(flow=True)])
@pytest.mark.parametrize("solvers", ["euler", ["heun", "dpm_solver_3"]])
def test_it_costs_what_is_planned(solvers, teacher):
    model, told, schedules = Counting(), Telling(), [karras(5), karras(3)]
    subject = on(latents(5), model)
    plan = plan_teacher(subject, schedules, teacher, solvers=solvers)
    targets = run_teacher(subject, schedules, teacher, solvers=solvers, progress=told)
    told.check(planned=plan.cost, spent=model.evaluations)
    assert targets.evaluations == model.evaluations


def test_single_step_scale_has_no_estimate_of_its_error():
    targets = run_teacher(on(latents(4)), SIGMAS, Teacher(scale=1))
    assert targets.own_error is None
    assert targets.evaluations == 16


def test_groups_and_micro_batches_give_the_same_states():
    x = latents(6)
    whole = run_teacher(on(x), SIGMAS)
    groups = [Group(two_peaks, x[:1]), Group(two_peaks, x[1:])]
    for subject in (on(x, micro_batch=4), Latents(groups), Latents(groups, 2)):
        split = run_teacher(subject, SIGMAS)
        assert split.own_error == pytest.approx(whole.own_error, rel=1e-9)
        for sigma, (states,) in whole.states.items():
            found = torch.cat(list(split.at(sigma)))
            torch.testing.assert_close(found, states, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("shapes", [("8x8", "4x6"), ("video", "8x8")], ids=" beside ".join)
def test_groups_of_different_shapes_have_states_of_their_own(shapes, size):
    """What is run on latents of 4x2, repeated, are the same numbers repeated."""
    x = latents(6, 2, 4, 2)
    several = run_teacher(in_shapes(x, *shapes, micro_batch=size), SIGMAS)
    for sigma, (states,) in run_teacher(on(x), SIGMAS).states.items():
        expected = [group.x for group in in_shapes(states, *shapes).groups]
        torch.testing.assert_close(list(several.at(sigma)), expected, rtol=1e-9, atol=1e-12)
    for batch in several.latents.batches([1, 5]):
        assert torch.equal(several.of(batch, 0.0), several.ends[batch.place][batch.indices])


@pytest.mark.parametrize("teacher", ["dpmpp_2m", "heun", "euler"])
@pytest.mark.parametrize(
    ("model", "schedule"),
    [(Gaussian(flow=False), SIGMAS), (Gaussian(flow=True), uniform(4))],
    ids=["VE", "flow"],
)
def test_states_between_its_stops_are_reached_as_finely_as_it_ran(model, schedule, teacher):
    """On a Gaussian the state at every σ is known: it is missed by as little as at the stops, at a known cost."""
    x = latents(3, sigma=float(schedule[0]))
    targets = run_teacher(on(x, model), schedule, Teacher(teacher, 30))
    assert targets.approach(float(schedule[1]) * (1 + 1e-6)) == (float(schedule[1]), None)
    for high, low in pairwise(schedule.tolist()):
        for sigma in (0.999 * high + 0.001 * low, 0.6 * high + 0.4 * low, 0.05 * high + 0.95 * low):
            counting = Counting(model)
            (batch,) = on(x, counting).batches()
            begin, run = targets.approach(sigma)
            assert begin == high
            end = run(counting, replace(batch, x=targets.of(batch, begin)))
            exact = model.solve(x, schedule[0], torch.tensor(sigma, dtype=torch.float64))
            assert root_mean_square(end - exact) < 3 * max(targets.own_error, 1e-4)
            assert counting.evaluations <= 3 * targets.approach_cost


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_states_keep_the_latents_precision(dtype):
    targets = run_teacher(on(latents(2).to(dtype)), SIGMAS.to(dtype), Teacher(scale=4))
    assert {state.dtype for (state,) in targets.states.values()} == {dtype}
    assert len(targets.states) == 5  # a schedule in half precision, too, is cut into distinct σ


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teacher_runs_in_the_precision_of_the_schedule(dtype):
    seen = set()

    def mine(model, x, sigmas, **kwargs):
        seen.add(sigmas.dtype)
        return sample_euler(model, x, sigmas, **kwargs)

    run_teacher(on(latents(1).to(dtype)), SIGMAS.to(dtype), Teacher(mine, 2))
    assert seen == {dtype}


# --- What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schedules": []}, "at least one schedule"),
        ({"schedules": [SIGMAS, karras(4, sigma_max=10.0)]}, "must start at the same σ"),
        ({"schedules": SIGMAS[:-1]}, "must end at σ = 0"),
        ({"teacher": Teacher("dpmpp_4m")}, "no solver is called 'dpmpp_4m'"),
        ({"solvers": "ddpm"}, "no solver is called 'ddpm'"),
        ({"solver_options": {"eta": 1}}, "with these options"),
        ({"teacher": Teacher("dpm_solver_3")}, "does not evaluate the network at every σ"),
    ],
)
def test_wrong_input_is_refused_before_any_evaluation(changes, why):
    model = Counting()
    arguments = {"latents": on(latents(2), model), "schedules": SIGMAS} | changes
    for start in (run_teacher, plan_teacher):
        with pytest.raises(DodeError, match=why):
            start(**arguments)
    assert model.evaluations == 0


def test_nan_of_the_model_is_told():
    def fails_late(x, sigma):
        return two_peaks(x, sigma) / (sigma[0] > 1)

    with pytest.raises(DodeError, match=r"NaN or infinite values at σ = 0\..* \(teacher\)"):
        run_teacher(on(latents(2), fails_late), SIGMAS)


def test_interruption_passes_unchanged():
    stop = Interrupted()

    def interrupt(progress):
        if progress.done > 10:
            raise stop

    with pytest.raises(Interrupted) as caught:
        run_teacher(on(latents(2)), SIGMAS, progress=interrupt)
    assert caught.value is stop


def test_teacher_of_ones_own():
    def mine(model, x, sigmas, **kwargs):
        return sample_dpmpp_2m(model, x, sigmas, **kwargs)

    targets = run_teacher(on(latents(2)), SIGMAS, Teacher(mine))
    assert targets.teacher.name == "<mine>"
    assert torch.equal(targets.ends[0], run_teacher(on(latents(2)), SIGMAS).ends[0])


def test_half_as_fine_teacher_is_probed_too():
    """One that fails on few steps only is refused before the long run, not after it."""

    def needs_forty(model, x, sigmas, **kwargs):
        if len(sigmas) < 40:
            raise ValueError("too few")
        return sample_euler(model, x, sigmas, **kwargs)

    model = Counting()
    with pytest.raises(IneligibleSampler, match="too few"):
        run_teacher(on(latents(2), model), SIGMAS, Teacher(needs_forty))
    assert model.evaluations == 0
