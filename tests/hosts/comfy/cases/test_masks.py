"""Inpainting: what a mask protects stays as it was, with every kind of row."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Latent, Subject, ksampler, rms

pytestmark = pytest.mark.comfyui


@cache
def _tables(dode: Pack, kind: str) -> dict[bool, Any]:
    """Tables of a greedy row (False), and of its refined row (True)."""
    table = dode.distil(dode.demo(kind, side=4), scheduler="simple", steps="3", refine_budget=8.0)["table"]
    rows = {refined: [row for row in table.rows if row.is_refined == refined] for refined in (False, True)}
    return {refined: dode.library.LambdaTable(each, model=table.model) for refined, each in rows.items()}


def _half_masked(subject: Subject) -> Latent:
    """A picture of the model's, whose right half is kept."""
    picture = ksampler(subject, {"samples": torch.zeros(2, 4, 4, 4)}, steps=20, scheduler="simple")
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    return {"samples": picture, "noise_mask": mask}


@pytest.mark.parametrize("denoise", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("refined", [False, True])
def test_the_kept_half_is_kept(refined, kind, denoise, dode):
    subject = dode.demo(kind, side=4)
    latent = _half_masked(subject)
    result = dode.ksampler(subject, _tables(dode, kind)[refined], latent, steps=3, denoise=denoise)["samples"]
    assert rms(result[..., 2:], latent["samples"][..., 2:]) <= 1e-6
    assert rms(result[..., :2], latent["samples"][..., :2]) > 1e-2
