"""Greedy least squares: the coefficients of every evaluation minimise the distance to the teacher."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from dode_nodes.denoiser import DodeDenoiser
from dode_nodes.greedy import dode, fit_greedily
from dode_nodes.groups import Group, micro_batches
from dode_nodes.probe import probe_student
from dode_nodes.runs import Recording, Run
from dode_nodes.solvers import SOLVERS
from dode_nodes.teacher import Targets, run_teacher
from tests.oracles import two_peaks
from tests.toys import karras, latents

SIGMAS = karras(4)


def fit(
    solver="euler", prediction="noise", targets=None, held=(), model=two_peaks, x=None, size=None, **kwargs
):
    x = latents(6) if x is None else x
    run = Run(SOLVERS[solver], SIGMAS)
    queries = probe_student(run.solver, SIGMAS)
    targets = targets or run_teacher(two_peaks, x, SIGMAS, solvers=solver, scale=4)
    recordings = [Recording(run, batch, prediction) for batch in micro_batches([Group(model, x)], size)]
    return fit_greedily(recordings, [model] * len(recordings), queries, targets, held, **kwargs)


def lambdas(found):
    return np.concatenate(found.coefficients)


def targets_of(states, x):
    """Targets out of the blue."""
    return Targets("none", 1, states, own_error=None, evaluations=0, x=x)


def anywhere(x):
    """Targets that no λ reaches."""
    sigmas = [*SIGMAS[1:].tolist()]
    return targets_of({s: latents(len(x), seed=i + 9, sigma=1.0) for i, s in enumerate(sigmas)}, x)


def outputs(prediction, x, sigma):
    denoised = two_peaks(x, x.new_full((len(x),), sigma))
    return denoised if prediction == "data" else (x - denoised) / sigma


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_first_lambda_by_hand(prediction):
    """λ_1 of Euler, whatever the targets: the projection of what is missing on what λ = 1 moves."""
    x = latents(6)
    targets = anywhere(x)
    s0, s1, s2 = SIGMAS[:3].tolist()
    o0 = outputs(prediction, x, s0)
    x1 = x + (x - two_peaks(x, x.new_full((6,), s0))) / s0 * (s1 - s0)
    o1 = outputs(prediction, x1, s1)
    step = (s2 - s1) if prediction == "noise" else (1 - s2 / s1)
    plain = x1 + (x1 - two_peaks(x1, x1.new_full((6,), s1))) / s1 * (s2 - s1)
    moved, missing = step * (o1 - o0), targets.at(s2) - plain
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


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_lambda_is_a_minimum(solver, prediction):
    """Of the distance to the teacher at the next query, the earlier λ being what they are."""
    x = latents(6)
    targets = run_teacher(two_peaks, x, SIGMAS, solvers=solver, scale=4)
    found = fit(solver, prediction, targets)
    run, queries = Run(SOLVERS[solver], SIGMAS), probe_student(SOLVERS[solver], SIGMAS)
    (batch,) = micro_batches([Group(two_peaks, x)], None)

    def distance(corrections, k):
        states, end = run.trajectory(DodeDenoiser(two_peaks, corrections, prediction), batch, [k + 1])
        if k + 1 == len(queries.sigmas):
            return float((end - targets.at(0.0)).square().sum())
        return float((states[k + 1] - targets.at(queries.sigmas[k + 1])).square().sum())

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
    x = latents(6)
    targets = anywhere(x)
    found = fit(prediction="data", targets=targets, formulation=every_output)
    assert [len(theta) for theta in found.coefficients] == [1, 2, 3, 4]
    state, raw = x, []
    for k, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        raw.append(two_peaks(state, sigma.expand(6)))
        kept = state * sigma_next / sigma
        share = 1 - sigma_next / sigma
        columns = torch.stack([(share * o).flatten() for o in raw], dim=1).numpy()
        wanted = (targets.at(sigma_next.item()) - kept).flatten().numpy()
        theta = np.linalg.lstsq(columns, wanted, rcond=None)[0]
        np.testing.assert_allclose(found.coefficients[k], theta, rtol=1e-7, atol=1e-9)
        state = kept + share * sum(t * o for t, o in zip(theta, raw, strict=True))


def test_held_out_latents_have_no_say():
    x = latents(6)
    other = torch.cat([x[:4], latents(2, seed=77)])
    held = lambdas(fit(x=x, held=[4, 5]))
    np.testing.assert_array_equal(held, lambdas(fit(x=other, held=[4, 5])))
    np.testing.assert_allclose(held, lambdas(fit(x=x[:4])), rtol=1e-10)
    assert not np.allclose(lambdas(fit(x=x)), lambdas(fit(x=other)))


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
    few, many = fit(x=latents(6)), fit(x=latents(96))
    ratio = np.concatenate(few.standard_errors) / np.concatenate(many.standard_errors)
    assert np.median(ratio) == pytest.approx(4, rel=0.6)
    difference = np.abs(lambdas(few) - lambdas(many))
    assert (difference < 4 * np.concatenate(few.standard_errors)).all()
