"""LoRAs that are on for one prompt, for all of a run or for some steps of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.hosts.comfy.cases.subjects import Conditioning, Subject


def random_lora(model: Any, like: str) -> dict[str, Any]:
    """A change of some matrices of the network; ``like`` its form: of ``add_patches``, or of a "file"."""
    generator = torch.Generator().manual_seed(0)
    weights = model.model_state_dict(filter_prefix="diffusion_model.")
    matrices = [name for name, weight in weights.items() if weight.ndim > 1 and name.endswith(".weight")]
    changes = {
        name.removesuffix(".weight"): weights[name].std()
        * torch.randn(weights[name].shape, generator=generator)
        for name in matrices[::4]
    }
    if like == "file":
        return {f"{name}.diff": change for name, change in changes.items()}
    return {f"{name}.weight": ("diff", (change,)) for name, change in changes.items()}


Frames = Sequence[tuple[float, float, int]]
"""Strength, the part of the run that it begins after, and for how many steps it is kept."""
LATE = ((1.0, 0.02, 1), (0.2, 0.05, 2), (-0.5, 0.3, 0))
"""Which is in force depends on how many steps there were."""


def hook(subject: Subject, strength: float = 1.0, frames: Frames = ()) -> Any:
    """A LoRA that is on for the prompt that it is set on, with keyframes."""
    import comfy.hooks

    group = comfy.hooks.create_hook_lora(random_lora(subject.model, "file"), strength, 0.0)
    if frames:
        keyframes = comfy.hooks.HookKeyframeGroup()
        for at, begins, steps in frames:
            keyframes.add(comfy.hooks.HookKeyframe(strength=at, start_percent=begins, guarantee_steps=steps))
        group.set_keyframes_on_hooks(keyframes)
    return group


def hooked(positive: Conditioning, group: Any) -> Conditioning:
    import comfy.hooks

    return comfy.hooks.set_hooks_for_conditioning(positive, group)
