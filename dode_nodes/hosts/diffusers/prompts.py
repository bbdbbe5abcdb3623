"""Prompts as a pipeline takes them: encoded once, where it is known how; else as text, at every call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from ...errors import DodeError

Prompt = str | Mapping[str, Any]
"""A text; or what a call of the pipeline is given in its place, embeddings for example."""

_PAIR = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_PAIR, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_ENCODED = {
    "StableDiffusionXL": _POOLED,
    "StableDiffusion3": _POOLED,
    "StableDiffusion": _PAIR,
    "Flux": ("prompt_embeds", "pooled_prompt_embeds", ""),  # the last are ids, which it makes again
    "Wan": _PAIR,
}
"""What ``encode_prompt`` returns, by how the pipeline's name begins. Others return masks, or in another order."""

_OURS = (
    "callback_on_step_end", "control_guidance_end", "control_guidance_start", "denoising_end", "generator",
    "guidance_scale", "latents", "num_images_per_prompt", "num_inference_steps", "num_videos_per_prompt",
    "output_type", "return_dict", "sigmas", "timesteps",
)  # fmt: skip
"""Arguments of a call that distilling decides, or that make what the network does depend on the number of the step."""


def check_begins_with_noise(pipe: DiffusionPipeline) -> None:
    """That a call of the pipeline makes a picture of noise that it is given.

    Raises:
        DodeError: it does not.
    """
    known = inspect.signature(pipe.__call__).parameters
    if "latents" not in known or "strength" in known:
        raise DodeError(
            f"distil in the text-to-image pipeline of this model, not in {type(pipe).__name__}: λ is fitted from pure "
            "noise. The table works in both"
        )


def check_arguments(pipe: DiffusionPipeline, given: Mapping[str, Any]) -> None:
    """That these can be arguments of every call.

    Raises:
        DodeError: one cannot, or the pipeline does not know it.
    """
    known = inspect.signature(pipe.__call__).parameters
    for name in given:
        if name in _OURS:
            raise DodeError(
                f"leave out {name}: distilling runs the pipeline from pure noise, with its own steps"
            )
        if name not in known:
            raise DodeError(f"{type(pipe).__name__} does not take {name}")


def arguments_of(
    pipe: DiffusionPipeline, prompt: Prompt, negative: str | None, cfg: float, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Those of the pipeline's call for a prompt: each text, and the one row of each tensor, is for all latents.

    Args:
        prompt: a text, or arguments in its place.
        negative: the negative prompt, where the prompt is a text.
        cfg: the guidance scale.
        given: other arguments, for all prompts.
    """
    common = {"guidance_scale": cfg, **given}
    if isinstance(prompt, Mapping):
        check_arguments(pipe, prompt)
        return {**common, **prompt}
    known = inspect.signature(pipe.__call__).parameters
    texts: dict[str, Any] = {"prompt": prompt}
    if negative is not None:
        texts["negative_prompt"] = negative
        if "negative_prompt" not in known:
            raise DodeError(f"leave out the negative prompt: {type(pipe).__name__} takes none")
    return common | (_encoded(pipe, texts, cfg, given) or texts)


def _encoded(
    pipe: DiffusionPipeline, texts: Mapping[str, Any], cfg: float, given: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The texts as embeddings; None where the pipeline encodes in a way of its own."""
    classes = [each.__name__ for each in type(pipe).__mro__]
    names = next(
        (_ENCODED[prefix] for prefix in _ENCODED for name in classes if name.startswith(prefix)), None
    )
    more = any(name.startswith(("prompt", "negative_prompt")) for name in given)  # prompts of other encoders
    if names is None or more:
        return None
    known, takes = (inspect.signature(each).parameters for each in (pipe.__call__, pipe.encode_prompt))
    if texts.keys() - takes.keys():
        return None
    attention = given.get("cross_attention_kwargs") or given.get("joint_attention_kwargs") or {}
    possible = {
        **{name: each.default for name, each in known.items() if each.default is not each.empty},
        **given,
        "lora_scale": attention.get("scale"),
        "prompt_2": None,  # as the first
        "prompt_3": None,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": cfg > 1,
        **texts,
    }
    results = pipe.encode_prompt(**{name: value for name, value in possible.items() if name in takes})
    if len(results) != len(names):
        return None
    return {name: result for name, result in zip(names, results, strict=True) if name and result is not None}
