"""The embedded models keep k-diffusion's and ComfyUI's conventions, and draw digits."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from dode_nodes.demo import models
from dode_nodes.demo.models import KINDS, load_classifier, load_demo_model
from dode_nodes.demo.networks import UNCONDITIONAL
from dode_nodes.demo.vae import decode_to_picture
from dode_nodes.errors import DodeError
from dode_nodes.sampling.schedules import make_sigmas
from dode_nodes.sampling.solvers import sample_dpmpp_3m, sample_euler

LABELS = torch.arange(10)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return load_demo_model(request.param)


@pytest.fixture
def inputs():
    """Five latents at five σ within both schedules, and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 4, 8, 8, generator=generator)
    return x, torch.tensor([0.05, 0.2, 0.5, 0.8, 0.99]), LABELS[:5]


def sigmas_of(model, steps):
    return make_sigmas("karras" if model.kind == "eps" else "simple", steps, model.noise_schedule)


def sample(model, steps, labels, solver=sample_euler):
    x = model.noise(range(len(labels)))
    return solver(model.denoiser(), x, sigmas_of(model, steps), extra_args={"labels": labels}, disable=True)


# --- Files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, "classifier"])
def test_weights_are_small_and_say_how_they_were_made(name):
    path = Path(str(resources.files("dode_nodes.demo") / "weights" / f"{name}.safetensors"))
    assert path.stat().st_size <= 2_000_000
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        dtypes = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert metadata["command"].startswith(f"python -m dode_nodes.demo.train {name} --seed {metadata['seed']}")
    assert {key for key, dtype in dtypes.items() if dtype != torch.float16} <= {
        "real_mean",
        "real_covariance",
    }


def test_an_unknown_kind_is_refused():
    with pytest.raises(DodeError, match=r"v_prediction.*eps, flow"):
        load_demo_model("v_prediction")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "missing.*train eps"), (b"no safetensors", "not the weights of a DigitUNet")],
)
def test_missing_and_broken_weights_are_named(tmp_path, monkeypatch, content, reason):
    (tmp_path / "weights").mkdir()
    if content is not None:
        (tmp_path / "weights" / "eps.safetensors").write_bytes(content)
    monkeypatch.setattr(models.resources, "files", lambda package: tmp_path)
    with pytest.raises(DodeError, match=reason):
        load_demo_model("eps")


# --- Conventions ----------------------------------------------------------------------------------------


def test_schedules():
    eps, flow = load_demo_model("eps"), load_demo_model("flow")
    assert (eps.sigma_min, eps.sigma_max) == pytest.approx((0.029167, 14.6146), rel=1e-4)
    assert (flow.sigma_min, flow.sigma_max) == pytest.approx((0.001, 1))
    for model in (eps, flow):
        assert model.sigmas.shape == (1000,)
        assert (model.sigmas.diff() > 0).all()


def test_nothing_is_denoised_where_there_is_no_noise(model, inputs):
    x, _, labels = inputs
    denoised = model.denoiser()(x, torch.full((5,), 1e-6), labels=labels)
    torch.testing.assert_close(denoised, x, rtol=0, atol=1e-4)


def test_guidance_extrapolates_from_the_unconditional_answer(model, inputs):
    x, sigma, labels = inputs
    conditional = model.denoised(x, sigma, labels)
    unconditional = model.denoised(x, sigma, torch.full_like(labels, UNCONDITIONAL))
    assert (conditional - unconditional).abs().max() > 0.01
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(model.denoiser(cfg=3)(x, sigma, labels=labels), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("cfg", "rows"), [(1, 5), (2, 10)])
def test_each_call_is_one_forward(model, inputs, cfg, rows):
    x, sigma, labels = inputs
    batches = []
    hook = model.network.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    model.denoiser(cfg=cfg)(x, sigma, labels=labels, seed=0)
    hook.remove()
    assert batches == [rows]


@pytest.mark.parametrize("labels", [None, LABELS[:4], torch.tensor(3)])
def test_labels_must_match_the_latents(model, inputs, labels):
    x, sigma, _ = inputs
    with pytest.raises(DodeError, match="labels"):
        model.denoiser()(x, sigma, labels=labels)


def test_timesteps_interpolate_the_table():
    model = load_demo_model("eps", dtype=torch.float64)
    sigmas = model.sigmas.double()
    torch.testing.assert_close(model.timestep(sigmas), torch.arange(1000.0).double())
    between = (sigmas[:-1] * sigmas[1:]).sqrt()
    torch.testing.assert_close(model.timestep(between), torch.arange(999.0).double() + 0.5)
    assert model.timestep(torch.tensor([0.0, 1e-3, 20.0, 1e9])).tolist() == [0, 0, 999, 999]


def test_flow_timesteps_are_thousandths():
    assert load_demo_model("flow").timestep(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0, 250, 1000]


def test_noise_depends_on_its_own_seed_only(model):
    alone = model.noise([7])
    assert torch.equal(model.noise([3, 7, 5])[1:2], alone)
    assert not torch.equal(model.noise([8]), alone)


def test_noise_is_scaled_to_sigma_max(model):
    expected = math.sqrt(1 + model.sigma_max**2) if model.kind == "eps" else 1
    assert model.noise(range(200)).std().item() == pytest.approx(expected, rel=0.02)
    assert model.noise([0]).shape == (1, *model.latent_shape)


def test_double_precision_starts_from_the_same_noise(model):
    double = model.to(torch.float64)
    assert double.noise([0]).dtype == torch.float64
    torch.testing.assert_close(double.noise([0]).float(), model.noise([0]))
    assert model.network.dtype == torch.float32  # unchanged


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 2e-4), (torch.float16, 0.02), (torch.bfloat16, 0.15)]
)
def test_precisions_agree(model, inputs, dtype, tolerance):
    x, sigma, labels = inputs
    expected = model.denoiser()(x, sigma, labels=labels)
    found = load_demo_model(model.kind, dtype=dtype).denoiser()(x, sigma, labels=labels)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(2, 2), (6, 12), (16, 16)])
def test_other_sizes(model, size):
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    denoised = model.denoiser()(x, torch.tensor([0.9, 0.1]), labels=LABELS[:2])
    assert denoised.shape == x.shape
    assert denoised.isfinite().all()


@pytest.mark.comfyui
def test_the_network_inside_comfyui_denoises_alike(model, comfyui):
    base, model_type = comfyui.model_base.BaseModel, comfyui.model_base.ModelType
    config = SimpleNamespace(
        unet_config={"disable_unet_model_creation": True},
        sampling_settings={},
        latent_format=None,
        manual_cast_dtype=None,
        memory_usage_factor=1.0,
    )
    host = base(config, model_type.EPS if model.kind == "eps" else model_type.FLOW)
    host.diffusion_model = model.network
    sigma = model.sigmas[[50, 400, 700, 999]]  # of the table: between its entries the host rounds
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * (1 + sigma)[:, None, None, None]
    torch.testing.assert_close(
        host.apply_model(x, sigma, y=LABELS[:4]), model.denoised(x, sigma, LABELS[:4]), rtol=0, atol=1e-3
    )
    noise = torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(5))[None]
    scaled = host.model_sampling.noise_scaling(sigma[-1], noise, torch.zeros_like(noise), max_denoise=True)
    torch.testing.assert_close(model.noise([5]), scaled)


# --- Samples --------------------------------------------------------------------------------------------


def test_samples_are_the_digits_asked_for(model):
    labels = LABELS.repeat(2)
    pictures = decode_to_picture(sample(model, 20, labels, sample_dpmpp_3m))
    recognised = load_classifier()(pictures).argmax(1) == labels
    assert recognised.float().mean() >= 0.95


def test_samples_do_not_depend_on_the_batch(model):
    together = sample(model, 5, LABELS)
    alone = sample_euler(
        model.denoiser(),
        model.noise([4]),
        sigmas_of(model, 5),
        extra_args={"labels": LABELS[4:5]},
        disable=True,
    )
    torch.testing.assert_close(together[4:5], alone, rtol=0, atol=1e-3)


def test_few_steps_of_euler_are_far_from_converged_and_halve_their_error_with_twice_the_steps(model):
    labels = LABELS[:4]
    converged = sample(model, 40, labels, sample_dpmpp_3m)
    errors = [(sample(model, steps, labels) - converged).square().mean().sqrt() for steps in (6, 12, 24)]
    assert errors[0] > 0.1
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
