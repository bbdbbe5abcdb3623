"""The held-out check: what λ does where it was not fitted, and that it does no harm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dode_nodes.denoiser import dode_corrections
from dode_nodes.distill import distill
from dode_nodes.groups import Evaluator, Group, held_out, micro_batches, root_mean_square
from dode_nodes.probe import probe_student
from dode_nodes.report import SHRINKS, HeldOut, no_harm
from dode_nodes.runs import Recording, Run
from dode_nodes.sample import sample_dode
from dode_nodes.solvers import SOLVERS
from dode_nodes.teacher import run_teacher
from tests.oracles import Gaussian, expand, two_peaks
from tests.toys import Counting, karras, latents

SIGMAS = karras(5)


def ripple(frequency):
    """A denoiser of another kind than the closed forms: dx/dσ = sin(frequency · log σ), whatever x."""

    def denoise(x, sigma):
        sigma = expand(sigma, x)
        return x - sigma * torch.sin(frequency * sigma.log())

    return denoise


def fitted_elsewhere(model, count=6):
    """λ is fitted on a Gaussian; what is held out is one latent of this model."""
    return [Group(Gaussian(flow=False), latents(count)), Group(model, latents(1, seed=3))]


def test_errors_after_each_step_are_distances_to_the_teacher():
    """Of the stock solver and the D-solver, on the held-out latents, at every σ of the schedule."""
    x = latents(8)
    targets = run_teacher(two_peaks, x, SIGMAS)
    row = distill(two_peaks, x, SIGMAS, targets=targets)
    error = row.report["error"]
    for name, chosen in (("stock", None), ("dode", row)):
        for step in range(1, 6):
            end = sample_dode(two_peaks, x[6:], SIGMAS[: step + 1], disable=True, row=chosen)
            expected = root_mean_square(end - targets.at(SIGMAS[step].item())[6:])
            assert error[name][step - 1] == pytest.approx(expected, rel=1e-9)
        assert error[f"{name}_end"] == error[name][-1]


def test_merged_steps_have_no_error_of_their_own():
    sigmas = karras(7)
    error = distill(two_peaks, latents(4), sigmas, solver="dpm_solver_3", scale=4).report["error"]
    assert [value is None for value in error["dode"]] == [True, True, False, True, True, False, False]
    assert [value is None for value in error["stock"]] == [value is None for value in error["dode"]]


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_solver_3"])
@pytest.mark.parametrize("size", [None, 1, 3])
def test_recorded_errors_are_those_of_a_run(solver, size):
    x = latents(8)
    groups = [Group(two_peaks, x[:3]), Group(two_peaks, x[3:])]
    run = Run(SOLVERS[solver], SIGMAS)
    queries = probe_student(run.solver, SIGMAS)
    n = len(queries.sigmas)
    corrections = dode_corrections(np.linspace(0, 0.4, n))
    recordings = [Recording(run, batch, "noise") for batch in micro_batches(groups, size)]
    for recording in recordings:
        for _ in range(n):
            recording.evaluate(two_peaks, corrections)
    targets = run_teacher(groups, None, SIGMAS, solvers=solver, scale=4)
    held = micro_batches(groups, size, only=held_out(groups))
    check = HeldOut(run, queries, "noise", targets, held_out(groups), held, Evaluator())
    recorded, again = check.recorded_errors(corrections, recordings), check.errors(corrections, "again")
    assert [value is None for value in recorded] == [value is None for value in again]
    assert [v for v in recorded if v] == pytest.approx([v for v in again if v], rel=1e-9)
    assert check.errors(0 * corrections, "stock") != again


def test_lambda_that_helps_is_kept_whole():
    report = distill(two_peaks, latents(8), SIGMAS).report
    assert report["shrunk_to"] == 1.0
    assert report["error"]["dode_end"] < report["error"]["stock_end"]
    assert "shrinking" not in report["evaluations"]


@pytest.mark.parametrize(("frequency", "part"), [(2.0, 1.0), (5.0, 0.0)])
def test_lambda_that_harms_elsewhere_is_given_up(frequency, part):
    """Fitted on one kind of model, checked on another."""
    row = distill(fitted_elsewhere(ripple(frequency)), None, SIGMAS)
    fitted = distill(Gaussian(flow=False), latents(6), SIGMAS).weights  # nearly: with one latent less
    if part:
        assert 0 < row.report["shrunk_to"] <= part
        assert row.report["error"]["dode_end"] < row.report["error"]["stock_end"]
        np.testing.assert_allclose(row.weights, row.report["shrunk_to"] * fitted, rtol=1e-6)
    else:
        assert row.report["shrunk_to"] == 0.0
        assert not row.weights.any()
        assert row.report["error"]["dode"] == row.report["error"]["stock"]


def test_part_of_lambda_that_is_kept_is_the_best_one():
    groups = fitted_elsewhere(Gaussian(flow=False, std=2.0))
    row = distill(groups, None, SIGMAS)
    assert row.report["shrunk_to"] in SHRINKS
    whole = row.weights / row.report["shrunk_to"]
    targets = run_teacher(groups, None, SIGMAS)

    def error(part):
        corrected = type(row)("euler", row.sigmas, row.evaluations, part * whole)
        end = sample_dode(groups[1].model, groups[1].x, SIGMAS, disable=True, row=corrected)
        return root_mean_square(end - targets.at(0.0)[6:])

    errors = {part: error(part) for part in (*SHRINKS, 0.0, 1.0)}
    assert errors[1.0] > errors[0.0]
    assert min(errors, key=errors.get) == row.report["shrunk_to"]
    assert row.report["error"]["dode_end"] == pytest.approx(min(errors.values()), rel=1e-9)


def test_lambda_without_effect_is_not_kept():
    """No better than the stock solver is not good enough: here every output is the one before it again."""
    groups = fitted_elsewhere(lambda x, sigma: torch.full_like(x, 0.5))
    row = distill(groups, None, SIGMAS, prediction="data")
    assert row.report["shrunk_to"] == 0.0
    assert not row.weights.any()


def test_search_is_counted_and_announced():
    told, model = [], Counting(ripple(5.0))
    groups = fitted_elsewhere(model)
    groups[0] = Group(Counting(groups[0].model), groups[0].x)
    row = distill(groups, None, SIGMAS, progress=told.append)
    spent = row.report["evaluations"]
    assert spent == {"teacher": 50 * 7 + 25, "student": 5 * 7, "stock": 5, "shrinking": 15}
    assert sum(spent.values()) == model.evaluations + groups[0].model.evaluations
    assert told[-1].done == told[-1].total == sum(spent.values())
    assert {p.total for p in told if p.stage == "shrinking λ"} == {sum(spent.values())}
    assert {p.stage for p in told} == {"teacher", "student", "stock solver", "shrinking λ"}


def test_verdict_in_numbers():
    """no_harm by itself: stock, the whole, and what it cost."""
    x = latents(4)
    run, model = Run(SOLVERS["euler"], SIGMAS), Counting()
    queries, targets = probe_student(run.solver, SIGMAS), run_teacher(two_peaks, x, SIGMAS)
    (batch,) = micro_batches([Group(model, x)], None)
    corrections = dode_corrections(np.array([0, 0.3, 0.3, 0.3, 0.1]))
    recording = Recording(run, batch, "noise")
    for _ in range(5):
        recording.evaluate(model, corrections)
    held = micro_batches([Group(model, x)], None, only=[3])
    verdict = no_harm(
        HeldOut(run, queries, "noise", targets, [3], held, Evaluator()), corrections, [recording]
    )
    assert verdict.shrunk_to == 1.0
    assert verdict.evaluations == {"stock": 5}
    assert verdict.dode[-1] < verdict.stock[-1]
    assert verdict.to_json()["error"]["stock_end"] == verdict.stock[-1]
