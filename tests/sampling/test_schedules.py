"""Schedules equal ComfyUI's, and say so where they cannot."""

from __future__ import annotations

import builtins

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dode_nodes.errors import DodeError
from dode_nodes.sampling.schedules import SCHEDULES, NoiseSchedule, make_sigmas

NOISE_SCHEDULES = {
    "sd": NoiseSchedule.stable_diffusion(),
    "flow": NoiseSchedule.rectified_flow(),
    "flow, shift 3": NoiseSchedule.rectified_flow(shift=3.0),
}

# ComfyUI 0.3.64's σ for 7 steps, written down so that something holds without a checkout.
SEVEN_STEPS = {
    ("sd", "simple"): [14.6146, 6.70163, 3.5282, 2.06167, 1.27624, 0.790061, 0.438062],
    ("sd", "sgm_uniform"): [14.6146, 6.678, 3.52206, 2.06064, 1.27683, 0.79126, 0.439666],
    ("sd", "karras"): [14.6146, 7.09441, 3.1686, 1.2741, 0.446919, 0.130308, 0.0291672],
    ("sd", "exponential"): [14.6146, 5.18568, 1.84002, 0.652892, 0.231664, 0.0822009, 0.0291672],
    ("sd", "ddim_uniform"): [14.2651, 6.57065, 3.48545, 2.04731, 1.27206, 0.790061, 0.440309, 0.0413144],
    ("sd", "beta"): [14.6146, 9.70148, 4.7126, 2.26832, 1.16822, 0.612696, 0.27718],
    ("sd", "normal"): [14.6146, 5.9489, 2.91831, 1.61558, 0.932358, 0.493552, 0.0291672],
    ("sd", "linear_quadratic"): [14.6146, 14.4929, 14.3711, 14.2493, 13.2674, 10.5652, 6.14272],
    ("sd", "kl_optimal"): [14.6146, 3.0807, 1.59707, 0.961588, 0.572914, 0.281838, 0.0291672],
    ("flow, shift 3", "simple"): [1.0, 0.947717, 0.882716, 0.800373, 0.69268, 0.545802, 0.333593],
    ("flow, shift 3", "sgm_uniform"): [1.0, 0.947542, 0.882788, 0.800837, 0.693793, 0.548046, 0.337972],
    ("flow, shift 3", "karras"): [1.0, 0.501055, 0.232737, 0.0983614, 0.0368317, 0.0117443, 0.00299401],
    ("flow, shift 3", "exponential"): [1.0, 0.379643, 0.144129, 0.0547176, 0.0207732, 0.00788638, 0.00299401],
    ("flow, shift 3", "ddim_uniform"): [
        0.998663,
        0.946086,
        0.881188,
        0.799065,
        0.69181,
        0.545802,
        0.335404,
        0.0059761,
    ],
    ("flow, shift 3", "beta"): [1.0, 0.975157, 0.915433, 0.817561, 0.668514, 0.455432, 0.188811],
    ("flow, shift 3", "normal"): [1.0, 0.937711, 0.857692, 0.751121, 0.602151, 0.379195, 0.00892857],
    ("flow, shift 3", "linear_quadratic"): [1.0, 0.991667, 0.983333, 0.975, 0.907812, 0.722917, 0.420312],
    ("flow, shift 3", "kl_optimal"): [1.0, 0.76812, 0.578682, 0.415969, 0.27009, 0.134192, 0.00299401],
}


@pytest.fixture
def host_samplings(comfyui):
    """ComfyUI's own model_sampling objects under the keys of NOISE_SCHEDULES."""

    def flow(shift):
        sampling = comfyui.model_sampling.ModelSamplingDiscreteFlow()
        sampling.set_parameters(shift=shift)
        return sampling

    return {
        "sd": comfyui.model_sampling.ModelSamplingDiscrete(),
        "flow": flow(1.0),
        "flow, shift 3": flow(3.0),
    }


@pytest.mark.comfyui
@pytest.mark.parametrize("noise", NOISE_SCHEDULES)
def test_noise_schedule_equals_comfyui(host_samplings, noise):
    ours, host = NOISE_SCHEDULES[noise], host_samplings[noise]
    torch.testing.assert_close(ours.sigmas, host.sigmas, rtol=1e-6, atol=0)
    sigma = host.sigmas[::7] * 1.01
    assert torch.equal(ours.timestep(sigma), host.timestep(sigma))
    assert ours.timestep(sigma[3]) == host.timestep(sigma[3])
    timestep = torch.linspace(0, 999, 300)
    torch.testing.assert_close(ours.sigma(timestep), host.sigma(timestep), rtol=1e-6, atol=0)


@pytest.mark.comfyui
@pytest.mark.parametrize("noise", NOISE_SCHEDULES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_sigmas_equal_comfyui(comfyui, host_samplings, name, noise):
    for steps in range(1, 21):
        host = comfyui.samplers.calculate_sigmas(host_samplings[noise], name, steps)
        if host.isnan().any():
            with pytest.raises(DodeError, match=f"{name} cannot have 1 step$"):
                make_sigmas(name, steps, NOISE_SCHEDULES[noise])
        else:
            ours = make_sigmas(name, steps, NOISE_SCHEDULES[noise])
            torch.testing.assert_close(ours, host, rtol=1e-6, atol=0)


@pytest.mark.comfyui
@pytest.mark.parametrize("name", SCHEDULES)
def test_discarded_penultimate_equals_comfyui(comfyui, host_samplings, name):
    class Patcher:
        def get_model_object(self, name):
            return host_samplings["sd"]

    for steps in range(1, 21):
        host = comfyui.samplers.KSampler(Patcher(), steps, "cpu", sampler="dpm_2", scheduler=name).sigmas
        ours = make_sigmas(name, steps, NOISE_SCHEDULES["sd"], discard_penultimate=True)
        torch.testing.assert_close(ours, host, rtol=1e-6, atol=0)


@pytest.mark.comfyui
def test_names_are_comfyuis(comfyui):
    assert list(SCHEDULES) == comfyui.samplers.SCHEDULER_NAMES


@pytest.mark.parametrize(("noise", "name"), SEVEN_STEPS)
def test_seven_steps(noise, name):
    sigmas = make_sigmas(name, 7, NOISE_SCHEDULES[noise])
    torch.testing.assert_close(sigmas, torch.tensor([*SEVEN_STEPS[noise, name], 0.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_equals_k_diffusion(k_diffusion, name):
    noise = NOISE_SCHEDULES["sd"]
    theirs = getattr(k_diffusion, f"get_sigmas_{name}")(9, noise.sigma_min, noise.sigma_max)
    torch.testing.assert_close(make_sigmas(name, 9, noise), theirs, rtol=1e-6, atol=0)


@settings(deadline=None)
@given(
    name=st.sampled_from(SCHEDULES), noise=st.sampled_from(list(NOISE_SCHEDULES)), steps=st.integers(2, 100)
)
def test_sigmas_descend_from_sigma_max_to_zero(name, noise, steps):
    noise_schedule = NOISE_SCHEDULES[noise]
    sigmas = make_sigmas(name, steps, noise_schedule)
    assert sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    if name == "ddim_uniform":
        assert sigmas[-2] == noise_schedule.sigmas[1]
    else:
        assert len(sigmas) == steps + 1
        assert sigmas[0] == pytest.approx(noise_schedule.sigma_max, rel=1e-6)


def test_discarding_the_penultimate_keeps_the_number_of_steps():
    noise = NOISE_SCHEDULES["sd"]
    more = make_sigmas("karras", 6, noise)
    assert torch.equal(
        make_sigmas("karras", 5, noise, discard_penultimate=True), torch.cat([more[:-2], more[-1:]])
    )


@pytest.mark.parametrize(("steps", "given"), [(1, 1), (4, 4), (6, 7), (11, 12), (20, 20)])
def test_ddim_uniform_gives_the_hosts_number_of_steps(steps, given):
    assert len(make_sigmas("ddim_uniform", steps, NOISE_SCHEDULES["sd"])) == given + 1


def test_beta_leaves_out_coinciding_sigmas():
    sigmas = make_sigmas("beta", 139, NOISE_SCHEDULES["sd"])
    assert len(sigmas) == 138 + 1


def test_flow_shift():
    """Only sigma() applies the shift: the host's timestep() is not its inverse."""
    noise = NOISE_SCHEDULES["flow, shift 3"]
    assert noise.sigma(torch.tensor(500.0)) == pytest.approx(0.75)
    assert noise.timestep(torch.tensor(0.75)) == 750
    assert noise.sigma_max == 1
    assert noise.sigma_min == pytest.approx(0.003 / 1.002)


def test_discrete_timesteps_index_the_table():
    noise = NOISE_SCHEDULES["sd"]
    between = (noise.sigmas[10] * noise.sigmas[11]).sqrt()
    assert noise.sigma(torch.tensor(10.5)) == pytest.approx(float(between), rel=1e-5)
    assert torch.equal(noise.timestep(noise.sigmas), torch.arange(1000))
    assert noise.sigma(torch.tensor(2000)) == pytest.approx(noise.sigma_max)


def test_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(DodeError, match=r"'karas' \(did you mean karras\?\); there are simple, .*kl_optimal"):
        make_sigmas("karas", 5, NOISE_SCHEDULES["sd"])


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("karras", 0, "steps must be at least 1, not 0"),
        ("kl_optimal", 1, "kl_optimal cannot have 1 step$"),
        ("simple", 1001, "simple cannot have 1001 steps"),
    ],
)
def test_impossible_steps_are_refused(name, steps, message):
    with pytest.raises(DodeError, match=message):
        make_sigmas(name, steps, NOISE_SCHEDULES["sd"])


def test_shift_must_be_positive():
    with pytest.raises(DodeError, match="shift must be positive, not 0"):
        NoiseSchedule.rectified_flow(shift=0)


def test_beta_without_scipy(monkeypatch):
    import_ = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return import_(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(DodeError, match="pip install scipy"):
        make_sigmas("beta", 5, NOISE_SCHEDULES["sd"])
