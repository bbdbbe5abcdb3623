"""The demo's networks: a class-conditional U-Net for 4×8×8 latents and a classifier for 16×16 images."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
UNCONDITIONAL = CLASSES
"""The class index for "no class": classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598."""

LATENT_CHANNELS = 4
FEATURES = 64

_CHANNELS = 64  # at the latent's own resolution
_CHANNELS_BELOW = 96  # at half of it
_EMBEDDING = 96
_GROUPS = 8


class DigitUNet(nn.Module):
    """A U-Net of two resolutions, 0.93 million parameters. What its output means is up to its training."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimestepEmbedding(_EMBEDDING)
        self.label = nn.Embedding(CLASSES + 1, _EMBEDDING)
        self.enter = nn.Conv2d(LATENT_CHANNELS, _CHANNELS, 3, padding=1)
        self.encoder = nn.ModuleList([ResidualBlock(_CHANNELS, _CHANNELS) for _ in range(2)])
        self.down = nn.Conv2d(_CHANNELS, _CHANNELS_BELOW, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(_CHANNELS_BELOW, _CHANNELS_BELOW),
                SelfAttention(_CHANNELS_BELOW),
                ResidualBlock(_CHANNELS_BELOW, _CHANNELS_BELOW),
            ]
        )
        self.up = nn.Conv2d(_CHANNELS_BELOW, _CHANNELS, 3, padding=1)
        self.decoder = nn.ModuleList(
            [ResidualBlock(2 * _CHANNELS, _CHANNELS), ResidualBlock(_CHANNELS, _CHANNELS)]
        )
        self.leave = nn.Sequential(
            nn.GroupNorm(_GROUPS, _CHANNELS), nn.SiLU(), nn.Conv2d(_CHANNELS, LATENT_CHANNELS, 3, padding=1)
        )
        # At high σ the answer is nearly the input itself, which the normalisations inside cannot pass on.
        self.input_gain = nn.Linear(_EMBEDDING, LATENT_CHANNELS)
        for last in (self.leave[-1], self.input_gain):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, in which `x` must come."""
        return self.enter.weight.dtype

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor, **_: Any) -> Tensor:
        """The prediction for `x`, of its shape.

        Args:
            x: (B, 4, H, W) with even H and W, in the weights' dtype. Trained at 8×8.
            timesteps: (B,) from 0 to 1000, fractions allowed; float32 or finer, whatever the weights' dtype.
            y: (B,) int64, a digit or `UNCONDITIONAL`.
            _: what ComfyUI passes to every network (context, control, transformer_options); has no effect.
        """
        embedding = self.time(timesteps) + self.label(y)
        h = self.enter(x)
        for block in self.encoder:
            h = block(h, embedding)
        skip = h
        h = self.down(h)
        for block in self.middle:
            h = block(h, embedding)
        h = self.up(functional.interpolate(h, scale_factor=2.0))
        h = torch.cat([h, skip], dim=1)
        for block in self.decoder:
            h = block(h, embedding)
        prediction: Tensor = self.leave(h) + self.input_gain(embedding)[:, :, None, None] * x
        return prediction


class TimestepEmbedding(nn.Module):
    """Sines and cosines of the timestep, then two linear layers: (B,) to (B, `size`)."""

    def __init__(self, size: int, frequencies: int = 32) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, timesteps: Tensor) -> Tensor:
        # At most 0.1 rad per timestep: the network is to be smooth in σ between whole timesteps, too.
        exponents = torch.linspace(
            math.log(1e-3), math.log(0.1), self.frequencies, dtype=timesteps.dtype, device=timesteps.device
        )
        angles = timesteps[:, None] * exponents.exp()
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        embedding: Tensor = self.layers(waves.to(next(self.layers.parameters()).dtype))
        return embedding


class ResidualBlock(nn.Module):
    """Two convolutions; the embedding scales and shifts what lies between them (FiLM)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(_GROUPS, channels_in)
        self.convolution_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.film = nn.Linear(_EMBEDDING, 2 * channels_out)
        self.norm_2 = nn.GroupNorm(_GROUPS, channels_out)
        self.convolution_2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.convolution_1(functional.silu(self.norm_1(x)))
        scale, shift = self.film(functional.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.convolution_2(functional.silu(self.norm_2(h) * (1 + scale) + shift))
        sum_of_both: Tensor = self.skip(x) + h
        return sum_of_both


class SelfAttention(nn.Module):
    """Attention of every position to all others, four heads."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        split = "b (qkv heads c) y x -> qkv b heads (y x) c"
        q, k, v = rearrange(self.qkv(self.norm(x)), split, qkv=3, heads=self.heads)
        h = functional.scaled_dot_product_attention(q, k, v)
        joined = rearrange(h, "b heads (y x) c -> b (heads c) y x", y=x.shape[2])
        attended: Tensor = x + self.out(joined)
        return attended


class DigitClassifier(nn.Module):
    """Tells the ten digits apart, and carries the statistics of the real digits' features.

    Attributes:
        real_mean: (64,), the mean of `features` over the real digits.
        real_covariance: (64, 64), their covariance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURES, CLASSES)
        self.real_mean: Tensor
        self.real_covariance: Tensor
        self.register_buffer("real_mean", torch.zeros(FEATURES))
        self.register_buffer("real_covariance", torch.eye(FEATURES))

    def features(self, images: Tensor) -> Tensor:
        """(B, 64), the layer before the last, of images (B, 1, 16, 16) in [0, 1]."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, 10), of images (B, 1, 16, 16) in [0, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits
