"""The colour models keep the demo models' conventions, and texts steer the one with prompts."""

from __future__ import annotations

import json

import pytest
import torch

from dode_nodes.demo.colour.models import load_colour_model
from dode_nodes.demo.colour.networks import Autoencoder, plain_unet, words_unet
from dode_nodes.demo.train import write_weights
from dode_nodes.errors import DodeError
from dode_nodes.sampling.schedules import make_sigmas
from dode_nodes.sampling.solvers import sample_euler

NAMES = ["cat face", "dog animal", "red heart"]
SIGMA = torch.tensor([0.3, 0.9])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of untrained networks whose last layers are not 0."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    networks = {"eps": plain_unet(), "flow": words_unet(7), "autoencoder": Autoencoder()}
    for name, network in networks.items():
        for parameter in network.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        write_weights(folder / f"colour_{name}.safetensors", network, {"pictures": json.dumps(NAMES)})
    return folder


@pytest.fixture(scope="module")
def flow(folder):
    return load_colour_model("flow", folder=folder)


def test_guidance_goes_from_nothing_in_particular_through_the_prompt(flow):
    x, labels = flow.noise([0, 1]), flow.labels(["cat", "red heart"])
    conditional = flow.denoiser(1.0)(x, SIGMA, labels=labels)
    unconditional = flow.denoiser(1.0)(x, SIGMA, labels=torch.zeros_like(labels))
    assert (conditional - unconditional).abs().max() > 1e-3
    guided = flow.denoiser(3.0)(x, SIGMA, labels=labels)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional))


def test_the_order_and_the_padding_of_words_do_not_matter(flow):
    x = flow.noise([0, 1, 2])
    labels = flow.labels(["red cat", "cat red", "red cat face"])
    padded = torch.nn.functional.pad(flow.labels(["red cat"]), (0, 5))
    sigma = torch.full((3,), 0.5)
    ends = flow.denoised(x[:1].expand(3, -1, -1, -1), sigma, labels)
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], flow.denoised(x[:1], sigma[:1], padded)[0])
    assert (ends[0] - ends[2]).abs().max() > 1e-3


def test_its_prompts_are_of_words_that_it_knows(flow):
    fit, test = flow.prompts()
    assert not set(fit) & set(test)
    assert {word for prompt in fit + test for word in prompt.split()} == set(flow.vocabulary.words[1:])


def test_a_prompt_for_each_latent_or_an_error(flow):
    with pytest.raises(DodeError, match=r"one label for each of 2 latents"):
        flow.denoiser()(flow.noise([0, 1]), SIGMA, labels=flow.labels(["cat"]))


def test_the_one_without_prompts_has_no_guidance(folder):
    eps = load_colour_model("eps", folder=folder)
    x = eps.noise([0, 1])
    assert x.shape == (2, 3, 16, 16)
    plain = eps.denoiser(1.0)(x, SIGMA)
    assert torch.equal(eps.denoiser(4.0)(x, SIGMA, labels=torch.tensor([3, 4])), plain)
    assert eps.decode(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_agree(folder, flow, dtype):
    model = load_colour_model("flow", dtype, folder=folder)
    assert model.network.dtype == dtype
    x, labels = flow.noise([0, 1]), flow.labels(["cat", "dog"])
    denoised = model.denoiser(2.0)(x, SIGMA, labels=labels)
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, flow.denoiser(2.0)(x, SIGMA, labels=labels), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_it_samples_and_decodes(folder, kind):
    model = load_colour_model(kind, folder=folder)
    labels = model.labels(["cat", "dog"]) if kind == "flow" else None
    sigmas = make_sigmas("simple" if kind == "flow" else "karras", 3, model.noise_schedule)
    latents = sample_euler(model.denoiser(), model.noise([0, 1]), sigmas, {"labels": labels}, disable=True)
    pictures = model.decode(latents)
    assert pictures.isfinite().all()
    assert pictures.shape == ((2, 3, 64, 64) if kind == "flow" else (2, 3, 16, 16))


def test_what_cannot_be_loaded_is_named(tmp_path, folder):
    with pytest.raises(DodeError, match=r"'digits'.*eps, flow"):
        load_colour_model("digits")
    with pytest.raises(
        DodeError, match=r"missing; make it with python -m dode_nodes\.demo\.colour\.train flow"
    ):
        load_colour_model("flow", folder=tmp_path)
    (tmp_path / "colour_flow.safetensors").write_bytes((folder / "colour_eps.safetensors").read_bytes())
    with pytest.raises(DodeError, match="not the weights of a UNet"):
        load_colour_model("flow", folder=tmp_path)
