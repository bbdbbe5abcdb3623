"""Fingerprints of the first tables still tell their checkpoint from others."""

from __future__ import annotations

import pytest
import torch

from dode_nodes.tables.old_fingerprint import is_of, is_old

LAYOUT = "d1c0412344c962e5"
OLD = {
    "0.1's first": {"layout": LAYOUT, "values": [-0.0040875, -0.18219, 0.079674]},
    "a6fb3e3's": {
        "layout": LAYOUT,
        "format": "float32",
        "values": [-0.0040875, -0.18219, 0.079674],
        "more_values": [
            0.0029916, -0.059122, 0.054933, 0.050542, 0.10838, -0.074573, 0.043613, 0.10955, 0.019133, -0.0025849,
            -0.10389, 0.060558, 0.065133, -0.027643, -0.0072891,
        ],
    },
    "3a9232a's": {
        "layout": LAYOUT,
        "values": [-0.00408748304, -0.182193205, 0.079674162],
        "more_values": [
            0.00299161836, -0.0591222644, 0.0549330227, 0.0505421944, 0.108382814, -0.0745732263, 0.0436128825,
            0.109553695, 0.0191326421, -0.00258494983, -0.103885368, 0.0605578125, 0.0651325732, -0.0276426319,
            -0.00728908181,
        ],
    },
}  # fmt: skip
"""What these versions of the code, by their commits, made of ``weights()``."""
SHAPES = {"in.weight": (8, 4, 3, 3), "to_q.weight": (8, 8), "to_q.bias": (8,), "out.weight": (4, 8, 1, 1)}


def weights(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"diffusion_model.{name}": torch.randn(shape, generator=generator) * 0.1
        for name, shape in SHAPES.items()
    }


@pytest.fixture(params=OLD)
def old(request):
    return OLD[request.param]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_the_checkpoint_is_recognised_in_every_format(dtype, old):
    assert is_old(old)
    assert is_of(old, {name: weight.to(dtype) for name, weight in weights().items()}) is True


def test_another_seed_and_another_layout_are_another_checkpoint(old):
    assert is_of(old, weights(seed=1)) is False
    renamed = {name.replace("to_q", "q"): weight for name, weight in weights().items()}
    assert is_of(old, renamed) is False


def test_weights_without_values_are_left_out(old):
    partly = {name: weight.to("meta") if "to_q" in name else weight for name, weight in weights().items()}
    assert is_of(old, partly) is True
    assert is_of(old, {name: weight.to("meta") for name, weight in weights().items()}) is None
    assert is_of(old, {}) is None


def test_a_present_fingerprint_is_not_old():
    assert not is_old({})
    assert not is_old({"ascending": 0, "samples": []})
