"""Distill LoRA on networks whose weights are kept in other formats than they are computed in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts.comfy.nodes.conftest import table_of
from tests.hosts.comfy.tiny_networks import SMALL_UNET, real

pytestmark = pytest.mark.comfyui

SCALE = 1 / 256


class Quantised(Tensor):
    """Eight bits a number, and two more bytes a row: its size is not the weight's shape, as of ComfyUI-GGUF's."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.size(0), self.size(1) - 2))

    def detach(self) -> Quantised:
        return self

    def clone(self) -> Quantised:  # type: ignore[override]
        return self


def quantised(weight: Tensor) -> Quantised:
    rows = (weight / SCALE).round().clamp(-127, 127).to(torch.int8)
    return torch.nn.functional.pad(rows, (0, 2)).as_subclass(Quantised)


def as_gguf(model: Any) -> Any:
    """Linear layers that keep their weights in bytes, and make numbers of them whenever they are used."""
    import comfy.ops

    class Linear(comfy.ops.manual_cast.Linear):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight.as_subclass(Tensor)[:, :-2].to(x) * SCALE
            return torch.nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x))

    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.__class__ = Linear
            layer.weight = torch.nn.Parameter(quantised(layer.weight), requires_grad=False)
    return model


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_the_weights_stay_as_they_are_and_the_lora_learns(weights: torch.dtype, train: Any) -> None:
    import comfy.supported_models

    if weights == torch.int8:
        model = as_gguf(real(comfy.supported_models.SD15, SMALL_UNET))
    else:
        model = real(comfy.supported_models.SD15, SMALL_UNET, weights=weights)
    kept = [weight.detach().clone() for weight in bare(model)]
    lora, loss, *_ = train(model=model, table=table_of(model, [0.0]), steps="1")
    after = bare(model)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(kept, after, strict=True)
    )
    assert all(factor.isfinite().all() for factor in lora.values())
    assert sum(loss["loss"][-3:]) < sum(loss["loss"][:3])


def bare(model: Any) -> list[Tensor]:
    """All weights' bytes."""
    return [weight.detach().as_subclass(Tensor) for weight in model.model.diffusion_model.parameters()]
