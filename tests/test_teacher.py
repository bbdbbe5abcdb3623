"""The teacher passes exactly through every σ of its students, and one run serves several of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from dode_nodes.errors import DodeError, IneligibleSampler
from dode_nodes.groups import Group, root_mean_square
from dode_nodes.probe import probe_student
from dode_nodes.solvers import SOLVERS, sample_dpmpp_2m, sample_euler
from dode_nodes.teacher import refined_grid, run_teacher
from tests.oracles import Gaussian, two_peaks
from tests.toys import Counting, Interrupted, karras, latents, uniform


def grid_for(schedule, solver="euler", scale=10, flow=False):
    return refined_grid([probe_student(SOLVERS[solver], schedule).sigmas], [schedule], scale, flow).tolist()


# --- The grid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("schedule", "flow"), [(karras(5), False), (uniform(5), True)], ids=["VE", "flow"])
def test_grid_visits_every_sigma_that_the_student_asks_to_the_bit(schedule, flow, solver, dtype):
    schedule = schedule.to(dtype)
    grid = refined_grid([probe_student(SOLVERS[solver], schedule).sigmas], [schedule], 10, flow)
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
    grid = refined_grid([s.tolist()[:-1] for s in schedules], schedules, 10, flow=False).tolist()
    assert set(karras(5).tolist()) | set(karras(8).tolist()) <= set(grid)
    for schedule in schedules:
        for high, low in pairwise(schedule.tolist()):
            assert sum(low < sigma <= high for sigma in grid) >= 10


def test_sigmas_that_differ_by_rounding_are_one():
    """Two such grid points would make a multistep teacher divide by their difference."""
    a, b = karras(5).float().double(), karras(5)
    assert not torch.equal(a, b)
    grid = refined_grid([a.tolist()[:-1], b.tolist()[:-1]], [a, b], 10, flow=False)
    assert len(grid) == 51


# --- The states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["euler", "heun", "dpm_2", "dpmpp_2m", "dpmpp_3m", "ipndm", "deis"])
@pytest.mark.parametrize("student", ["euler", "dpm_2"])
def test_targets_are_the_teachers_states(student, teacher):
    schedule, x = karras(4), latents(3)
    targets = run_teacher(two_peaks, x, schedule, solvers=student, teacher=teacher, scale=4)
    asked = probe_student(SOLVERS[student], schedule).sigmas
    grid = refined_grid([asked], [schedule], 4, flow=False)
    assert set(targets.states) == {*asked, 0.0}
    for sigma in (*asked, 0.0):
        prefix = grid[: grid.tolist().index(sigma) + 1]
        expected = SOLVERS[teacher](two_peaks, x, prefix, disable=True)
        torch.testing.assert_close(targets.at(sigma), expected, rtol=1e-12, atol=1e-12)
    assert targets.teacher == teacher
    assert targets.scale == 4


def test_state_is_found_by_sigma_to_rounding():
    targets = run_teacher(two_peaks, latents(2), karras(4), scale=2)
    sigma = karras(4)[1].item()
    assert targets.at(sigma * (1 + 1e-7)) is targets.at(sigma)
    with pytest.raises(DodeError, match=r"no state at σ = 1\.234.* run the teacher for this schedule"):
        targets.at(1.234)


def test_one_run_serves_several_students_as_well_as_runs_of_their_own():
    x, schedules = latents(4), [karras(4), karras(6)]
    both = run_teacher(two_peaks, x, schedules, solvers=["euler", "dpm_2"])
    for schedule in schedules:
        alone = run_teacher(two_peaks, x, schedule, solvers="dpm_2")
        for sigma, state in alone.states.items():
            assert root_mean_square(both.at(sigma) - state) < 2 * alone.own_error


def test_students_with_the_same_sigmas_share_a_grid_to_the_bit():
    x = latents(4)
    both = run_teacher(two_peaks, x, karras(4), solvers=["euler", "heun", "ipndm"])
    alone = run_teacher(two_peaks, x, karras(4), solvers="heun")
    assert both.states.keys() == alone.states.keys()
    assert all(torch.equal(both.states[sigma], alone.states[sigma]) for sigma in alone.states)
    assert both.own_error == alone.own_error


@pytest.mark.parametrize("teacher", ["euler", "heun", "dpmpp_2m", "ipndm"])
@pytest.mark.parametrize(
    ("model", "schedule"),
    [(Gaussian(flow=False), karras(6)), (Gaussian(flow=True), uniform(6))],
    ids=["VE", "flow"],
)
def test_end_is_as_near_the_exact_solution_as_the_teacher_says(model, schedule, teacher):
    x = latents(8, sigma=float(schedule[0]))
    targets = run_teacher(model, x, schedule, teacher=teacher)
    error = root_mean_square(targets.at(0.0) - model.solve(x, schedule[0], schedule[-1]))
    assert targets.own_error / 20 < error < 1.5 * targets.own_error


def test_flow_is_recognised_by_where_the_schedule_begins():
    model, x = Counting(Gaussian(flow=True)), latents(1, sigma=1.0)
    run_teacher(model, x, uniform(4), teacher="euler", scale=2)
    assert model.sigmas[:8] == pytest.approx(uniform(8).tolist()[:-1])
    model.sigmas.clear()
    run_teacher(model, x, uniform(4), teacher="euler", scale=2, flow=False)
    assert model.sigmas[1] == pytest.approx(math.sqrt(0.75))


def test_evaluations_and_progress():
    """The run, and the same at half the steps on the held-out latents."""
    model, told = Counting(), []
    targets = run_teacher(model, latents(8), karras(4), micro_batch=3, progress=told.append)
    assert targets.evaluations == model.evaluations == 40 * 8 + 20 * 2
    assert max(model.batches) == 3
    assert [p.done for p in told] == sorted({p.done for p in told})
    assert {(p.stage, p.total) for p in told} == {("teacher", 360)}
    assert told[-1].done == 360
    assert told[0].denoised.shape == (3, 2, 3, 3)


def test_single_step_scale_has_no_estimate_of_its_error():
    targets = run_teacher(Counting(), latents(4), karras(4), scale=1)
    assert targets.own_error is None
    assert targets.evaluations == 16


def test_groups_and_micro_batches_give_the_same_states():
    x = latents(6)
    whole = run_teacher(two_peaks, x, karras(4))
    groups = [Group(two_peaks, x[:1]), Group(two_peaks, x[1:])]
    for split in (run_teacher(two_peaks, x, karras(4), micro_batch=4), run_teacher(groups, None, karras(4))):
        assert torch.equal(split.x, whole.x)
        for sigma in whole.states:
            torch.testing.assert_close(split.at(sigma), whole.at(sigma), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_states_keep_the_latents_precision(dtype):
    targets = run_teacher(two_peaks, latents(2).to(dtype), karras(4).to(dtype), scale=4)
    assert {state.dtype for state in targets.states.values()} == {dtype}
    assert len(targets.states) == 5  # a schedule in half precision, too, is cut into distinct σ


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teacher_runs_in_the_precision_of_the_schedule(dtype):
    seen = set()

    def mine(model, x, sigmas, **kwargs):
        seen.add(sigmas.dtype)
        return sample_euler(model, x, sigmas, **kwargs)

    run_teacher(two_peaks, latents(1).to(dtype), karras(4).to(dtype), teacher=mine, scale=2)
    assert seen == {dtype}


# --- What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schedules": []}, "no schedule"),
        ({"schedules": [karras(4), karras(4, sigma_max=10.0)]}, "begin at different σ"),
        ({"schedules": karras(4)[:-1]}, "ends at σ = 0"),
        ({"scale": 0}, "scale must be a whole number of at least 1, got 0"),
        ({"scale": 2.5}, r"got 2\.5"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"teacher": "dpmpp_4m"}, "no solver is called 'dpmpp_4m'"),
        ({"solvers": "ddpm"}, "no solver is called 'ddpm'"),
        ({"solver_options": {"eta": 1}}, "not with these options"),
        ({"x": latents(2) / 0}, "NaN or infinite"),
        ({"teacher": "dpm_solver_3"}, "does not ask every σ"),
    ],
)
def test_wrong_input_is_refused_before_any_evaluation(changes, why):
    model = Counting()
    arguments = {"x": latents(2), "schedules": karras(4)} | changes
    with pytest.raises(DodeError, match=why):
        run_teacher(model, **arguments)
    assert model.evaluations == 0


def test_nan_of_the_model_is_told():
    def fails_late(x, sigma):
        return two_peaks(x, sigma) / (sigma[0] > 1)

    with pytest.raises(DodeError, match=r"NaN or infinite values at σ = 0\..* \(teacher\)"):
        run_teacher(fails_late, latents(2), karras(4))


def test_interruption_passes_unchanged():
    stop = Interrupted()

    def interrupt(progress):
        if progress.done > 10:
            raise stop

    with pytest.raises(Interrupted) as caught:
        run_teacher(two_peaks, latents(2), karras(4), progress=interrupt)
    assert caught.value is stop


def test_teacher_of_ones_own():
    def mine(model, x, sigmas, **kwargs):
        return sample_dpmpp_2m(model, x, sigmas, **kwargs)

    targets = run_teacher(two_peaks, latents(2), karras(4), teacher=mine)
    assert targets.teacher == "<mine>"
    assert torch.equal(targets.at(0.0), run_teacher(two_peaks, latents(2), karras(4)).at(0.0))


def test_half_as_fine_teacher_is_probed_too():
    """One that fails on few steps only is refused before the long run, not after it."""

    def needs_forty(model, x, sigmas, **kwargs):
        if len(sigmas) < 40:
            raise ValueError("too few")
        return sample_euler(model, x, sigmas, **kwargs)

    model = Counting()
    with pytest.raises(IneligibleSampler, match="too few"):
        run_teacher(model, latents(2), karras(4), teacher=needs_forty)
    assert model.evaluations == 0
