"""The embedded model of landscapes as ComfyUI's MODEL, CLIP and VAE."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...demo.colour.models import load_colour_model
from ...demo.colour.networks import LATENT_CHANNELS, Autoencoder
from ...demo.colour.vocabulary import Vocabulary
from ...demo.networks import UNet
from .embedded import EmbeddedConfig, patcher_of

ENLARGE = 2
"""The VAE shows 64×64 pixels as 128×128: with latents of 16×16 those are eight to a number, which every host's empty
latents have."""


class ColourLatents(comfy.latent_formats.LatentFormat):
    """Previewed by the linear map of latents to colours that is nearest to the decoder, by least squares."""

    latent_channels = LATENT_CHANNELS
    latent_rgb_factors = [  # noqa: RUF012
        [0.215, 0.011, -0.120],
        [0.154, 0.246, 0.138],
        [0.103, -0.009, -0.095],
        [-0.162, -0.172, -0.354],
    ]
    latent_rgb_factors_bias = [-0.081, -0.163, -0.086]  # noqa: RUF012


class ColourConfig(EmbeddedConfig):
    """The colour model's family."""

    latent_format = ColourLatents


class WordsFromContext(nn.Module):
    """Hands the network what its words were embedded as, which ComfyUI carries as a conditioning of one token."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network
        network.label = nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.network.dtype

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **kwargs: Any) -> Tensor:
        """The network's prediction; ``context`` is ``[B, tokens, size]``: repeated tokens change nothing."""
        return self.network(x, timesteps, context.mean(dim=1))


class WordsClip:
    """What CLIP Text Encode calls: words of the vocabulary, in any order."""

    def __init__(self, label: nn.Module, vocabulary: Vocabulary) -> None:
        self._label = label
        self._vocabulary = vocabulary

    def tokenize(self, text: str, **_: Any) -> Tensor:
        """The words' numbers, ``[1, W]``.

        Raises:
            DodeError: there is a word that the model does not know.
        """
        self._vocabulary.check(text)
        return self._vocabulary.numbers([text])

    def encode_from_tokens_scheduled(self, tokens: Tensor, **_: Any) -> list[list[Any]]:
        """CONDITIONING of one token, ``[1, 1, size]``."""
        with torch.no_grad():
            return [[self._label(tokens)[:, None], {}]]


class ColourVae:
    """What VAE Decode and VAE Encode call."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder

    def decode(self, samples: Tensor) -> Tensor:
        """Pictures ``[B, 8 H, 8 W, 3]`` in 0…1 of latents ``[B, 4, H, W]``."""
        pictures = (self._autoencoder.decode(samples.to(self._autoencoder.mean)) + 1) / 2
        pictures = F.interpolate(pictures, scale_factor=ENLARGE, mode="bicubic")
        return pictures.clamp(0, 1).movedim(1, -1).contiguous()

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pictures, whose sides are multiples of 8."""
        small = F.interpolate(pixels[..., :3].movedim(-1, 1), scale_factor=1 / ENLARGE, mode="area")
        return self._autoencoder.encode(2 * small.to(self._autoencoder.mean) - 1)


def load_colour() -> tuple[ModelPatcher, WordsClip, ColourVae]:
    """As a checkpoint loader would return them."""
    model = load_colour_model("flow")
    label, autoencoder = model.network.label, model.autoencoder
    assert label is not None  # noqa: S101 - the flow model has words, and latents of an autoencoder
    assert autoencoder is not None  # noqa: S101
    patcher = patcher_of(WordsFromContext(model.network), model.kind, ColourConfig())
    return patcher, WordsClip(label, model.vocabulary), ColourVae(autoencoder)
