"""The wrapped denoiser: one equation, nothing in between where it has nothing to do."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch

from dode_nodes.errors import DodeError
from dode_nodes.sampling.bands import low_pass
from dode_nodes.sampling.denoiser import (
    DodeDenoiser,
    dode_corrections,
    history_corrections,
    over_latent,
    rest_of,
    row_corrections,
)
from dode_nodes.sampling.free_outputs import gaussian_denoised, unit_variance
from dode_nodes.tables.free_outputs import FreeOutputs, GaussianPrior
from dode_nodes.tables.row import LambdaRow
from tests.oracles import two_peaks
from tests.toys import Counting, latents

LAMBDAS = np.array([0.7, 0.3, -0.4, 0.2])


SIGMAS = (9.0, 4.0, 1.5, 0.3)


def states(n: int, *shape: int) -> list[torch.Tensor]:
    return [latents(3, *shape, seed=k) for k in range(n)]


def raw(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The network's denoised."""
    return two_peaks(x, x.new_full((len(x),), sigma))


def outputs_of(prediction, xs, sigmas):
    """The raw outputs o_k, and how an ô is turned back into a denoised."""
    denoised = [raw(x, s) for x, s in zip(xs, sigmas, strict=True)]
    if prediction == "data":
        return denoised, lambda k, output: output
    outputs = [(x - d) / s for x, d, s in zip(xs, denoised, sigmas, strict=True)]
    return outputs, lambda k, output: xs[k] - sigmas[k] * output


def ask(denoiser, xs, sigmas):
    return [denoiser(x, x.new_full((len(x),), s)) for x, s in zip(xs, sigmas, strict=True)]


@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 3, 3), (2, 2, 3, 4)])
@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_equation_10(prediction, shape):
    xs = states(4, *shape)
    o, denoised = outputs_of(prediction, xs, SIGMAS)
    got = ask(DodeDenoiser(two_peaks, dode_corrections(LAMBDAS), prediction), xs, SIGMAS)
    assert torch.equal(got[0], raw(xs[0], SIGMAS[0]))
    for k in (1, 2, 3):
        expected = denoised(k, o[k] + LAMBDAS[k] * (o[k] - o[k - 1]))
        torch.testing.assert_close(got[k], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_equation_8(prediction):
    xs = states(4)
    weights = np.tril(np.random.default_rng(0).normal(size=(4, 4)))
    o, denoised = outputs_of(prediction, xs, SIGMAS)
    got = ask(DodeDenoiser(two_peaks, history_corrections(weights), prediction), xs, SIGMAS)
    for k in range(4):
        expected = denoised(k, sum(weights[k, j] * o[j] for j in range(k + 1)))
        torch.testing.assert_close(got[k], expected, rtol=1e-12, atol=1e-12)


def test_a_rows_weights_as_corrections():
    facts = {"solver": "euler", "sigmas": [*SIGMAS, 0.0], "evaluations": (1,) * 4}
    weights = np.tril(np.random.default_rng(0).normal(size=(4, 4)))
    greedy, history = (
        LambdaRow(**facts, weights=LAMBDAS),
        LambdaRow(**facts, weights=weights, form="history"),
    )
    np.testing.assert_array_equal(row_corrections(greedy), dode_corrections(LAMBDAS))
    np.testing.assert_array_equal(row_corrections(history), weights - np.eye(4))


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_zero_hands_on_the_models_own_tensor(prediction):
    answers = []

    def model(x, sigma):
        answers.append(two_peaks(x, sigma))
        return answers[-1]

    got = ask(DodeDenoiser(model, np.zeros((4, 4)), prediction), states(4), SIGMAS)
    assert all(a is b for a, b in zip(got, answers, strict=True))


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_rest_of_a_triangle_keeps_the_sum_of_every_row(first):
    weights = np.tril(np.random.default_rng(1).normal(size=(4, 4)))
    (rest,), free = rest_of(weights[None], first)
    assert free.columns == 0
    assert rest.shape == (4 - first, 4 - first)
    np.testing.assert_allclose(rest.sum(1), weights[first:].sum(1))
    np.testing.assert_array_equal(rest[:, 1:], weights[first:, first + 1 :])


def test_first_evaluation_of_a_suffix_is_not_corrected_by_lambda():
    denoiser = DodeDenoiser(two_peaks, dode_corrections(LAMBDAS), "noise", first=2)
    xs = states(2)
    got = ask(denoiser, xs, SIGMAS[2:])
    o, denoised = outputs_of("noise", xs, SIGMAS[2:])
    assert torch.equal(got[0], raw(xs[0], SIGMAS[2]))
    torch.testing.assert_close(got[1], denoised(1, o[1] + LAMBDAS[3] * (o[1] - o[0])), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("reach", "most"), [(0, 0), (1, 1), (2, 2)])
def test_outputs_are_kept_no_longer_than_needed(reach, most):
    """At full size they are what costs memory: D-ODE keeps one."""
    alive = []

    def model(x, sigma):
        denoised = two_peaks(x, sigma)
        alive.append(weakref.ref(denoised))
        return denoised

    triangle = np.tril(np.ones((6, 6))) - np.tril(np.ones((6, 6)), -reach - 1)
    denoiser = DodeDenoiser(model, history_corrections(triangle), "data")
    counts = []
    for k in range(6):
        denoiser(latents(1), torch.tensor([3.0 - k / 3], dtype=torch.float64))
        counts.append(sum(ref() is not None for ref in alive))
    assert max(counts) == most
    assert counts[-1] == 0


def test_evaluation_without_weights_is_refused():
    denoiser = DodeDenoiser(two_peaks, dode_corrections(LAMBDAS), "noise")
    with pytest.raises(DodeError, match="more than 4 times, but there are weights for 4 evaluations"):
        ask(denoiser, states(5), (*SIGMAS, 0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_wide_sigma_does_not_widen_a_half_precision_latent(prediction, dtype):
    denoiser = DodeDenoiser(two_peaks_in_half, dode_corrections(LAMBDAS), prediction)
    for x, sigma in zip(states(4), SIGMAS, strict=True):
        assert denoiser(x.to(dtype), torch.full((3,), sigma)).dtype == dtype


def two_peaks_in_half(x, sigma):
    return two_peaks(x.float(), sigma).to(x.dtype)


def test_attributes_of_the_model_are_lent():
    model = Counting()
    denoiser = DodeDenoiser(model, np.zeros((2, 2)), "noise")
    assert denoiser.inner_model is model.inner_model
    assert copy.copy(denoiser).inner_model is model.inner_model
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = denoiser.no_such_thing


def test_value_per_latent_broadcasts():
    assert over_latent(torch.ones(3), torch.ones(3, 2, 5, 5)).shape == (3, 1, 1, 1)
    assert over_latent(torch.ones(3), torch.ones(3, 2)).shape == (3, 1)


# --- Low passes, and outputs that cost nothing ----------------------------------------------------------

PRIOR = GaussianPrior(np.array([0.1, -0.2]), np.stack([np.eye(2), 0.5 * np.eye(2)]))


def test_low_passes_have_corrections_of_their_own():
    """ô_k = o_k + Σ_p L_p Σ_j c_pkj o_j, written out."""
    corrections = np.stack([np.tril(np.random.default_rng(p).normal(size=(4, 4))) for p in range(3)])
    xs = states(4)
    got = ask(DodeDenoiser(two_peaks, corrections, "noise"), xs, SIGMAS)
    o, denoised = outputs_of("noise", xs, SIGMAS)
    for k in range(4):
        added = sum(low_pass(sum(corrections[p, k, j] * o[j] for j in range(k + 1)), p) for p in range(3))
        torch.testing.assert_close(got[k], denoised(k, o[k] + added), rtol=1e-10, atol=1e-10)


def test_corrections_of_other_bands_that_are_zero_change_nothing():
    plain = history_corrections(np.tril(np.random.default_rng(0).normal(size=(4, 4))))
    xs = states(4)
    padded = np.pad(plain[None], ((0, 2), (0, 0), (0, 0)))
    for a, b in zip(
        ask(DodeDenoiser(two_peaks, plain, "noise"), xs, SIGMAS),
        ask(DodeDenoiser(two_peaks, padded, "noise"), xs, SIGMAS),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gaussian", [None, PRIOR])
def test_a_free_first_step_does_not_ask_the_network(gaussian):
    model = Counting()
    xs = states(4)
    free = FreeOutputs(first=True, gaussian=gaussian)
    corrections = np.zeros((1, 4, free.columns + 4))
    got = ask(DodeDenoiser(model, corrections, "noise", free=free), xs, SIGMAS)
    assert model.sigmas == pytest.approx(list(SIGMAS[1:]))
    expected = xs[0] - SIGMAS[0] * unit_variance(xs[0], float(SIGMAS[0]), flow=False)
    if gaussian is not None:
        expected = gaussian_denoised(gaussian, xs[0], float(SIGMAS[0]), flow=False)
    torch.testing.assert_close(got[0], expected, rtol=1e-10, atol=1e-10)


def test_free_outputs_are_weighed_in_their_columns():
    free = FreeOutputs(start=True, gaussian=PRIOR)
    corrections = np.tril(np.random.default_rng(3).normal(size=(4, 6)), k=2)[None]
    xs = states(4)
    got = ask(DodeDenoiser(two_peaks, corrections, "noise", free=free), xs, SIGMAS)
    o, denoised = outputs_of("noise", xs, SIGMAS)
    start = unit_variance(xs[0], float(SIGMAS[0]), flow=False)
    for k in range(4):
        gaussian = (xs[k] - gaussian_denoised(PRIOR, xs[k], float(SIGMAS[k]), flow=False)) / SIGMAS[k]
        columns = [start, gaussian, *o[: k + 1]]
        added = sum(c * column for c, column in zip(corrections[0, k], columns, strict=False))
        torch.testing.assert_close(got[k], denoised(k, o[k] + added), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_the_rest_of_a_run_has_no_start_and_keeps_its_sums(first):
    corrections = np.stack([np.tril(np.random.default_rng(p).normal(size=(4, 6)), k=2) for p in range(2)])
    rest, free = rest_of(corrections, first, FreeOutputs(True, True, PRIOR))
    assert (free.first, free.start, free.gaussian) == (False, False, PRIOR)
    assert rest.shape == (2, 4 - first, 1 + 4 - first)
    np.testing.assert_allclose(rest.sum(2), corrections[:, first:].sum(2))
    np.testing.assert_array_equal(rest[:, :, 0], corrections[:, first:, 1])
    np.testing.assert_array_equal(rest[:, :, 2:], corrections[:, first:, 2 + first + 1 :])


# --- Masks --------------------------------------------------------------------------------------------


def held_until(k: int):
    """A mask that holds the left half for good, and the right half until evaluation k."""

    def held(sigma: torch.Tensor) -> torch.Tensor:
        before = k > 0 and float(sigma[0]) > SIGMAS[k] * 1.001
        return torch.tensor([True, True, before, before])

    return held


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("release", range(4))
def test_what_is_set_free_is_corrected_as_in_a_run_that_begins_there(release, prediction):
    """And what is held is the plain sampler's, bit for bit."""
    corrections = np.tril(0.3 * np.random.default_rng(0).standard_normal((4, 4)))
    xs = [state[..., None, :].repeat_interleave(2, -1) for state in states(4, 2, 2)]
    masked = DodeDenoiser(two_peaks, corrections, prediction, held=held_until(release))
    rest = DodeDenoiser(two_peaks, corrections, prediction, first=release)
    got = ask(masked, xs, SIGMAS)
    expected = ask(rest, xs[release:], SIGMAS[release:])
    for k, denoised in enumerate(got):
        plain = raw(xs[k], SIGMAS[k])
        assert torch.equal(denoised[..., :2], plain[..., :2])
        if k < release:
            assert torch.equal(denoised, plain)
        else:
            torch.testing.assert_close(denoised[..., 2:], expected[k - release][..., 2:])
            assert not torch.allclose(denoised[..., 2:], plain[..., 2:])
