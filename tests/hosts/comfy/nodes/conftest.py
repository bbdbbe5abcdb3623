"""The node Distill LoRA, asked for little."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dode_nodes import LambdaRow, LambdaTable
from dode_nodes.fit.lora_pipeline import LORA_QUALITIES, LoraQuality

SIDE = 4


def prompt(seed: int) -> list[list[Any]]:
    """For a ``SMALL_UNET``."""
    return [[torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(seed)), {}]]


def table_of(model: Any, *lambdas: list[float]) -> LambdaTable:
    """A row of Euler on Karras for each, with these λ, as if distilled."""
    from dode_nodes.hosts.comfy.job import schedules_of
    from dode_nodes.hosts.comfy.model_facts import model_facts

    make_sigmas, rows = schedules_of(model), []
    for weights in lambdas:
        steps = len(weights)
        sigmas = make_sigmas("karras", steps, True).double().numpy()
        rows.append(LambdaRow("euler", sigmas, (1,) * steps, np.array(weights)))
    return LambdaTable(rows, model=model_facts(model))


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
