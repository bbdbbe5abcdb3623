"""Weights over the history, read off a sampler: known tables, and the sampler's own steps again under Euler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dode_nodes.sampling.denoiser import DodeDenoiser, dode_corrections, history_corrections
from dode_nodes.sampling.multistep import as_history
from dode_nodes.sampling.solvers import SOLVERS, sample_euler
from tests.oracles import two_peaks
from tests.toys import Counting, karras, latents, uniform

SINGLE_STAGE = ("euler", "dpmpp_2m", "dpmpp_3m", "ipndm", "deis")
SIGMAS = karras(6)
NONE = np.zeros((6, 6))


def weights_of(solver, corrections=NONE, prediction="noise", sigmas=SIGMAS, **options):
    return as_history(SOLVERS[solver], sigmas.numpy(), corrections, prediction, options=options)


def test_euler_weighs_its_newest_output_alone():
    np.testing.assert_allclose(weights_of("euler"), np.eye(6), atol=1e-12)


def test_ipndm_has_adams_bashforths_weights():
    expected = np.diag([1, *[1.5] * 4, 1]) + np.diag([*[-0.5] * 4, 0], -1)
    np.testing.assert_allclose(weights_of("ipndm", max_order=2), expected, atol=1e-12)


def test_lambda_in_noise_space_is_two_weights():
    lambdas = np.array([0, 0.3, -0.2, 0.5, 1.0, 0.1])
    expected = np.diag(1 + lambdas) + np.diag(-lambdas[1:], -1)
    np.testing.assert_allclose(weights_of("euler", dode_corrections(lambdas)), expected, atol=1e-12)


def test_dpmpp_2m_is_euler_in_data_space_with_its_lambda():
    h = -np.diff(np.log(SIGMAS.numpy()[:-1]))
    lambdas = np.concatenate([[0], h[1:] / h[:-1] / 2, [0]])  # 1/(2r), r = h_{k−1}/h_k
    of_euler = weights_of("euler", dode_corrections(lambdas), "data")
    np.testing.assert_allclose(weights_of("dpmpp_2m"), of_euler, atol=1e-10)


@pytest.mark.parametrize("solver", SINGLE_STAGE)
@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("sigmas", [SIGMAS, uniform(6)], ids=["karras", "flow"])
@settings(deadline=None, max_examples=8)
@given(lambdas=st.lists(st.floats(-2, 2), min_size=6, max_size=6))
def test_euler_with_the_weights_takes_the_solvers_steps(solver, prediction, sigmas, lambdas):
    corrections = dode_corrections(np.array(lambdas))
    weights = weights_of(solver, corrections, prediction, sigmas)
    x = latents(2, sigma=float(sigmas[0]))
    expected = SOLVERS[solver](DodeDenoiser(two_peaks, corrections, prediction), x, sigmas, disable=True)
    denoiser = DodeDenoiser(two_peaks, history_corrections(weights), "noise")
    got = sample_euler(denoiser, x, sigmas, disable=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("solver", ["heun", "dpm_2", "dpm_solver_3"])
def test_several_stages_are_no_such_method(solver):
    assert weights_of(solver) is None


def test_a_step_that_is_not_of_this_form_is_none():
    def shrinks(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return 0.9 * sample_euler(model, x, sigmas, extra_args, callback, disable)

    def fails(model, x, sigmas, extra_args=None, callback=None, disable=None):
        raise RuntimeError("float32 only")

    for sampler in (shrinks, fails):
        assert as_history(sampler, SIGMAS.numpy(), NONE, "noise") is None


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("solver", SINGLE_STAGE)
def test_a_sampler_that_serves_only_float32_has_weights_too(solver, prediction):
    def float32_only(model, x, sigmas, **kwargs):
        if x.dtype != torch.float32 or sigmas.dtype != torch.float32:
            raise TypeError("expected float32")
        return SOLVERS[solver](model, x, sigmas, **kwargs)

    corrections = dode_corrections(np.array([0, 0.3, -0.2, 0.5, 1.0, 0.1]))
    weights = as_history(float32_only, SIGMAS.numpy(), corrections, prediction)
    np.testing.assert_allclose(weights, weights_of(solver, corrections, prediction), atol=2e-4)
    np.testing.assert_array_equal(weights, np.tril(weights))


def test_the_network_is_not_asked_but_lends_its_attributes():
    def looks_behind(model, x, sigmas, **kwargs):
        assert model.inner_model is network.inner_model
        return sample_euler(model, x, sigmas, **kwargs)

    network = Counting()
    assert as_history(looks_behind, SIGMAS.numpy(), NONE, "noise", model=network) is not None
    assert network.evaluations == 0
