"""The demo's networks: a U-Net, as the digits have it, and a classifier for 16×16 images."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

_EMBEDDING = 96
_GROUPS = 8


class Level(nn.Module):
    """A resolution of a U-Net and all below it: blocks, half the resolution, blocks beside what was before it.

    Args:
        widths: channels at each resolution, the highest first; at least two.
        embedding: size of the embedding that every block gets.
    """

    def __init__(self, widths: Sequence[int], embedding: int) -> None:
        super().__init__()
        here, below = widths[:2]
        self.encoder = nn.ModuleList([ResidualBlock(here, here, embedding) for _ in range(2)])
        self.down = nn.Conv2d(here, below, 3, stride=2, padding=1)
        lowest = [
            ResidualBlock(below, below, embedding),
            SelfAttention(below),
            ResidualBlock(below, below, embedding),
        ]
        further = [SelfAttention(below), Level(widths[1:], embedding)] if len(widths) > 2 else lowest
        self.middle = nn.ModuleList(further)
        self.up = nn.Conv2d(below, here, 3, padding=1)
        self.decoder = nn.ModuleList(
            [ResidualBlock(2 * here, here, embedding), ResidualBlock(here, here, embedding)]
        )

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
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
        return h


class UNet(Level):
    """A U-Net that knows the timestep. What its output means is up to its training.

    Args:
        channels: of x.
        widths: channels at each resolution, the highest first; at least two.
        embedding: size of the embedding of the timestep.
        label: embeds what a latent is to show, (B, …) to (B, embedding).
    """

    def __init__(
        self, channels: int, widths: Sequence[int], embedding: int, label: nn.Module | None = None
    ) -> None:
        super().__init__(widths, embedding)
        self.time = TimestepEmbedding(embedding)
        self.label = label
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.leave = nn.Sequential(
            nn.GroupNorm(_GROUPS, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels, 3, padding=1)
        )
        # At high σ the answer is nearly the input itself, which the normalisations inside cannot pass on.
        self.input_gain = nn.Linear(embedding, channels)
        for last in (self.leave[-1], self.input_gain):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, in which `x` must come."""
        return self.enter.weight.dtype

    def forward(  # type: ignore[override] # a network is called with other things than a block
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, **_: Any
    ) -> Tensor:
        """The prediction for `x`, of its shape.

        Args:
            x: (B, C, H, W), in the weights' dtype; H and W divide by 2 for each resolution but the first.
            timesteps: (B,) from 0 to 1000, fractions allowed; float32 or finer, whatever the weights' dtype.
            y: (B, …), what the latents are to show, for a network with `label`.
            _: what ComfyUI passes to every network (context, control, transformer_options); has no effect.
        """
        embedding = self.time(timesteps)
        if self.label is not None:
            embedding = embedding + self.label(y)
        h = super().forward(self.enter(x), embedding)
        prediction: Tensor = self.leave(h) + self.input_gain(embedding)[:, :, None, None] * x
        return prediction


class DigitUNet(UNet):
    """The digits' U-Net, 0.93 million parameters, trained on 4×8×8. Its `y` is (B,) int64, a digit or `UNCONDITIONAL`."""

    def __init__(self) -> None:
        super().__init__(LATENT_CHANNELS, (64, 96), _EMBEDDING, nn.Embedding(CLASSES + 1, _EMBEDDING))


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
    """Two convolutions; the embedding, if there is one, scales and shifts what lies between them (FiLM)."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int | None = None) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(_GROUPS, channels_in)
        self.convolution_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * channels_out) if embedding else None
        self.norm_2 = nn.GroupNorm(_GROUPS, channels_out)
        self.convolution_2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.norm_2(self.convolution_1(functional.silu(self.norm_1(x))))
        if self.film is not None and embedding is not None:
            scale, shift = self.film(functional.silu(embedding))[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        h = self.convolution_2(functional.silu(h))
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
