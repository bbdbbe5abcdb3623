"""Landscapes to train on, made of fractal noise: as many as there are seeds, and nobody's but ours.

What words leave open is drawn at random: where the horizon and the sun are, the shapes of ridges and clouds, the hues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

SIZE = 64
DATASET = "landscapes drawn by dode_nodes.demo.colour.landscapes"

TIMES = ("dawn", "day", "sunset", "night")
"""In their order: each has something of one of its neighbours."""
_PALETTES = {  # zenith, horizon, clouds, what the ground is lit by, sun or moon
    "dawn": "5b6fb0 f6b8a8 f3c9cf b09ab0 ffe3c0",
    "day": "2f7fd6 bfe3f6 ffffff ffffff fff6d0",
    "sunset": "4a3a78 ff8a3c e8657a b0705a fff0a0",
    "night": "060a20 24356a 3a4468 2c3a66 f4f1e0",
}
_SNOW = "e8eef8 cfdcf0"
_AUTUMN = "d9a24a a8451c"
_WATER = "5a9cc4 123f66"


@dataclass(frozen=True)
class _Ground:
    """A kind of ground; none at all is open water.

    Attributes:
        colours: far and near, as hexadecimal digits.
        layers: ridges, one before the other.
        height: of a ridge, its standard deviation as a share of the picture's height.
        roughness: amplitudes fall with frequency to this power: the lower, the more jagged.
        above: how much higher than the horizon its ridges are.
        grain: how much longer its texture is than high.
        steep: whether slopes have a bright and a dark side.
        seasons: words that change its colours.
    """

    colours: str = ""
    layers: int = 0
    height: float = 0.0
    roughness: float = 0.0
    above: float = 0.0
    grain: float = 1.2
    steep: bool = False
    seasons: tuple[str, ...] = ()


GROUNDS = {
    "mountain": _Ground("8a93a8 57503f", 3, 0.11, 1.45, above=0.1, steep=True, seasons=("snow",)),
    "hill": _Ground("8fb56a 3f7a2e", 3, 0.05, 2.2, seasons=("snow", "autumn")),
    "desert": _Ground("e6bf84 c98a45", 3, 0.05, 2.6, grain=2.5, steep=True),
    "sea": _Ground(),
    "lake": _Ground("7f9aa0 3f6a3a", 1, 0.08, 1.4, above=0.06, seasons=("snow", "autumn")),
    "forest": _Ground("5f8a6a 14401f", 3, 0.03, 2.0, grain=0.7, seasons=("snow", "autumn")),
}
_MIRRORS = {"lake": 0.75, "sea": 0.4}
"""What shows the sky, and how much of it."""

_Y, _X = torch.meshgrid(*2 * [(torch.arange(SIZE) + 0.5) / SIZE], indexing="ij")
"""From 0 to 1, downwards and to the right."""


def _scenes() -> list[tuple[str, ...]]:
    found = []
    for time, ground in product(TIMES, GROUNDS):
        night = time == "night"
        skies = ((), ("cloud",), ("star",)) if night else ((), ("cloud",), ("fog",))
        discs = ((), ("moon",) if night else ("sun",))
        seasons = ((), *[(season,) for season in GROUNDS[ground].seasons])
        found += [
            (time, ground, *sky, *disc, *season) for sky, disc, season in product(skies, discs, seasons)
        ]
    return found


SCENES = _scenes()
"""All that is drawn, as words: a time and a ground, then what is in the sky, and a season."""


def draw(scenes: Sequence[tuple[str, ...]]) -> Tensor:
    """A picture of each of these of `SCENES`, as torch's generator has it, (B, 3, 64, 64) in [−1, 1]."""
    return torch.stack([2 * _Scene(words).draw().clamp(0, 1) - 1 for words in scenes])


class _Scene:
    """One picture in the making; colours are (3, 1, 1), pictures (3, 64, 64), from 0 to 1."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words
        time, self.ground = words[:2]
        self.spread = 0.025 if time == "night" else 0.05  # of colours
        low_sun = time in ("dawn", "sunset")
        self.zenith, self.haze, self.cloud, self.light, self.disc = self._palette(time)
        self.horizon = _between(0.42, 0.66)
        self.disc_x = _between(0.12, 0.88)
        self.disc_y = self.horizon * (_between(0.3, 0.95) if low_sun else _between(0.15, 0.6))
        self.has_disc = "sun" in words or "moon" in words
        self.glitter = 0.5 if time == "day" else 0.9

    def draw(self) -> Tensor:
        picture = self._sky()
        for layer in range(GROUNDS[self.ground].layers):
            picture = self._ridge(picture, layer)
        if self.ground in _MIRRORS:
            picture = self._water(picture)
        return self._fog(picture) if "fog" in self.words else picture

    def _palette(self, time: str) -> tuple[Tensor, ...]:
        """Its time's colours, up to half-way to those of the time before or after."""
        place = TIMES.index(time)
        other = TIMES[(place + (1 if torch.rand(()) < 0.5 else -1)) % len(TIMES)]
        mixed = torch.lerp(_colours(_PALETTES[time]), _colours(_PALETTES[other]), 0.5 * _between(0, 1) ** 2)
        zenith, haze, cloud, light, disc = self._varied(mixed)
        return zenith, haze, cloud, light.clamp(0.1, 1), disc

    def _varied(self, colours: Tensor) -> Tensor:
        return colours + self.spread * torch.randn(colours.shape)

    def _sky(self) -> Tensor:
        down = (_Y / self.horizon).clamp(0, 1) ** _between(0.7, 1.6)
        sky = torch.lerp(self.zenith, self.haze, down)
        if "star" in self.words:
            sky = torch.lerp(sky, torch.ones(3, 1, 1), (_stars() * (1 - down)).clamp(0, 1))
        if self.has_disc:
            sky = torch.lerp(sky, self.disc, self._disc_and_glow())
        if "cloud" in self.words:
            field = _fractal(1.7, stretch=2.2)
            cover = ((field - _between(-0.5, 0.5)) * 1.4).clamp(0, 1) * (0.95 - 0.57 * down)
            lit = 0.06 * _fractal(1.7, stretch=2.2) + 0.12 * (field - field.roll(3, 0))
            sky = torch.lerp(sky, self.cloud + lit, cover)
        return sky

    def _disc_and_glow(self) -> Tensor:
        outside = ((_X - self.disc_x) ** 2 + (_Y - self.disc_y) ** 2).sqrt() - _between(0.05, 0.09)
        glow = 0.55 * torch.exp(-outside.clamp(min=0) / (0.14 if "sun" in self.words else 0.06))
        return torch.maximum(glow, _soft(-outside))

    def _ridge(self, picture: Tensor, layer: int) -> Tensor:
        """Before all that is drawn so far; the first is the farthest."""
        ground = GROUNDS[self.ground]
        near = (layer + 1) / max(ground.layers, 2)
        edge = self.horizon - ground.above - ground.height * _profile(ground.roughness)
        if ground.layers > 1:
            edge = edge + 0.42 * (near - 0.5)
        if self.ground == "forest":
            edge = edge - _firs() * (0.5 + 0.7 * near)
        texture = _fractal(1.4, stretch=ground.grain)
        shade = 1 + 0.1 * texture
        if ground.steep:
            shade = shade + (3 * (edge.roll(-1) - edge.roll(1))).clamp(-0.2, 0.2)
        far_colour, near_colour = self._varied(_colours(self._ground_colours()))
        colour = torch.lerp(far_colour, near_colour, near) * self.light
        if self.ground == "mountain" and "snow" in self.words and layer < 2:
            white = _colours(_SNOW)[0] * (0.4 + 0.6 * self.light)
            colour = torch.lerp(colour, white, _soft(edge.min() + 0.13 + 0.03 * texture - _Y, 0.5))
        haze = 0.55 * (1 - near) + (0.2 if "fog" in self.words else 0)
        return torch.lerp(picture, torch.lerp(colour * shade, self.haze, haze), _soft(_Y - edge))

    def _ground_colours(self) -> str:
        if "autumn" in self.words:
            return _AUTUMN
        return _SNOW if "snow" in self.words and self.ground != "mountain" else GROUNDS[self.ground].colours

    def _water(self, picture: Tensor) -> Tensor:
        """What is above the horizon again, upside down, on waves."""
        near = (_Y - self.horizon).clamp(min=0) / (1 - self.horizon)
        wave = _fractal(1.2, stretch=6.0) * (0.3 + near)
        rows = ((2 * self.horizon - _Y) * SIZE - 0.5 + 1.6 * wave).clamp(0, SIZE - 1).round().long()
        mirrored = picture.gather(1, rows.expand_as(picture))
        shallow, deep = self._varied(_colours(_WATER))
        water = torch.lerp(torch.lerp(shallow, deep, near) * self.light, mirrored, _MIRRORS[self.ground])
        water = water * (1 + 0.16 * wave)
        if self.has_disc:
            below_disc = torch.exp(-(((_X - self.disc_x) / (0.04 + 0.12 * near)) ** 2))
            bright = below_disc * (0.35 + 0.35 * wave).clamp(0, 1)
            water = torch.lerp(water, self.disc, self.glitter * bright)
        return torch.lerp(picture, water, _soft(_Y - self.horizon))

    def _fog(self, picture: Tensor) -> Tensor:
        band = 0.75 * torch.exp(-(((_Y - self.horizon) / 0.16) ** 2))
        dense = (band * (1 + 0.35 * _fractal(1.8, stretch=3.0))).clamp(0, 0.95)
        return torch.lerp(picture, torch.lerp(self.haze, self.cloud, 0.6), dense)


def _colours(text: str) -> Tensor:
    """(N, 3, 1, 1) in [0, 1]."""
    return torch.tensor([list(bytes.fromhex(colour)) for colour in text.split()])[:, :, None, None] / 255


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _soft(depth: Tensor, slope: float = 1.0) -> Tensor:
    """How much of a pixel is inside, where its centre is so far inside, as a share of the picture's height."""
    return (slope * (depth * SIZE) + 0.5).clamp(0, 1)


def _fractal(roughness: float, stretch: float) -> Tensor:
    """Noise (64, 64) of mean 0 and variance 1 whose amplitudes fall with frequency; longer than high by `stretch`."""
    size = 2 * SIZE  # of which a quarter is used: it repeats itself at its edges
    y = torch.fft.fftfreq(size)[:, None] * size
    x = torch.fft.rfftfreq(size)[None] * size * stretch
    return _unit(torch.fft.irfft2(torch.fft.rfft2(torch.randn(size, size)) * _falling(x.hypot(y), roughness)))


def _profile(roughness: float) -> Tensor:
    """The same along a line, (64,)."""
    size = 2 * SIZE
    frequencies = torch.fft.rfftfreq(size) * size
    return _unit(torch.fft.irfft(torch.fft.rfft(torch.randn(size)) * _falling(frequencies, roughness)))


def _falling(frequencies: Tensor, roughness: float) -> Tensor:
    return torch.where(frequencies > 0, frequencies.clamp(min=1) ** -roughness, 0)


def _unit(field: Tensor) -> Tensor:
    part = field[(slice(SIZE),) * field.ndim]
    return (part - part.mean()) / part.std()


def _firs() -> Tensor:
    """How high a row of trees is, (64,)."""
    count = 14
    x = (torch.arange(count) + 0.9 * torch.rand(count)) / count
    height = 0.08 + 0.12 * torch.rand(count)
    slope = 2.2 + 1.2 * torch.rand(count)
    away = (_X[0] - x[:, None]).abs()
    return (height[:, None] - away * slope[:, None]).amax(0).clamp(min=0)


def _stars() -> Tensor:
    """A few lights, two pixels wide, (64, 64)."""
    half = SIZE // 2
    lights = (torch.rand(half, half) < 0.025) * (0.3 + 0.7 * torch.rand(half, half))
    return 1.6 * functional.interpolate(lights[None, None], size=(SIZE, SIZE), mode="bicubic")[0, 0]
