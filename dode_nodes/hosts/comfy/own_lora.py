"""Whether the LoRA that was trained for a row is on the model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import adapter_maps

from ...tables.describe import number
from ...tables.lora_file import Factors, content_hash
from ...tables.provenance import TrainedLora
from ...tables.row import LambdaRow, shown_hash


def own_lora_remarks(row: LambdaRow, model: ModelPatcher) -> list[str]:
    """What people should know if the LoRA of a row's own is not on the model as it was trained; one line at most."""
    trained = row.trained_lora
    if trained is None:
        return []
    strengths = loras_on(model).get(trained.content)
    if strengths == [trained.strength]:
        return []
    if strengths is not None:
        now = " and ".join(f"{strength:g}" for strength in strengths)
        return [f"load the LoRA {_name(trained)} once, at strength {trained.strength:g}: it is on at {now}"]
    if model.injections:
        return [
            f"could not check whether the LoRA {_name(trained)}, which this row was trained with, is on the model"
        ]
    return [
        f"load the LoRA {_name(trained)} at strength {trained.strength:g} before this node: it was trained for this row, "
        f"and is not on the model. Error with it {number(trained.error)}, without {number(trained.error_without)}"
    ]


def _name(trained: TrainedLora) -> str:
    return f"{trained.name} ({shown_hash(trained.content)})".strip()


def loras_on(model: ModelPatcher) -> dict[str, list[float]]:
    """The strengths of the LoRAs on a model, by their content; only of plain low-rank ones."""
    loads: dict[tuple[int, float], dict[str, Factors]] = defaultdict(dict)
    for key, patches in model.patches.items():
        for strength, adapter, *_ in patches:
            if (factors := _factors(adapter)) is not None:
                load = id(adapter.loaded_keys)  # one object for all adapters of a load
                loads[load, float(strength)][key] = factors
    found: dict[str, list[float]] = defaultdict(list)
    for (_, strength), factors_of_load in loads.items():
        found[content_hash(factors_of_load)].append(round(strength, 6))
    return dict(found)


def _factors(adapter: Any) -> Factors | None:
    if not isinstance(adapter, adapter_maps["LoRA"]):
        return None
    up, down, alpha, *others = adapter.weights
    if any(other is not None for other in others) or not isinstance(up, torch.Tensor):
        return None
    return Factors(up, down, float(len(down) if alpha is None else alpha))
