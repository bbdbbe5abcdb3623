"""The demo model: it draws the digit that it is asked for, and its VAE loses nothing that matters."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import avg_pool2d

from dode_nodes.demo.models import load_classifier

pytestmark = pytest.mark.comfyui


@pytest.mark.parametrize(("kind", "scheduler"), [("eps", "karras"), ("flow", "simple")])
def test_it_draws_the_digit_that_was_asked_for(kind, scheduler, dode):
    import comfy.sample

    model, positive, negative, vae = dode.run(dode.pack.DemoModel, kind=kind, digit=7)
    latent = torch.zeros(4, 4, 8, 8)
    samples = comfy.sample.sample(
        model, comfy.sample.prepare_noise(latent, 3), 12, 2.0, "dpmpp_2m", scheduler, positive, negative,
        latent, seed=3, disable_pbar=True,
    )  # fmt: skip
    pictures = vae.decode(samples)
    assert pictures.shape == (4, 64, 64, 3)
    assert (pictures >= 0).all()
    assert (pictures <= 1).all()
    digits = avg_pool2d(pictures.movedim(-1, 1).mean(1, keepdim=True), 4)
    assert load_classifier()(digits).argmax(1).tolist() == [7] * 4
    assert vae.encode(pictures).sub(samples).square().mean().sqrt() < 0.2
