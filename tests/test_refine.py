"""Refinement: it helps on unseen latents, does no harm, costs at most what it says, and loses nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dode_nodes import (
    Group,
    LambdaRow,
    LambdaTable,
    distill,
    plan_refinement,
    refine,
    run_teacher,
    sample_dode,
)
from dode_nodes.errors import DodeError, IneligibleSampler
from dode_nodes.groups import held_out, root_mean_square
from dode_nodes.refine import FEW_LATENTS, JACOBIANS
from dode_nodes.solvers import SOLVERS, sample_dpm_2, sample_euler
from tests.oracles import Gaussian, two_peaks
from tests.toys import Counting, Interrupted, karras, latents, uniform, writes_into_what_it_is_given

SIGMAS = karras(4)


def row_of(solver="euler", sigmas=SIGMAS, weights=None, evaluations=None, **fields):
    """A row of zeros, which is the plain solver, unless weights are given."""
    evaluations = evaluations or (1,) * (len(sigmas) - 1)
    weights = np.zeros(sum(evaluations)) if weights is None else weights
    return LambdaRow(solver, np.asarray(sigmas), evaluations, weights, **fields)


def errors_of(row, x, targets, model=two_peaks, solver=None):
    """RMS distance to the teacher on the latents held out of the fit."""
    held = held_out([Group(model, x)])
    end = sample_dode(model, x[held], row.sigmas, disable=True, row=row, solver=solver)
    return root_mean_square(end - targets.at(0.0)[held])


def stages(row):
    return {stage["stage"]: stage for stage in row.report["refined"]["stages"]}


# --- What it is for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmas", [SIGMAS, uniform(5)], ids=["karras", "flow"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "ipndm"])
def test_refined_is_far_nearer_on_unseen_latents(solver, sigmas):
    x, fresh = (latents(count, sigma=float(sigmas[0]), seed=seed) for count, seed in ((16, 0), (32, 1)))
    row = distill(two_peaks, x, sigmas, solver=solver)
    refined = refine(two_peaks, x, row)
    exact = run_teacher(two_peaks, fresh, sigmas, scale=60).at(0.0)
    before, after = (
        root_mean_square(sample_dode(two_peaks, fresh, r.sigmas, disable=True, row=r) - exact)
        for r in (row, refined)
    )
    assert after < 0.7 * before
    assert (refined.solver, refined.form, refined.prediction, refined.nfe) == (
        "euler",
        "history",
        "noise",
        row.nfe,
    )


def test_a_linear_ode_is_solved_by_the_weights_alone():
    """On a Gaussian every state is a line through x_T: some W ends exactly where the teacher does."""
    model, x = Gaussian(flow=False), latents(12)
    row = distill(model, x, SIGMAS)
    refined = refine(model, x, row, scale=20)
    assert refined.report["error"]["dode_end"] < 1e-3 * refined.report["error"]["stock_end"]


@pytest.mark.parametrize(("solver", "sampler"), [("heun", None), ("<dpm_2>", sample_dpm_2)])
def test_several_stages_keep_solver_and_schedule(solver, sampler):
    x = latents(12)
    row = distill(two_peaks, x, SIGMAS, solver=sampler or solver)
    refined = refine(two_peaks, x, row, solver=sampler)
    assert (refined.solver, refined.form, refined.evaluations) == (row.solver, "lambda", row.evaluations)
    assert np.array_equal(refined.sigmas, row.sigmas)
    assert not np.array_equal(refined.weights, row.weights)
    assert stages(refined)["row given"]["held_out_error"] > refined.report["error"]["dode_end"]


# --- No harm ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10_000),
    solver=st.sampled_from(["euler", "dpmpp_2m", "ipndm", "deis", "heun"]),
    prediction=st.sampled_from(["noise", "data"]),
    scale=st.floats(0, 3),
)
def test_never_worse_than_what_was_given_nor_the_plain_solver(seed, solver, prediction, scale):
    x = latents(5, seed=seed)
    evaluations = (2, 2, 1) if solver == "heun" else (1, 1, 1)
    lambdas = np.random.default_rng(seed).normal(0, scale, sum(evaluations))
    sigmas = karras(3)
    row = row_of(solver, sigmas, lambdas, evaluations, prediction=prediction)
    targets = run_teacher(two_peaks, x, sigmas, solvers=solver, scale=4)
    refined = refine(two_peaks, x, row, targets=targets)
    kept = errors_of(refined, x, targets)
    for other in (row, replace(row, weights=0 * lambdas)):
        assert kept <= errors_of(other, x, targets) * (1 + 1e-9)


def test_what_the_fit_makes_worse_on_unseen_latents_comes_back_as_it_was():
    x = latents(8)
    row = distill(two_peaks, x, SIGMAS)
    targets = run_teacher(two_peaks, x, SIGMAS)
    ends = sample_dode(two_peaks, x, row.sigmas, disable=True, row=row) + 0.5
    held = held_out([Group(two_peaks, x)])
    ends[held] -= 0.5  # the row is perfect on them, and on no others
    refined = refine(two_peaks, x, row, targets=replace(targets, states={0.0: ends}))
    assert refined.report["refined"]["kept"] == "row given"
    assert (refined.solver, refined.form) == (row.solver, row.form)
    assert np.array_equal(refined.weights, row.weights)
    assert refined.report["error"] == row.report["error"]


def test_harmful_weights_are_dropped():
    x = latents(8)
    row = row_of(weights=np.array([0, 9.0, -9.0, 9.0]))
    refined = refine(two_peaks, x, row)
    report = stages(refined)
    assert report["row given"]["held_out_error"] > report["plain solver"]["held_out_error"]
    assert refined.report["error"]["dode_end"] < report["plain solver"]["held_out_error"]


# --- What is reported ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
def test_report_says_what_sampling_shows(solver):
    x = latents(9)
    targets = run_teacher(two_peaks, x, SIGMAS, solvers=solver)
    row = distill(two_peaks, x, SIGMAS, solver=solver, targets=targets)
    refined = refine(two_peaks, x, row, targets=targets, settings={"cfg": 3})
    report = refined.report
    assert report["error"]["dode_end"] == pytest.approx(errors_of(refined, x, targets), rel=1e-6)
    assert report["error"]["stock_end"] == pytest.approx(
        errors_of(replace(row, weights=0 * row.weights), x, targets), rel=1e-6
    )
    assert report["error"]["dode"] == [*[None] * (row.steps - 1), report["error"]["dode_end"]]
    assert (report["fitted_latents"], report["held_out_latents"], report["checked"]) == (7, 2, True)
    assert refined.settings["cfg"] == 3
    began = report["refined"]["from"]
    assert (began["solver"], began["sigmas"]) == (solver, row.sigmas.tolist())
    assert min(s["held_out_error"] for s in stages(refined).values()) == report["error"]["dode_end"]


def test_goes_through_a_file(tmp_path):
    refined = refine(two_peaks, latents(6), distill(two_peaks, latents(6), SIGMAS))
    path = LambdaTable([refined]).save(tmp_path / "refined.safetensors")
    (again,) = LambdaTable.load(path).rows
    assert again == refined
    x = latents(3, seed=5)
    assert torch.equal(
        sample_dode(two_peaks, x, again.sigmas, disable=True, row=again),
        sample_dode(two_peaks, x, refined.sigmas, disable=True, row=refined),
    )


def test_its_schedule_is_found_in_parts():
    refined = refine(two_peaks, latents(6), distill(two_peaks, latents(6), SIGMAS))
    assert refined.find(refined.sigmas[2:]).step == 2
    end = sample_dode(
        two_peaks, latents(2, sigma=refined.sigmas[2]), refined.sigmas[2:], disable=True, row=refined
    )
    assert end.isfinite().all()


# --- Cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("budget", [None, 1.5])
def test_costs_at_most_what_is_said_before(solver, budget):
    x, model, told = latents(12), Counting(), []
    row = distill(two_peaks, x, SIGMAS, solver=solver)
    refined = refine(model, x, row, budget=budget, progress=told.append)
    spent = refined.report["evaluations"]
    taught = spent["teacher for refining"]
    plan = plan_refinement(row, 12, budget, taught)
    assert model.evaluations == taught + spent["refining"] == told[-1].done
    assert spent["refining"] <= plan.evaluations
    assert {p.total for p in told} == {taught + plan.evaluations}
    assert [p.stage for p in told] == sorted((p.stage for p in told), reverse=True)  # teacher, then refining
    assert plan.fitted == refined.report["fitted_latents"]
    if budget is not None:
        assert plan.evaluations <= budget * taught


@given(latents=st.integers(2, 200), budget=st.floats(0.5, 50), solver=st.sampled_from(["euler", "heun"]))
@settings(deadline=None, max_examples=40)
def test_a_budget_buys_latents_then_jacobians_and_never_more(latents, budget, solver):
    row = row_of(solver, evaluations=(2, 2, 2, 1) if solver == "heun" else None)
    taught = 60 * latents
    everything = plan_refinement(row, latents, None, taught)
    assert (everything.fitted, everything.jacobians) == (latents - max(1, latents // 4), JACOBIANS)
    try:
        plan = plan_refinement(row, latents, budget, taught)
    except DodeError:
        with pytest.raises(DodeError, match="too small"):
            plan_refinement(row, latents, budget / 2, taught)
        return
    assert plan.evaluations <= min(budget * taught, everything.evaluations)
    assert plan.fitted >= min(FEW_LATENTS, everything.fitted) or plan.jacobians == 1
    assert plan_refinement(row, latents, 2 * budget, taught).evaluations >= plan.evaluations


def test_a_budget_that_pays_for_nothing_is_refused_before_it_is_spent():
    x, model = latents(8), Counting()
    row = distill(two_peaks, x, SIGMAS)
    targets = run_teacher(two_peaks, x, SIGMAS)
    with pytest.raises(
        DodeError, match=r"0.01 times the teacher's .* too small: .* takes 0\.\d+ times at least"
    ):
        refine(model, x, row, budget=0.01, targets=targets)
    for budget in (0, -1, float("nan"), float("inf")):
        with pytest.raises(DodeError, match="positive multiple"):
            refine(model, x, row, budget=budget)
    assert model.evaluations == 0


# --- The same, however it is computed -----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_and_groups_make_no_difference(size):
    x = latents(9)
    row = distill(two_peaks, x, SIGMAS)
    whole = refine(two_peaks, x, row)
    parts = refine(two_peaks, x, row, micro_batch=size)
    np.testing.assert_allclose(parts.weights, whole.weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(parts.sigmas, whole.sigmas, rtol=1e-5)


def test_each_group_has_its_own_model_and_arguments():
    def shifted(x, sigma, shift=None):
        return two_peaks(x - shift.reshape(-1, 1, 1, 1), sigma) + shift.reshape(-1, 1, 1, 1)

    labels = torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=torch.float64)
    groups = [Group(shifted, latents(4, seed=s), lambda i, s=s: {"shift": labels[i] + s}) for s in (0, 1)]
    row = distill(groups, None, SIGMAS)
    refined = refine(groups, None, row)
    assert refined.report["error"]["dode_end"] < row.report["error"]["dode_end"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision_and_any_rank(dtype):
    x = latents(8, 2, 3, 2, 2).to(dtype)

    def model(x, sigma, **extra_args):
        return two_peaks(x.float(), sigma.float()).to(x.dtype)

    row = distill(model, x, SIGMAS.float())
    refined = refine(model, x, row)
    assert refined.report["error"]["dode_end"] <= row.report["error"]["dode_end"]


# --- Interrupted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0.1, 0.45, 0.95])
@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
def test_interrupt_passes_on_with_the_best_row(after, kind):
    x = latents(8)
    row = distill(two_peaks, x, SIGMAS)
    interrupt = kind()

    def stop(p):
        if p.done > after * p.total:
            raise interrupt

    with pytest.raises(kind) as caught:
        refine(two_peaks, x, row, progress=stop)
    assert caught.value is interrupt
    best = interrupt.best_row
    assert best.report["refined"]["interrupted"]
    targets = run_teacher(two_peaks, x, SIGMAS)
    better = errors_of(best, x, targets) < errors_of(row, x, targets)
    assert better == (after == 0.95)
    assert better or np.array_equal(best.weights, row.weights)


def test_nan_is_an_error_that_carries_the_best_row():
    x, calls = latents(8), iter(range(10**6))
    targets = run_teacher(two_peaks, x, SIGMAS)
    row = distill(two_peaks, x, SIGMAS, targets=targets)

    def breaks(x, sigma, **extra_args):
        return two_peaks(x, sigma) * (float("nan") if next(calls) == 30 else 1)

    with pytest.raises(DodeError, match="NaN") as caught:
        refine(breaks, x, row, targets=targets)
    assert isinstance(caught.value.best_row, LambdaRow)


# --- Rows that it takes, and those that it does not ------------------------------------------------------


def test_a_refined_row_can_be_refined_again():
    x = latents(8)
    once = refine(two_peaks, x, distill(two_peaks, x, SIGMAS))
    again = refine(two_peaks, x, once)
    assert stages(again)["row given"]["held_out_error"] == pytest.approx(
        once.report["error"]["dode_end"], rel=0.3
    )
    assert again.form == "history"


def test_told_sigmas_are_kept():
    x = latents(8)
    told = SIGMAS.numpy()[:-1] * 0.95
    refined = refine(two_peaks, x, row_of(told_sigmas=told))
    assert np.array_equal(refined.sigmas, SIGMAS.numpy())
    assert np.array_equal(refined.told_sigmas, told) or refined.told_sigmas is None


def test_one_latent_is_fitted_and_not_checked():
    refined = refine(two_peaks, latents(1), row_of())
    assert refined.report["checked"] is False
    assert "error" not in refined.report
    assert stages(refined)["plain solver"]["held_out_error"] is None


def test_fresh_arguments_for_every_run():
    x = latents(4)
    sampler = writes_into_what_it_is_given
    row = distill(two_peaks, x, SIGMAS, solver=sampler, extra_args={"model_options": {}, "seed": 1})
    refined = refine(two_peaks, x, row, solver=sampler, extra_args={"model_options": {}, "seed": 1})
    assert refined.report["error"]["dode_end"] < row.report["error"]["dode_end"]


@pytest.mark.parametrize(
    ("row", "arguments", "why"),
    [
        (row_of(weights=np.zeros((4, 2))), {}, "per channel cannot be refined"),
        (row_of(sigmas=karras(1)), {}, "no history"),
        (row_of(weights=np.zeros(5), evaluations=(2, 1, 1, 1)), {}, "other steps"),
        (row_of("<mine>"), {}, "function of yours"),
        (row_of("euler"), {"solver": "heun"}, "not 'heun'"),
        (row_of(), {"micro_batch": 0}, "micro_batch"),
        (row_of(), {"settings": {"a": object()}}, "JSON"),
        (row_of(), {"teacher": "nobody"}, "no solver is called"),
        (row_of(), {"scale": 0}, "scale"),
        (row_of(), {"targets": run_teacher(two_peaks, latents(4, seed=9), SIGMAS, scale=1)}, "other latents"),
    ],
)
def test_bad_input_is_refused_before_any_evaluation(row, arguments, why):
    model = Counting()
    with pytest.raises(DodeError, match=why):
        refine(model, latents(4), row, **arguments)
    assert model.evaluations == 0


def test_stochastic_samplers_are_refused():
    def noisy(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return sample_euler(model, x + torch.randn_like(x), sigmas, extra_args, callback, disable)

    with pytest.raises(IneligibleSampler, match="stochastic"):
        refine(two_peaks, latents(4), row_of("<noisy>"), solver=noisy)


def test_every_single_stage_solver_becomes_weights():
    for solver in ("euler", "dpmpp_2m", "dpmpp_3m", "ipndm", "deis"):
        refined = refine(two_peaks, latents(4), row_of(solver), scale=2, budget=20)
        assert refined.form == "history" or refined.report["refined"]["kept"] == "row given"
    assert set(SOLVERS) > {"heun"}
