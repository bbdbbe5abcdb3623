"""The embedded models of digits as ComfyUI's MODEL, CONDITIONING and VAE."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...demo.models import load_demo_model
from ...demo.networks import LATENT_CHANNELS, UNCONDITIONAL, UNet
from ...demo.vae import SCALE, SHIFT, decode_to_picture, encode

ENLARGE = 4
"""The VAE shows a 16×16 digit as 64×64 pixels, so that a 64×64 empty latent (8×8) fits."""


class DigitLatents(comfy.latent_formats.LatentFormat):
    """Four channels, one for each pixel of a 2×2 square; previewed by their mean."""

    latent_channels = LATENT_CHANNELS
    latent_rgb_factors = [[2 / SCALE / LATENT_CHANNELS] * 3] * LATENT_CHANNELS
    latent_rgb_factors_bias = [2 * SHIFT - 1] * 3


class DigitConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks of a model's family."""

    unet_config = {"disable_unet_model_creation": True, "in_channels": LATENT_CHANNELS}  # noqa: RUF012
    sampling_settings = {"shift": 1.0}  # noqa: RUF012
    latent_format = DigitLatents
    memory_usage_factor = 0.1

    def __init__(self) -> None:
        super().__init__(self.unet_config)


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


def demo_patcher(kind: str) -> comfy.model_patcher.ModelPatcher:
    """The embedded "eps" or "flow" model, as a loader node would return it."""
    types = {"eps": comfy.model_base.ModelType.EPS, "flow": comfy.model_base.ModelType.FLOW}
    model = comfy.model_base.BaseModel(DigitConfig(), model_type=types[kind])
    model.diffusion_model = ClassFromContext(load_demo_model(kind).network)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


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
