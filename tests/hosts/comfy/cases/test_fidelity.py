"""Distill λ's runs are a KSampler's, with every solver, scheduler and micro-batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.hosts.comfy.cases.fidelity import assert_faithful
from tests.hosts.comfy.cases.hooks import random_lora
from tests.hosts.comfy.cases.subjects import small
from tests.hosts.conftest import conditioning

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
    subject = small(kind)
    assert_faithful(dode, subject, subject.positive, **changes)


def test_two_prompts(dode):
    subject = small()
    assert_faithful(dode, subject, subject.positive, conditioning(5.0))


def test_weights_move_once(dode, monkeypatch):
    """However many runs there are; ComfyUI is asked for the model anew by each."""
    from comfy.model_patcher import ModelPatcher

    done: Counter[str] = Counter()

    def count(name: str) -> None:
        method = getattr(ModelPatcher, name)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            done[name] += 1
            return method(self, *args, **kwargs)

        monkeypatch.setattr(ModelPatcher, name, counted)

    for name in ("load", "patch_weight_to_device", "partially_load"):
        count(name)
    subject = small()
    patches, patched = random_lora(subject.model, "add_patches"), subject.model.clone()
    patched.add_patches(patches, 0.7)
    changed = replace(subject, model=patched)
    dode.distil(changed, positive_2=conditioning(5.0), steps="3", micro_batch=2)
    assert done["partially_load"] > 20  # of the runs
    assert done["load"] == 1
    assert done["patch_weight_to_device"] <= len(patched.model_state_dict())
