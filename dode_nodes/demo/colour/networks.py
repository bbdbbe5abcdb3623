"""The networks of the colour pictures: a lossy autoencoder, and the U-Nets' sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..networks import ResidualBlock, UNet

LATENT_CHANNELS = 4

_WIDE, _NARROW = 96, 48  # channels at a quarter and at half of a picture's resolution
_EMBEDDING = 256


class Autoencoder(nn.Module):
    """Pictures (B, 3, H, W) in [−1, 1] to latents (B, 4, H/4, W/4) and back, with loss; 1.2 million parameters.

    Attributes:
        mean, deviation: (4, 1, 1), of what the encoder gives for the pictures that it was trained on: latents are
            scaled by them to mean 0 and standard deviation 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, _NARROW, 3, padding=1),
            ResidualBlock(_NARROW, _NARROW),
            nn.Conv2d(_NARROW, _WIDE, 3, stride=2, padding=1),
            ResidualBlock(_WIDE, _WIDE),
            ResidualBlock(_WIDE, _WIDE),
            nn.Conv2d(_WIDE, LATENT_CHANNELS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, _WIDE, 3, padding=1),
            *[ResidualBlock(_WIDE, _WIDE) for _ in range(3)],
            nn.Conv2d(_WIDE, 4 * _NARROW, 3, padding=1),
            nn.PixelShuffle(2),
            *[ResidualBlock(_NARROW, _NARROW) for _ in range(2)],
            nn.Conv2d(_NARROW, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(LATENT_CHANNELS, 1, 1))
        self.register_buffer("deviation", torch.ones(LATENT_CHANNELS, 1, 1))

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents of pictures in [−1, 1]."""
        latents: Tensor = (self.encoder(pictures) - self.mean) / self.deviation
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents; nothing is clamped, so they may leave [−1, 1] a little."""
        pictures: Tensor = self.decoder(latents * self.deviation + self.mean)
        return pictures


class WordsEmbedding(nn.Module):
    """Which words a picture is to show, in whatever order: (B, W) numbers of words, 0 for none, to (B, size)."""

    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(words, size))
        self.layers = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, y: Tensor) -> Tensor:
        given = (y > 0).to(self.table.dtype)[:, :, None]
        count = given.sum(dim=1).clamp(min=1)
        embedding: Tensor = self.layers((self.table[y] * given).sum(dim=1) / count.sqrt())
        return embedding


def plain_unet() -> UNet:
    """For pictures (B, 3, 16, 16) without prompts; 0.6 million parameters."""
    return UNet(3, (48, 80), 96)


def words_unet(words: int) -> UNet:
    """For latents (B, 4, 16, 16) and texts of a vocabulary of so many words; 6 million parameters."""
    return UNet(LATENT_CHANNELS, (64, 128, 256), _EMBEDDING, WordsEmbedding(words, _EMBEDDING))
