"""The demo model of landscapes: words steer it, and the pack's nodes treat it as any checkpoint."""

from __future__ import annotations

import re

import pytest
import torch

from dode_nodes.errors import DodeError
from dode_nodes.tables.fingerprint import same_checkpoint
from tests.hosts.comfy.node_calls import rms
from tests.import_comfyui import REPOSITORY

pytestmark = pytest.mark.comfyui

CFG = 3.0
EMPTY = {"samples": torch.zeros(1, 4, 16, 16)}


@pytest.fixture
def loaded(pack, run_node):
    """Model, clip and vae."""
    return run_node(pack.DemoPictures)


@pytest.fixture
def encode(loaded):
    """Core's own node."""
    import nodes

    return lambda text: nodes.CLIPTextEncode().encode(loaded[1], text)[0]


def sampled(loaded, encode, prompt, *, steps=8):
    """Four pictures by core's KSampler, decoded by core's VAE Decode."""
    import nodes

    latent = {"samples": torch.zeros(4, 4, 16, 16)}
    (samples,) = nodes.common_ksampler(
        loaded[0], 3, steps, CFG, "dpmpp_2m", "simple", encode(prompt), encode(""), latent
    )
    return samples["samples"], nodes.VAEDecode().decode(loaded[2], samples)[0]


def test_words_steer_what_is_drawn(loaded, encode):
    _, sunset = sampled(loaded, encode, "sunset over the desert")
    _, sea = sampled(loaded, encode, "sea, day")
    assert sunset.shape == (4, 128, 128, 3)
    assert 0 <= sunset.min() < sunset.max() <= 1
    reds, blues = (pictures[:, 64:].mean(dim=(0, 1, 2)) for pictures in (sunset, sea))
    assert reds[0] > reds[2] + 0.2
    assert blues[2] > blues[0] + 0.2


def test_it_samples_what_the_library_samples(loaded, encode):
    """The host's guidance, latents and timesteps change nothing: the same noise gives the same latents."""
    import comfy.sample

    from dode_nodes import sample_dode
    from dode_nodes.demo.colour.models import load_colour_model

    by_host, _ = sampled(loaded, encode, "lake at night", steps=4)
    model = load_colour_model("flow")
    noise = comfy.sample.prepare_noise(torch.zeros(4, 4, 16, 16), 3)
    labels = {"labels": model.labels(["lake night"] * 4)}
    sigmas = model.make_sigmas("simple", 4, False)
    with torch.no_grad():
        ours = sample_dode(model.denoiser(CFG), noise, sigmas, labels, solver="dpmpp_2m", disable=True)
    assert rms(by_host, ours) < 1e-3


def test_its_vae_gives_back_what_it_has_drawn(loaded, encode):
    samples, pictures = sampled(loaded, encode, "moon over the sea")
    with torch.no_grad():
        assert loaded[2].encode(pictures).shape == samples.shape
        assert rms(loaded[2].decode(loaded[2].encode(pictures)), pictures) < 0.06


def test_previews_are_about_what_is_decoded(loaded, encode):
    """By the host's own Latent2RGB."""
    import latent_preview

    samples, pictures = sampled(loaded, encode, "dawn, hills, clouds")
    seen = loaded[0].get_model_object("latent_format")
    previewer = latent_preview.Latent2RGBPreviewer(seen.latent_rgb_factors, seen.latent_rgb_factors_bias)
    preview = torch.nn.functional.linear(
        samples.movedim(1, -1), previewer.latent_rgb_factors.cpu(), previewer.latent_rgb_factors_bias.cpu()
    )
    small = torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1), 8).movedim(1, -1)
    assert rms((preview + 1) / 2, small) < 0.15


def test_unknown_words_are_named_with_what_is_near(encode):
    with pytest.raises(DodeError, match=r"another word for 'sunrise'.*It knows sunset"):
        encode("sunrise over hills")
    with pytest.raises(DodeError, match=r"'xqzw'.*does not know it\. All its words: autumn, cloud"):
        encode("xqzw")


def test_its_help_lists_every_word():
    from dode_nodes.demo.colour.models import load_colour_model

    page = (REPOSITORY / "web" / "docs" / "DODE_DemoPictures.md").read_text(encoding="utf-8")
    listed = re.findall(r"[a-z]+", page.split("## Words")[1])
    assert listed == list(load_colour_model("flow").vocabulary.words[1:])


@pytest.mark.slow_host  # that the model is the library's in a host is tested above
def test_it_distils_samples_and_compares(loaded, encode, dode, drawn):
    from dode_nodes.hosts.comfy.model_facts import model_facts

    model, _, vae = loaded
    prompts = {"positive": encode("sunset lake"), "negative": encode(""), "cfg": CFG}
    table = dode.table(
        model, **prompts, latent=EMPTY, steps="3", latents=2, scale=2, scheduler="simple", prediction="noise"
    )
    drawn.clear()
    assert table.model["family"] == "demo-pictures"
    assert table.model["prediction_type"] == "flow"
    assert same_checkpoint(table.model["fingerprint"], model_facts(model)["fingerprint"])
    settings = {"steps": 3, "solver": "any", "seed": 9} | prompts
    (latent,) = dode.run(
        dode.pack.DodeKSampler, model=model, table=table, latent_image=EMPTY, denoise=1.0, **settings
    )
    assert latent["samples"].shape == (1, 4, 16, 16)
    compared = dode.run(
        dode.pack.CompareSamplers,
        model=model,
        table=table,
        latent=EMPTY,
        vae=vae,
        pictures=2,
        scale=4,
        **settings,
    )
    stock, by_dode, teacher = (result["samples"] for result in compared[2:])
    for latents in (stock, by_dode):  # near it, as far as three steps and a fit on two latents go
        assert 0 < rms(latents, teacher) < 0.6 * teacher.std()
    assert compared[0].std() > 0.1
    assert len(drawn) == 1
    digits = dode.run(dode.pack.DemoModel, kind="flow", digit=1)[0]
    with pytest.raises(DodeError, match="family"):
        dode.run(
            dode.pack.DodeKSampler, model=digits, table=table, latent_image=EMPTY, denoise=1.0, **settings
        )
