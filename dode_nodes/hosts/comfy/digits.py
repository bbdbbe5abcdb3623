"""The embedded models of digits as ComfyUI's MODEL, CONDITIONING and VAE."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...demo.models import load_demo_model
from ...demo.networks import LATENT_CHANNELS, UNCONDITIONAL, UNet
from ...demo.vae import SCALE, SHIFT, decode_to_picture, encode
from .embedded import EmbeddedConfig, patcher_of

ENLARGE = 4
"""The VAE shows a 16×16 digit as 64×64 pixels, so that a 64×64 empty latent (8×8) fits."""


class DigitLatents(comfy.latent_formats.LatentFormat):
    """Four channels, one for each pixel of a 2×2 square; previewed by their mean."""

    latent_channels = LATENT_CHANNELS
    latent_rgb_factors = [[2 / SCALE / LATENT_CHANNELS] * 3] * LATENT_CHANNELS
    latent_rgb_factors_bias = [2 * SHIFT - 1] * 3


class DigitConfig(EmbeddedConfig):
    """The digits' family."""

    latent_format = DigitLatents


class ClassFromContext(nn.Module):
    """Hands the network its class, which ComfyUI carries as a conditioning of one number."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.network.dtype

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **kwargs: Any) -> Tensor:
        """The network's prediction; ``context`` is ``[B, tokens, 1]``."""
        return self.network(x, timesteps, context[:, 0, 0].round().long())


def demo_patcher(kind: str) -> ModelPatcher:
    """The embedded "eps" or "flow" model, as a loader node would return it."""
    return patcher_of(ClassFromContext(load_demo_model(kind).network), kind, DigitConfig())


def class_conditioning(digit: int) -> list[list[Any]]:
    """CONDITIONING for a digit, or for no class (``UNCONDITIONAL``)."""
    return [[torch.full((1, 1, 1), float(digit)), {}]]


def unconditional() -> list[list[Any]]:
    """CONDITIONING for no class: the negative."""
    return class_conditioning(UNCONDITIONAL)


class DigitVae:
    """What VAE Decode and VAE Encode call."""

    def decode(self, samples: Tensor) -> Tensor:
        """Pictures ``[B, H, W, 3]`` in 0…1 of latents ``[B, 4, H/8, W/8]``."""
        pictures = F.interpolate(decode_to_picture(samples.float()), scale_factor=ENLARGE, mode="bicubic")
        return pictures.clamp(0, 1).movedim(1, -1).expand(-1, -1, -1, 3).contiguous()

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pictures, whose sides are multiples of 8."""
        grey = pixels[..., :3].mean(-1).unsqueeze(1)
        return encode(F.interpolate(grey, scale_factor=1 / ENLARGE, mode="area"))
