"""Emoji come out of npm's package, and are drawn over a background of their own."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile

import pytest
import torch

from dode_nodes.demo.colour import emoji
from dode_nodes.demo.colour.emoji import draw, load_emoji

COLOURS = {"1f431": (255, 190, 50), "2764-fe0f": (225, 40, 60)}
"""Cat face and heart, each a disc of one colour."""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two pictures and a file that is none of ours."""
    image, drawing = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageDraw")
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, colour in {**COLOURS, "1f9ff": (0, 0, 0)}.items():
            disc = image.new("RGBA", (256, 256), (0, 0, 0, 0))
            drawing.Draw(disc).ellipse((16, 16, 240, 240), fill=(*colour, 255))
            content = io.BytesIO()
            disc.save(content, "WEBP", lossless=True)
            member = tarfile.TarInfo(f"package/assets/{name}.webp")
            member.size = len(content.getvalue())
            archive.addfile(member, io.BytesIO(content.getvalue()))
    digest = hashlib.sha512(path.read_bytes()).digest()
    monkeypatch.setattr(emoji, "_SHA512", base64.b64encode(digest).decode())
    monkeypatch.setattr(emoji, "GROUPS", {"animal": "1f431", "heart": "2764"})
    return path


def test_they_come_in_the_order_of_their_code_points(package):
    images = load_emoji(package)
    assert images.shape == (2, 4, 96, 96)
    assert (images[:, :3, 48, 48] - torch.tensor([COLOURS["2764-fe0f"], COLOURS["1f431"]])).abs().max() <= 1
    assert images[:, 3, 48, 48].tolist() == [255, 255]
    assert images[:, 3, 0, 0].tolist() == [0, 0]


def test_another_file_is_refused(package):
    package.write_bytes(package.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"not the file at https://registry\.npmjs\.org"):
        load_emoji(package)


def test_drawn_pictures_show_the_emoji_over_light_backgrounds(package):
    torch.manual_seed(0)
    images = load_emoji(package)[1:].expand(50, -1, -1, -1)
    drawn = draw(images)
    assert drawn.shape == (50, 3, 64, 64)
    assert drawn.abs().max() <= 1
    yellow = 2 * torch.tensor([255, 190, 50]) / 255 - 1
    assert (drawn[:, :, 32, 32] - yellow).abs().max() < 0.02
    corners = drawn[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 0.2
    assert corners.mean(dim=(1, 2)).std() < 0.1
    assert corners[:, :, 0].std(dim=0).min() > 0.1  # of many hues


def test_every_group_names_characters():
    codes = emoji._all_codes()
    assert len(codes) > 350
    assert 0x1F63A in codes
