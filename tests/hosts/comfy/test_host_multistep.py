"""ComfyUI's own linear multistep samplers as weights over the history: Euler with them takes their steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dode_nodes.sampling.denoiser import DodeDenoiser, dode_corrections, history_corrections
from dode_nodes.sampling.multistep import as_history
from dode_nodes.sampling.solvers import resolve, sample_euler
from tests.oracles import two_peaks
from tests.toys import karras, latents

SIGMAS = karras(6, sigma_min=0.03)


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize(
    "sampler",
    ["euler", "ddim", "dpmpp_2m", "lms", "ipndm", "ipndm_v", "deis", "res_multistep", "gradient_estimation"],
)
@pytest.mark.usefixtures("pack")
def test_a_samplers_weights_take_its_steps(sampler: str, prediction: str) -> None:
    corrections = dode_corrections(np.array([0, 0.3, -0.2, 0.4, 0.1, 0.2]))
    weights = as_history(resolve(sampler), SIGMAS.numpy(), corrections, prediction)
    assert weights is not None
    x = latents(2)
    expected = resolve(sampler)(
        DodeDenoiser(two_peaks, corrections, prediction), x, SIGMAS.clone(), disable=True
    )
    denoiser = DodeDenoiser(two_peaks, history_corrections(weights), "noise")
    got = sample_euler(denoiser, x, SIGMAS, disable=True)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.usefixtures("pack")
def test_stages_make_no_history() -> None:
    for sampler in ("heun", "heunpp2", "dpm_2"):
        assert as_history(resolve(sampler), SIGMAS.numpy(), np.zeros((6, 6)), "noise") is None
