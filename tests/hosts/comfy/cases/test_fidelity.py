"""Distill λ's runs are a KSampler's, with every solver, scheduler and micro-batch."""

from __future__ import annotations

import pytest

from tests.hosts.comfy.cases.fidelity import SIDE, assert_faithful

pytestmark = pytest.mark.comfyui


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("eps", {}),
        ("flow", {}),
        ("eps", {"micro_batch": 3}),
        ("eps", {"solver": "heun", "steps": 6}),
        ("flow", {"solver": "dpmpp_2m", "scheduler": "beta"}),
        ("eps", {"scheduler": "ddim_uniform"}),
    ],
    ids=str,
)
def test_one_prompt(kind, changes, dode):
    subject = dode.demo(kind, SIDE)
    assert_faithful(dode, subject, subject.positive, **changes)


def test_two_prompts(dode):
    subject = dode.demo(side=SIDE)
    assert_faithful(dode, subject, subject.positive, dode.prompt(5))
