"""Greedy least squares: the coefficients of every evaluation minimise the distance to the teacher."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from dode_nodes import Latents, Targets, Teacher, run_teacher
from dode_nodes.fit.greedy import dode, fit_greedily
from dode_nodes.fit.runs import Recording, Run
from dode_nodes.sampling.denoiser import DodeDenoiser
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.solvers import SOLVERS
from dode_nodes.tables.gate import LARGEST_WEIGHT
from tests.oracles import two_peaks
from tests.toys import karras, latents

SIGMAS = karras(4)


def taught(x, solver="euler", size=None):
    return run_teacher(Latents.of(two_peaks, x, micro_batch=size), SIGMAS, Teacher(scale=2), solvers=solver)


def fit(solver="euler", prediction="noise", targets=None, model=two_peaks, x=None, size=None, **kwargs):
    """On the six latents of eight that are not held out, unless there are targets or others are given."""
    targets = targets or taught(latents(8) if x is None else x, solver, size)
    run = Run(SOLVERS[solver], SIGMAS)
    queries = probe_student(run.solver, SIGMAS)
    recordings = [Recording(run, batch, prediction) for batch in targets.latents.batches()]
    return fit_greedily(recordings, [model] * len(recordings), queries, targets, **kwargs)


def lambdas(found):
    return np.concatenate(found.coefficients)


def anywhere(x):
    """Targets out of the blue, which no λ reaches; of ``x``, a quarter is held out."""
    states = {s: [latents(len(x), seed=i + 9, sigma=1.0)] for i, s in enumerate(SIGMAS[1:].tolist())}
    subject = Latents.of(two_peaks, x)
    return Targets(subject, Teacher(), states, own_error=None, evaluations=0, approach_cost=0)


def outputs(prediction, x, sigma):
    denoised = two_peaks(x, x.new_full((len(x),), sigma))
    return denoised if prediction == "data" else (x - denoised) / sigma


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_first_lambda_by_hand(prediction):
    """λ_1 of Euler, whatever the targets: the projection of what is missing on what λ = 1 moves."""
    targets = anywhere(latents(8))
    x = latents(8)[:6]  # the others are held out
    s0, s1, s2 = SIGMAS[:3].tolist()
    o0 = outputs(prediction, x, s0)
    x1 = x + (x - two_peaks(x, x.new_full((6,), s0))) / s0 * (s1 - s0)
    o1 = outputs(prediction, x1, s1)
    step = (s2 - s1) if prediction == "noise" else (1 - s2 / s1)
    plain = x1 + (x1 - two_peaks(x1, x1.new_full((6,), s1))) / s1 * (s2 - s1)
    moved, missing = step * (o1 - o0), targets.at(s2)[0][:6] - plain
    found = fit(prediction=prediction, targets=targets)
    assert found.coefficients[0].shape == (0,)
    assert found.coefficients[1] == pytest.approx(
        float((moved * missing).sum() / moved.square().sum()), rel=1e-10
    )

    # Its standard error from the latents' scatter: their residuals' pull on λ.
    residual = missing - found.coefficients[1].item() * moved
    pull = (moved * residual).flatten(1).sum(1)
    expected = float(pull.square().sum().sqrt() / moved.square().sum())
    assert found.standard_errors[1] == pytest.approx(expected, rel=1e-8)


def test_a_lambda_that_no_table_holds_is_the_nearest_that_one_does():
    """It is found after hours of work, beside others."""
    targets = anywhere(latents(8))
    free = lambdas(fit(targets=targets))
    far = replace(targets, states={s: [1e5 * x for x in each] for s, each in targets.states.items()})
    held = lambdas(fit(targets=far))
    assert np.abs(free).max() < LARGEST_WEIGHT
    assert abs(held[0]) == LARGEST_WEIGHT
    assert np.abs(held).max() <= LARGEST_WEIGHT


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_lambda_is_a_minimum(solver, prediction):
    """Of the distance to the teacher at the next query, the earlier λ being what they are."""
    targets = taught(latents(8), solver)
    found = fit(solver, prediction, targets)
    run, queries = Run(SOLVERS[solver], SIGMAS), probe_student(SOLVERS[solver], SIGMAS)
    (batch,) = targets.latents.batches(targets.latents.fitted)

    def distance(corrections, k):
        states, end = run.trajectory(DodeDenoiser(two_peaks, corrections, prediction), batch, [k + 1])
        if k + 1 == len(queries.sigmas):
            return float((end - targets.of(batch, 0.0)).square().sum())
        return float((states[k + 1] - targets.of(batch, queries.sigmas[k + 1])).square().sum())

    for k in range(1, len(queries.sigmas)):
        best = distance(found.corrections, k)
        for change in (-1e-3, 1e-3):
            moved = found.corrections.copy()
            moved[k, k] += change
            moved[k, k - 1] -= change
            assert distance(moved, k) > best


def test_dode_is_one_direction():
    base, directions = dode(3)
    assert base.tolist() == [0, 0, 0, 0]
    assert [d.tolist() for d in directions] == [[0, 0, -1, 1]]
    assert dode(0)[1] == []


def every_output(k):
    """The paper's Eq. 8: ô_k = Σ_j W_kj o_j."""
    unit = np.eye(k + 1)
    return -unit[k], list(unit)


def test_several_coefficients_are_the_least_squares_solution():
    targets = anywhere(latents(8))
    found = fit(prediction="data", targets=targets, formulation=every_output)
    assert [len(theta) for theta in found.coefficients] == [1, 2, 3, 4]
    state, raw = latents(8)[:6], []
    for k, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        raw.append(two_peaks(state, sigma.expand(6)))
        kept = state * sigma_next / sigma
        share = 1 - sigma_next / sigma
        columns = torch.stack([(share * o).flatten() for o in raw], dim=1).numpy()
        wanted = (targets.at(sigma_next.item())[0][:6] - kept).flatten().numpy()
        theta = np.linalg.lstsq(columns, wanted, rcond=None)[0]
        np.testing.assert_allclose(found.coefficients[k], theta, rtol=1e-7, atol=1e-9)
        state = kept + share * sum(t * o for t, o in zip(theta, raw, strict=True))


def test_held_out_latents_have_no_say():
    x, others = latents(8), latents(2, seed=77)
    found = lambdas(fit(x=x))
    np.testing.assert_array_equal(found, lambdas(fit(x=torch.cat([x[:6], others]))))
    assert not np.allclose(found, lambdas(fit(x=torch.cat([x[:4], others, x[6:]]))))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_add_up(size):
    np.testing.assert_allclose(lambdas(fit(size=size)), lambdas(fit()), rtol=1e-12)


def test_direction_that_moves_nothing_is_reported():
    """Where an output is the one before it again, λ has no effect: 0, not noise divided by noise."""

    def constant(x, sigma):
        return torch.full_like(x, 0.5)

    found = fit(prediction="data", model=constant)
    assert found.undetermined == [1, 2, 3]
    assert found.coefficients[1:] == [0.0, 0.0, 0.0]
    assert np.isnan(found.standard_errors[1:]).all()
    assert fit().undetermined == []


def test_single_latent_has_no_standard_error():
    found = fit(x=latents(1))
    assert np.isnan(np.concatenate(found.standard_errors)).all()
    assert np.isfinite(lambdas(found)).all()


def test_standard_error_falls_with_the_number_of_latents():
    few, many = fit(x=latents(8)), fit(x=latents(128))
    ratio = np.concatenate(few.standard_errors) / np.concatenate(many.standard_errors)
    assert np.median(ratio) == pytest.approx(4, rel=0.6)
    difference = np.abs(lambdas(few) - lambdas(many))
    assert (difference < 4 * np.concatenate(few.standard_errors)).all()
