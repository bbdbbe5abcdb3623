"""What the network without prompts is trained on: Microsoft's Fluent emoji, 3-D rendered, MIT, out of npm's package."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

PACKAGE = "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz"
_SHA512 = "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="
DATASET = f"Microsoft Fluent emoji 3D (MIT), {PACKAGE}"

SIZE = 64
_STORED = 96  # pixels that an emoji is kept at: enough for its largest appearance

GROUPS = {
    "face": "1f600-1f644 1f910-1f917 1f920-1f925 1f927-1f92f 1f970-1f976 1f978-1f97a 1f9d0",
    "animal": (
        "1f638-1f640 1f648-1f64a 1f400-1f412 1f415-1f41e 1f422 1f428-1f43c 1f43f 1f980-1f982 1f984 1f987 "
        "1f98a-1f98f 1f992-1f994 1f997-1f999 1f99b 1f99d-1f99e 1f9a1 1f9a3 1f9a5-1f9a8 1f9ab-1f9ae"
    ),
    "fish": "1f41f-1f421 1f42c 1f433 1f988 1f990-1f991 1f419",
    "bird": "1f413-1f414 1f423-1f427 1f983 1f985-1f986 1f989 1f99a 1f99c 1f9a2 1f9a4 1f9a9",
    "insect": "1f41b-1f41e 1f98b 1f997",
    "dinosaur": "1f995-1f996",
    "fruit": "1f345 1f347-1f353 1f95d 1f965 1f96d 1fad0 1fad2",
    "vegetable": "1f336 1f33d 1f344 1f346 1f951-1f952 1f954-1f955 1f966 1f96c 1f9c4-1f9c5 1fad1",
    "sweet": "1f366-1f370 1f382 1f950 1f95e 1f967-1f968 1f96e-1f96f 1f9c1 1f9c7",
    "food": "1f32d-1f330 1f354-1f357 1f359 1f35e-1f35f 1f363 1f37f 1f95a 1f95c 1f95f 1f969-1f96a 1f9c0 1f9c6 1f9c8",
    "drink": "1f375 1f377-1f37a 1f37c 1f95b 1f964 1f9c3 1f9cb 2615",
    "flower": "1f337-1f33c 1f490 1fab7",
    "plant": "1f331-1f335 1f33f-1f343 1f384 1fab4",
    "sky": "1f30d-1f30f 1f311-1f31f 2600-2601",
    "heart": "1f493-1f498 1f499-1f49c 1f49e 1f5a4 1f90d-1f90e 1f9e1 2764",
    "circle": "1f534-1f535 1f7e0-1f7e4",
    "square": "1f7e5-1f7eb",
    "book": "1f4d5 1f4d7-1f4d9",
    "feast": "1f380-1f383 1f385 1f388 1f389 2603",
    "ball": "26bd-26be",
}
"""What there is of a kind, by code points. What is in no group is not trained on."""


def load_emoji(package: Path) -> Tensor:
    """The pictures of `GROUPS` out of npm's package, a .tgz, in the order of their code points.

    Returns:
        Red, green, blue, each times alpha, and alpha, (N, 4, 96, 96) uint8.

    Raises:
        ValueError: it is not the package that is meant.
    """
    from PIL import Image

    content = package.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != _SHA512:
        raise ValueError(f"{package}: not the file at {PACKAGE}")
    images = []
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {
            Path(member.name).stem.removesuffix("-fe0f"): member for member in archive if member.isfile()
        }
        for code in _all_codes():
            file = archive.extractfile(files[f"{code:04x}"])
            assert file is not None  # noqa: S101 - a regular file of a known archive
            with Image.open(file) as image:
                small = image.convert("RGBa").resize((_STORED, _STORED), Image.Resampling.LANCZOS)
            pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
            images.append(pixels.view(_STORED, _STORED, 4).permute(2, 0, 1))
    return torch.stack(images)


def fetch_package(path: Path) -> Path:
    """Downloads npm's package to `path` unless there is a file already."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(PACKAGE) as answer:
            path.write_bytes(answer.read())
    return path


def _all_codes() -> list[int]:
    return sorted({code for ranges in GROUPS.values() for code in _codes(ranges)})


def _codes(ranges: str) -> Iterator[int]:
    for part in ranges.split():
        first, _, last = part.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


def draw(images: Tensor) -> Tensor:
    """Pictures as they are trained on: each over its own pastel background, a little moved, turned and enlarged.

    Args:
        images: (B, 4, 96, 96) uint8, as `load_emoji` has them.

    Returns:
        (B, 3, 64, 64) in [−1, 1].
    """
    count = len(images)
    grid = functional.affine_grid(_random_places(count), [count, 4, SIZE, SIZE], align_corners=False)
    seen = functional.grid_sample(images.float() / 255, grid, mode="bilinear", align_corners=False)
    colour, alpha = seen[:, :3], seen[:, 3:]
    return 2 * (colour + (1 - alpha) * _random_backgrounds(count)).clamp(0, 1) - 1


def _random_places(count: int) -> Tensor:
    """Where to look for each pixel, (count, 2, 3): shifts, turns, sizes, and the mirror's."""
    angle = math.radians(9) * (2 * torch.rand(count) - 1)
    size = 1.05 + 0.2 * torch.rand(count)
    mirror = 1.0 - 2.0 * (torch.rand(count) < 0.5)
    shift = 0.1 * (2 * torch.rand(count, 2) - 1)
    rows = torch.stack([mirror * angle.cos(), -angle.sin(), mirror * angle.sin(), angle.cos()], 1)
    return torch.cat([(size[:, None] * rows).view(count, 2, 2), shift[:, :, None]], dim=2)


def _random_backgrounds(count: int) -> Tensor:
    """A pastel hue that fades a little to one side, (count, 3, 64, 64) in [0, 1]."""
    hue = 2 * math.pi * (torch.rand(count, 1) + torch.arange(3) / 3)
    side = 2 * math.pi * torch.rand(count, 1, 1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    fade = 0.05 * (side.cos() * x + side.sin() * y)
    return (0.83 + 0.13 * hue.cos())[:, :, None, None] + fade[:, None]
