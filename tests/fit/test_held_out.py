"""The held-out check: what λ does where it was not fitted, and that it does no harm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dode_nodes import Group, Latents, Progress, Teacher, distill, run_teacher, sample_dode
from dode_nodes.fit.evaluator import Evaluator
from dode_nodes.fit.held_out import SHRINKS, HeldOut, later_starts_cost, no_harm, with_later_starts
from dode_nodes.fit.latents import root_mean_square
from dode_nodes.fit.runs import Recording, Run
from dode_nodes.sampling.denoiser import dode_corrections
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.solvers import SOLVERS
from tests.oracles import Gaussian, expand, two_peaks
from tests.toys import Counting, Telling, distilled, karras, latents

SIGMAS = karras(5)


def ripple(frequency):
    """A denoiser of another kind than the closed forms: dx/dσ = sin(frequency · log σ), whatever x."""

    def denoise(x, sigma):
        sigma = expand(sigma, x)
        return x - sigma * torch.sin(frequency * sigma.log())

    return denoise


def fitted_elsewhere(model, count=6):
    """λ is fitted on a Gaussian; what is held out is one latent of this model."""
    return Latents([Group(Gaussian(flow=False), latents(count)), Group(model, latents(1, seed=3))])


def watched(evaluations=10**6):
    return Evaluator(Progress(evaluations))


def test_errors_after_each_step_are_distances_to_the_teacher():
    """Of the stock solver and the D-solver, on the held-out latents, at every σ of the schedule."""
    x = latents(8)
    targets = run_teacher(Latents.of(two_peaks, x), SIGMAS)
    row = distill(targets, SIGMAS)
    after = row.report["after_steps"]
    for name, chosen in (("stock", None), ("dode", row)):
        for step in range(1, 6):
            end = sample_dode(two_peaks, x[6:], SIGMAS[: step + 1], disable=True, row=chosen)
            expected = root_mean_square(end - targets.at(SIGMAS[step].item())[0][6:])
            assert after[name][step - 1] == pytest.approx(expected, rel=1e-9)
    assert (row.errors.stock, row.errors.dode[0]) == (after["stock"][-1], after["dode"][-1])
    assert row.errors.latents == 2


def test_merged_steps_have_no_error_of_their_own():
    sigmas = karras(7)
    subject = Latents.of(two_peaks, latents(4))
    row = distilled(subject, sigmas, solver="dpm_solver_3", teacher=Teacher(scale=4))
    after = row.report["after_steps"]
    assert [value is None for value in after["dode"]] == [True, True, False, True, True, False, False]
    assert [value is None for value in after["stock"]] == [value is None for value in after["dode"]]


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_solver_3"])
@pytest.mark.parametrize("size", [None, 1, 3])
def test_recorded_errors_are_those_of_a_run(solver, size):
    x = latents(8)
    subject = Latents([Group(two_peaks, x[:3]), Group(two_peaks, x[3:])], size)
    run = Run(SOLVERS[solver], SIGMAS)
    queries = probe_student(run.solver, SIGMAS)
    n = len(queries.sigmas)
    corrections = dode_corrections(np.linspace(0, 0.4, n))
    recordings = [Recording(run, batch, "noise") for batch in subject.batches()]
    for recording in recordings:
        for _ in range(n):
            recording.evaluate(two_peaks, corrections)
    targets = run_teacher(subject, SIGMAS, Teacher(scale=4), solvers=solver)
    check = HeldOut(run, queries, "noise", targets, watched())
    recorded, again = check.recorded_errors(corrections, recordings), check.errors(corrections, "again")
    assert [value is None for value in recorded] == [value is None for value in again]
    assert [v for v in recorded if v] == pytest.approx([v for v in again if v], rel=1e-9)
    assert check.errors(0 * corrections, "stock") != again


def test_lambda_that_helps_is_kept_whole():
    row = distilled(Latents.of(two_peaks, latents(8)), SIGMAS)
    assert row.report["shrunk_to"] == 1.0
    assert row.error_from() < row.errors.stock
    assert "shrinking" not in row.report["evaluations"]


@pytest.mark.parametrize(("frequency", "part"), [(2.0, 1.0), (5.0, 0.0)])
def test_lambda_that_harms_elsewhere_is_given_up(frequency, part):
    """Fitted on one kind of model, checked on another."""
    row = distilled(fitted_elsewhere(ripple(frequency)), SIGMAS)
    elsewhere = Latents.of(Gaussian(flow=False), latents(6))
    fitted = distilled(elsewhere, SIGMAS).weights  # nearly: with one latent less
    if part:
        assert 0 < row.report["shrunk_to"] <= part
        assert row.error_from() < row.errors.stock
        np.testing.assert_allclose(row.weights, row.report["shrunk_to"] * fitted, rtol=1e-6)
    else:
        assert row.report["shrunk_to"] == 0.0
        assert not row.weights.any()
        assert row.report["after_steps"]["dode"] == row.report["after_steps"]["stock"]
        assert row.error_from() == row.errors.stock


def test_part_of_lambda_that_is_kept_is_the_best_one():
    subject = fitted_elsewhere(Gaussian(flow=False, std=2.0))
    group = subject.groups[1]
    row = distilled(subject, SIGMAS)
    assert row.report["shrunk_to"] in SHRINKS
    whole = row.weights / row.report["shrunk_to"]
    targets = run_teacher(subject, SIGMAS)

    def error(part):
        corrected = type(row)("euler", row.sigmas, row.evaluations, part * whole)
        end = sample_dode(group.model, group.x, SIGMAS, disable=True, row=corrected)
        return root_mean_square(end - targets.ends[1])

    errors = {part: error(part) for part in (*SHRINKS, 0.0, 1.0)}
    assert errors[1.0] > errors[0.0]
    assert min(errors, key=errors.get) == row.report["shrunk_to"]
    assert row.error_from() == pytest.approx(min(errors.values()), rel=1e-9)


def test_lambda_without_effect_is_not_kept():
    """No better than the stock solver is not good enough: here every output is the one before it again."""
    subject = fitted_elsewhere(lambda x, sigma: torch.full_like(x, 0.5))
    row = distilled(subject, SIGMAS, prediction="data")
    assert row.report["shrunk_to"] == 0.0
    assert not row.weights.any()


def test_search_is_counted_and_announced():
    told, model, other = Telling(), Counting(ripple(5.0)), Counting(Gaussian(flow=False))
    subject = Latents([Group(other, latents(6)), Group(model, latents(1, seed=3))])
    targets = run_teacher(subject, SIGMAS)
    row = distill(targets, SIGMAS, progress=told)
    spent = row.report["evaluations"]
    assert spent == {
        "teacher": 30 * 7 + 15, "student": 5 * 7, "stock": 5, "shrinking": 15, "later starts": 2 * (4 + 3 + 2 + 1)
    }  # fmt: skip
    assert sum(spent.values()) == model.evaluations + other.evaluations
    told.check(planned=sum(spent.values()) - spent["teacher"], spent=sum(spent.values()) - spent["teacher"])
    stages = list(dict.fromkeys(note.stage for note in told))
    assert stages == ["student", "stock solver", "shrinking λ", "later starts"]


def test_verdict_in_numbers():
    """no_harm by itself: stock, the whole, and what it cost."""
    model = Counting()
    targets = run_teacher(Latents.of(model, latents(4)), SIGMAS)
    run = Run(SOLVERS["euler"], SIGMAS)
    (batch,) = targets.latents.batches()
    corrections = dode_corrections(np.array([0, 0.3, 0.3, 0.3, 0.1]))
    recording = Recording(run, batch, "noise")
    for _ in range(5):
        recording.evaluate(model, corrections)
    queries, before = probe_student(run.solver, SIGMAS), model.evaluations
    verdict = no_harm(HeldOut(run, queries, "noise", targets, watched()), corrections, [recording])
    assert verdict.shrunk_to == 1.0
    assert verdict.evaluations == {"stock": 5}
    assert model.evaluations - before == 5
    assert verdict.dode[-1] < verdict.stock[-1]


def test_the_scatter_of_lambda_is_shrunk_with_it():
    subject = fitted_elsewhere(Gaussian(flow=False, std=2.0))
    shrunk = distilled(subject, SIGMAS)
    part = shrunk.report["shrunk_to"]
    assert 0 < part < 1
    helps = Latents([subject.groups[0], Group(Gaussian(flow=False), latents(1, seed=3))])
    whole = distilled(helps, SIGMAS)  # fitted on the same latents
    assert whole.report["shrunk_to"] == 1
    assert whole.report["lambda_standard_error"][0] is shrunk.report["lambda_standard_error"][0] is None
    np.testing.assert_allclose(
        shrunk.report["lambda_standard_error"][1:],
        part * np.array(whole.report["lambda_standard_error"][1:]),
        rtol=1e-6,
    )
    np.testing.assert_allclose(shrunk.weights, part * whole.weights, rtol=1e-6)


# --- Later starts -------------------------------------------------------------------------------------


def by_hand(row, targets, step):
    """The held-out error of a run from the teacher's states at the row's σ on."""
    squares = []
    for batch in targets.latents.batches(targets.latents.held_out):
        start = targets.of(batch, float(row.sigmas[step]))
        end = sample_dode(batch.group.model, start, row.sigmas[step:], disable=True, row=row)
        squares.append(torch.square(end - targets.of(batch, 0.0)).flatten(1).mean(1))
    return float(torch.cat(squares).mean().sqrt())


@pytest.mark.parametrize(("prediction", "size"), [("noise", None), ("data", 1)])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "ipndm", "dpm_solver_3"])
def test_later_starts_are_runs_from_the_teachers_states(solver, prediction, size):
    sigmas = karras(7 if solver == "dpm_solver_3" else 4)
    groups = [Group(two_peaks, latents(3)), Group(Gaussian(flow=False), latents(6, 1, 4, seed=1))]
    targets = run_teacher(Latents(groups, size), sigmas, Teacher(scale=2), solvers=solver)
    row = distill(targets, sigmas, solver=solver, prediction=prediction)
    assert row.errors.latents == 2
    for each in (row, row.plain):
        for step, error in enumerate(each.errors.dode):
            if each.evaluations[step]:
                assert error == pytest.approx(by_hand(each, targets, step), rel=1e-9)
            else:
                assert error is None
    if solver == "dpm_solver_3":
        assert [error is None for error in row.errors.dode] == [False, True, True, False, True, True, False]


def test_last_step_from_the_teachers_state_misses_what_one_evaluation_misses():
    """Euler's last step gives the denoised, which on a Gaussian is known, and so is the teacher's end."""
    model, sigmas = Gaussian(flow=False), karras(4)
    targets = run_teacher(Latents.of(model, latents(8)), sigmas, Teacher(scale=60))
    row = distill(targets, sigmas, prediction="data")
    assert row.weights[-1] != 0  # and has no effect there: the first evaluation of a run is not corrected
    x, last = latents(8)[6:], sigmas[-2]
    denoised = model(model.solve(x, sigmas[0], last), last.expand(2))
    exact = model.solve(x, sigmas[0], sigmas[-1])
    assert row.errors.dode[-1] == pytest.approx(root_mean_square(denoised - exact), rel=0.02)


def test_a_start_that_the_network_does_not_stand_has_no_error():
    """And the row that has been found is not lost."""
    model = Counting()
    targets = run_teacher(Latents.of(model, latents(4)), SIGMAS)
    row = distill(targets, SIGMAS)
    asked, alone = iter(range(10**6)), SOLVERS["euler"]

    def overflows(x, sigma):
        return two_peaks(x, sigma) * (float("nan") if next(asked) == 5 else 1)

    of_another = replace(targets, latents=Latents.of(overflows, latents(4)))
    unmeasured = replace(row, errors=replace(row.errors, dode=(row.error_from(), *[None] * 4)))
    again = with_later_starts(of_another, unmeasured, alone, Progress(20))
    assert again.errors.dode == (*row.errors.dode[:2], None, *row.errors.dode[3:])
    assert again.errors.later_stock == row.errors.later_stock
    assert next(asked) == 20 - 1  # one run was cut short by one evaluation


def test_later_starts_cost_what_they_are_planned_as():
    subject = Latents.of(two_peaks, latents(8))
    assert later_starts_cost(subject, (1, 1, 1, 1)) == 2 * (3 + 2 + 1)
    assert later_starts_cost(subject, (2, 2, 1)) == 2 * (3 + 1)
    assert later_starts_cost(subject, (3, 0, 0, 1)) == 2 * 1
    assert later_starts_cost(subject, (1, 1, 1), approach=10) == 2 * (12 + 11)
    assert later_starts_cost(subject, (1,)) == 0
    assert later_starts_cost(Latents.of(two_peaks, latents(1)), (1, 1)) == 0
