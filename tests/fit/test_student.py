"""A student and its numbers: what a number changes, from where on, and that σ descend whatever it is moved by."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dode_nodes import Latents
from dode_nodes.fit.student import (
    REACH,
    InnerSigma,
    Student,
    Weight,
    first_changed,
    history_parameters,
    jacobian_cost,
    lambda_parameters,
    moved,
    sigma_parameters,
)
from dode_nodes.sampling.denoiser import dode_corrections, history_corrections
from dode_nodes.sampling.solvers import sample_euler, sample_heun
from tests.oracles import two_peaks
from tests.toys import Counting, karras, latents

N = 5
SIGMAS = karras(N).numpy()


def student(seed=0):
    weights = np.eye(N) + np.tril(np.random.default_rng(seed).normal(0, 0.2, (N, N)))
    return Student(sample_euler, "noise", SIGMAS, history_corrections(weights))


def batch_of(model=two_peaks, count=3):
    return Latents.of(model, latents(count)).batches()[0]


FAMILY = [*history_parameters(N), *sigma_parameters(N)]


@pytest.mark.parametrize("parameter", FAMILY, ids=str)
def test_a_parameter_changes_the_run_from_its_first_evaluation_on(parameter):
    model = Counting()
    batch, before = batch_of(), student()
    _, answers = before.run(two_peaks, batch)
    after = parameter.move(before, parameter.step)
    end, expected = after.run(two_peaks, batch)
    for k in range(parameter.first):
        assert torch.equal(expected[k], answers[k])
    if parameter.first < N:
        assert not torch.equal(expected[parameter.first], answers[parameter.first])
    resumed, _ = after.run(model, batch, answers[: parameter.first])
    assert torch.equal(resumed, end)
    assert len(model.sigmas) == N - parameter.first


def test_cost_of_a_jacobian_is_what_its_runs_ask():
    model, before = Counting(), student()
    _, answers = before.run(two_peaks, batch_of())
    for parameter in FAMILY:
        parameter.move(before, 0.1).run(model, batch_of(count=1), [a[:1] for a in answers[: parameter.first]])
    assert model.evaluations == jacobian_cost(FAMILY, before)
    assert first_changed(FAMILY) == 1


def test_weights_reach_back_so_far():
    reached = {(p.k, int(np.flatnonzero(p.direction)[0])) for p in history_parameters(7)}
    assert reached == {(k, j) for k in range(7) for j in range(k + 1) if k - j < REACH}


def test_lambda_is_a_direction_of_the_triangle():
    zero = Student(sample_heun, "data", SIGMAS, np.zeros((N, N)))
    lambdas = np.array([0, 0.3, -0.1, 0.2, 0.7])
    got = moved(zero, lambda_parameters(N), lambdas[1:]).corrections
    np.testing.assert_allclose(got, dode_corrections(lambdas), atol=1e-15)


@given(amounts=st.lists(st.floats(-50, 50), min_size=N - 1, max_size=N - 1))
def test_sigmas_descend_whatever_they_are_moved_by(amounts):
    after = moved(student(), sigma_parameters(N), amounts)
    assert (np.diff(after.sigmas) < 0).all()
    assert (after.sigmas[0], after.sigmas[-1]) == (SIGMAS[0], 0)
    assert np.isfinite(after.corrections).all()


@given(k=st.integers(1, N - 1), amount=st.floats(-3, 3))
def test_moving_a_sigma_keeps_how_far_each_step_goes(k, amount):
    before = student()
    after = InnerSigma(k).move(before, amount)
    assert np.flatnonzero(after.sigmas != before.sigmas).tolist() in ([k], [])
    lengths = [np.diff(s.sigmas)[:, None] * (s.corrections + np.eye(N)) for s in (before, after)]
    np.testing.assert_allclose(lengths[1], lengths[0], atol=1e-12)


def test_moves_are_undone_by_their_opposites():
    before = student()
    for parameter in (Weight(2, np.array([1.0, 0, -1.0])), InnerSigma(3)):
        again = parameter.move(parameter.move(before, 0.3), -0.3)
        np.testing.assert_allclose(again.corrections, before.corrections, atol=1e-12)
        np.testing.assert_allclose(again.sigmas, before.sigmas, rtol=1e-12)
