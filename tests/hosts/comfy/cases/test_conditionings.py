"""Distill λ's runs are a KSampler's, with every kind of conditioning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts.comfy.cases import subjects
from tests.hosts.comfy.cases.fidelity import SIDE, assert_faithful
from tests.hosts.comfy.cases.hooks import hook
from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import (
    Conditioning,
    Subject,
    flux_prompt,
    small,
    stock_nodes,
    unet_prompt,
)
from tests.hosts.conftest import conditioning

pytestmark = pytest.mark.comfyui

MASKS = torch.stack([torch.eye(SIDE), 1 - torch.eye(SIDE)])


def _with(positive: Conditioning, **settings: Any) -> Conditioning:
    return [[context, options | settings] for context, options in positive]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"area": (2, 4, 0, 0), "strength": 1.0}, id="area"),
        pytest.param({"area": ("percentage", 0.5, 1.0, 0.25, 0.0), "strength": 0.8}, id="area in percent"),
        pytest.param({"mask": MASKS[:1], "mask_strength": 0.7}, id="mask"),
        pytest.param({"mask": MASKS[:1], "set_area_to_bounds": True}, id="mask's bounds"),
        pytest.param({"start_percent": 0.3, "end_percent": 0.9}, id="part of the run"),
    ],
)
def test_conditionings_that_act_in_part(settings, dode):
    subject = small()
    ((context, options),) = conditioning(5.0)
    both = [[context, options | settings], *subject.positive]
    assert_faithful(dode, subject, both, conditioning(7.0), scale=2)


def _controlled(subject: Subject, positive: Conditioning, pictures: Tensor) -> Subject:
    """Two ControlNets, one after the other in the run, the second with a hook of its own."""
    second = subjects.controlnet(4)
    second.extra_hooks = hook(subject, 0.5)
    prompts = positive, subject.negative
    for net, strength, start, end in ((subjects.controlnet(), 1.0, 0.0, 0.6), (second, 0.5, 0.2, 1.0)):
        prompts = stock_nodes(
            "nodes", "ControlNetApplyAdvanced", positive=prompts[0], negative=prompts[1], control_net=net,
            image=pictures, strength=strength, start_percent=start, end_percent=end,
        )  # fmt: skip
    return replace(subject, positive=prompts[0], negative=prompts[1])


def _pictures(count: int) -> Tensor:
    return torch.rand(count, 32, 32, 3, generator=torch.Generator().manual_seed(0))


def test_controlnets_with_a_hook_in_parts_of_the_run(dode):
    subject = _controlled(subjects.unet(), unet_prompt(1), _pictures(1))
    plain = [[context, {}] for context, _ in unet_prompt(5)]
    assert_faithful(dode, subject, subject.positive, plain, scale=2)


def test_rows_of_prompts_masks_and_pictures_go_to_latents_in_turn(dode):
    """Whatever the micro-batch: row i is a prompt of its own."""
    subject = subjects.unet()
    pictures, contexts = _pictures(2), torch.cat([unet_prompt(seed)[0][0] for seed in (1, 3)])

    def prompted(rows: slice) -> Subject:
        elsewhere = _with(unet_prompt(5), mask=MASKS[rows])
        controlled = _controlled(subject, [[contexts[rows], {}]], pictures[rows])
        return replace(controlled, positive=[*controlled.positive, *elsewhere])

    batched, rows = prompted(slice(0, 2)), [prompted(slice(0, 1)), prompted(slice(1, 2))]
    assert_faithful(dode, batched, batched.positive, expected=rows, scale=2)


def test_pictures_to_inpaint(dode):
    """Of a model that is told them; as many as there are latents to fill, or fewer."""
    subject = subjects.unet(in_channels=9)
    generator = torch.Generator().manual_seed(4)
    pictures = torch.randn(2, 4, SIDE, SIDE, generator=generator)
    masks = (torch.rand(2, 1, SIDE, SIDE, generator=generator) > 0.5).float()

    def told(rows: slice) -> Subject:
        more = {"concat_latent_image": pictures[rows], "concat_mask": masks[rows]}
        return replace(
            subject, positive=_with(subject.positive, **more), negative=_with(subject.negative, **more)
        )

    both, rows = told(slice(0, 2)), [told(slice(0, 1)), told(slice(1, 2))]
    assert_faithful(dode, both, both.positive, expected=rows, scale=2)


def test_pictures_to_refer_to_and_guidance_that_is_told(dode):
    subject = subjects.flux()
    picture = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    told = flux_prompt(1, reference_latents=[picture], guidance=5.0)
    assert_faithful(dode, subject, told, flux_prompt(3), scale=2)


def test_a_mask_without_a_batch_is_one_mask(dode: Pack):
    """As many rows of numbers as it has are no rows of prompts."""
    subject = small()
    both = [*_with(conditioning(5.0), mask=MASKS[0]), *subject.positive]
    assert_faithful(dode, subject, both, scale=2)
