"""The node Distill LoRA, asked for little."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dode_nodes.fit.lora_pipeline import LORA_QUALITIES, LoraQuality

SIDE = 4


def prompt(seed: int) -> list[list[Any]]:
    """For a ``SMALL_UNET``."""
    return [[torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(seed)), {}]]


@pytest.fixture
def train(pack: SimpleNamespace, run_node: Any, lambdas_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node, on little."""
    monkeypatch.setattr("dode_nodes.fit.lora_pipeline.TEACHER_STEPS", 4)
    monkeypatch.setitem(LORA_QUALITIES, "quick", LoraQuality(4, 6))
    monkeypatch.setattr("dode_nodes.hosts.comfy.pictures._rendered", lambda figure: torch.zeros(1, 8, 8, 3))
    asked = {
        "positive": prompt(1), "negative": prompt(2), "cfg": 2.0, "latent": {"samples": torch.zeros(1, 4, SIDE, SIDE)},
        "steps": "2", "quality": "quick", "rank": 2, "learning_rate": 3e-3, "batch_size": 2, "seed": 3,
        "save_name": "mine",
    }  # fmt: skip
    return lambda **changes: run_node(pack.DistillLora, **(asked | changes))
