"""Training goes on where it stopped, and writes files that the loader reads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from dode_nodes.demo.colour import emoji, train
from dode_nodes.demo.colour.landscapes import SCENES, draw
from dode_nodes.demo.colour.models import load_autoencoder, load_colour_model


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """What the command line needs beside a network's name, with three emoji of noise and few landscapes."""
    images = torch.randint(256, (3, 4, 96, 96), dtype=torch.uint8)
    monkeypatch.setattr(emoji, "fetch_package", lambda path: path)
    monkeypatch.setattr(emoji, "load_emoji", lambda path: images)
    monkeypatch.setattr(train, "_BATCH", dict.fromkeys(train.STEPS, 2))
    monkeypatch.setattr(train, "_MEASURED", 64)
    monkeypatch.setattr(train, "_LANDSCAPES", 70)
    return ["--steps", "2", "--out", str(tmp_path), "--checkpoints", str(tmp_path)]


def test_the_networks_are_trained_one_after_another_and_load(tmp_path, arguments):
    for name in ("autoencoder", "eps", "flow"):
        train.main([name, *arguments])
        with safe_open(tmp_path / f"colour_{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
            kinds = {file.get_tensor(key).dtype for key in file.keys() if key not in ("mean", "deviation")}  # noqa: SIM118
        assert metadata["command"] == f"python -m dode_nodes.demo.colour.train {name} --seed 0 --steps 2"
        assert metadata["dataset"] == train._DATASET[name]
        assert kinds == {torch.float16}
    assert json.loads(metadata["pictures"]) == [" ".join(words) for words in SCENES]

    flow = load_colour_model("flow", folder=tmp_path)
    latents = flow.denoiser(3.0)(flow.noise([0]), torch.ones(1), labels=flow.labels(["night sea"]))
    assert flow.decode(latents).shape == (1, 3, 64, 64)
    eps = load_colour_model("eps", folder=tmp_path)
    assert eps.decode(eps.denoiser()(eps.noise([0]), torch.ones(1))).shape == (1, 3, 16, 16)


def test_latents_are_normalised_over_the_pictures(tmp_path, arguments):
    train.main(["autoencoder", *arguments])
    autoencoder = load_autoencoder(tmp_path)
    torch.manual_seed(0)
    latents = autoencoder.encode(draw(SCENES[::4]))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.3, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.3, rtol=0)


def test_prompts_keep_some_words_all_or_none():
    torch.manual_seed(0)
    words = torch.tensor([[1, 2, 3, 0]]).expand(4000, 4)
    kept = train._some_words(words)
    assert set(kept.unique().tolist()) == {0, 1, 2, 3}
    assert not kept[:, 3].any()
    count = (kept > 0).sum(dim=1)
    shares = torch.bincount(count, minlength=4) / 4000
    assert (shares > 0.1).all()
    assert shares[0] < 0.3
