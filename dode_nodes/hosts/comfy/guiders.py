"""Guiders: what a node's model and prompts make, or the user's own in place of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import comfy.samplers
import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...tables.gate import is_number
from .streams import packed, unpacked

Conditioning = list[list[Any]]
Guider: TypeAlias = comfy.samplers.CFGGuider
"""A KSampler's, or one of another kind, of this ComfyUI or of another pack."""
_NOBODYS = 1.0
"""A guider's cfg where nobody has set it."""


def guiders_for(
    guider: Guider | None,
    model: ModelPatcher | None,
    positives: Mapping[str, Conditioning | None],
    negative: Conditioning | None,
    cfg: float,
) -> list[Guider]:
    """The guider, or a KSampler's for each of the positives.

    Args:
        guider: the user's own, which brings its model, prompts and scales.
        positives: by the names of their inputs; the first one is needed without a guider.

    Raises:
        DodeError: a guider beside what it brings, or neither.
    """
    first, *_ = positives
    given = {"model": model, **positives, "negative": negative}
    if guider is not None:
        beside = [name for name, value in given.items() if value is not None]
        if beside:
            raise DodeError(
                f"disconnect {_and(beside)}, or the guider: a guider brings its own model and prompts"
            )
        return [guider]
    if missing := [name for name in ("model", first, "negative") if given[name] is None]:
        raise DodeError(
            f"connect {_and(missing)}; or connect a guider in place of model, positive and negative"
        )
    return [
        cfg_guider(model, positive, negative, cfg) for positive in positives.values() if positive is not None
    ]


def cfg_guider(
    model: ModelPatcher | None, positive: Conditioning, negative: Conditioning | None, cfg: float
) -> Guider:
    """A KSampler's."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def _and(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def guidance_scale(guider: object) -> float | None:
    """How strongly a guider guides; None where it does not say.

    Guiders of all kinds inherit the field, and some never use it: they go by scales of their own.
    """
    scale: Any = getattr(guider, "cfg", None)
    if not is_number(scale) or scale < 0:
        return None
    predict = getattr(getattr(guider, "predict_noise", None), "__func__", None)
    plain = predict is comfy.samplers.CFGGuider.predict_noise
    return float(scale) if plain or scale != _NOBODYS else None


def run_guider(
    guider: Guider,
    noise: torch.Tensor,
    like: Any,
    sampler: comfy.samplers.Sampler,
    sigmas: torch.Tensor,
    **settings: Any,
) -> torch.Tensor:
    """A run from pure noise, as in SamplerCustomAdvanced, by a copy of the guider: nothing is left on the user's.

    Args:
        noise: packed, ``[B, C, *spatial]``; ``like`` is a latent of its shape.
        sampler: what the guider runs over ``sigmas``; settings are the guider's.

    Returns:
        The latents, packed.
    """
    noise, empty = unpacked(noise, like), unpacked(torch.zeros_like(noise), like)
    return packed(copy.copy(guider).sample(noise, empty, sampler, sigmas, **settings))


def one_prompt_per_row(guider: Guider, like: Any) -> list[Guider]:
    """A guider for each row of batched conditionings: ComfyUI gives row i to latent i, a micro-batch would not.

    Args:
        like: a latent of the shape that they are for.
    """
    conds, rank = getattr(guider, "original_conds", {}), packed(like).ndim
    rows = max((_rows(cond, rank) for name in conds for cond in conds[name] or []), default=1)
    if rows == 1:
        return [guider]
    guiders = [copy.copy(guider) for _ in range(rows)]
    for i, each in enumerate(guiders):
        hints: dict[ControlBase, ControlBase] = {}
        each.original_conds = {
            name: [_row(cond, i, rank, hints) for cond in conds[name] or []] for name in conds
        }
    return guiders


_PER_LATENT = (
    "cross_attn", "pooled_output", "concat_latent_image", "concat_image", "concat_mask", "mask",
)  # fmt: skip
"""What ComfyUI gives out to the latents of a batch, row by row."""


def _per_latent(cond: dict[str, Any], rank: int) -> dict[str, torch.Tensor]:
    """What a conditioning for latents of this rank has for each of a batch."""
    values = {name: cond[name] for name in _PER_LATENT if isinstance(cond.get(name), torch.Tensor)}
    return {
        name: value for name, value in values.items() if name != "mask" or value.ndim == rank - 1
    }  # a mask may have no batch


def _rows(cond: dict[str, Any], rank: int) -> int:
    hints = [control.cond_hint_original for control in _controls(cond, rank)]
    batches = [*_per_latent(cond, rank).values(), *(hint for hint in hints if hint is not None)]
    return max([1, *map(len, batches)])


def _row(cond: dict[str, Any], i: int, rank: int, hints: dict[ControlBase, ControlBase]) -> dict[str, Any]:
    """Row i; ``hints`` remembers ControlNets with one, for prompts that share a ControlNet are evaluated together."""
    rows, per_latent = _rows(cond, rank), _per_latent(cond, rank)

    def pick(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) < 2:
            return value
        return value[i % len(value)][None] if name in per_latent or len(value) == rows else value

    row = {name: pick(name, value) for name, value in cond.items()}
    if any(_controls(cond, rank)):
        row["control"] = _with_hint(cond["control"], i, hints)
    return row


def _controls(cond: dict[str, Any], rank: int) -> Iterator[ControlBase]:
    """The ControlNets of a conditioning. Where latents are videos, pictures are frames, none for each latent."""
    control = cond.get("control") if rank == _PICTURES else None
    while control is not None:
        yield control
        control = control.previous_controlnet


_PICTURES = 4
"""Rank of their latents."""


def _with_hint(control: ControlBase, i: int, hints: dict[ControlBase, ControlBase]) -> ControlBase:
    """A ControlNet, and those that it builds on, with row i of their pictures."""
    if control not in hints:
        one = hints[control] = control.copy()
        pictures, before = control.cond_hint_original, control.previous_controlnet
        if pictures is not None:
            one.cond_hint_original = pictures[i % len(pictures)][None]
        one.set_previous_controlnet(None if before is None else _with_hint(before, i, hints))
    return hints[control]
