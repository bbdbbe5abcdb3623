"""Network evaluations inside ComfyUI's own sampling path.

CFG, LoRA, ControlNet, model patches and offloading behave as in a KSampler, because they are prepared
by the same code: a sampler of ours runs where a KSampler's would, and is handed the same denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...sampling.denoiser import Denoiser

Conditioning = list[list[Any]]

_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Prompt:
    """A denoiser for one prompt, as a KSampler would have it, and its arguments."""

    denoiser: Denoiser
    extra_args: dict[str, Any]


class _Inside(comfy.samplers.Sampler):
    """Where a sampler would run, something else does."""

    brings_lambda = True  # 'Apply λ to model' keeps out of it

    def __init__(self, use: Callable[[Prompt], None]) -> None:
        self._use = use

    def sample(
        self,
        model_wrap: comfy.samplers.CFGGuider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        denoiser = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        denoiser.latent_image, denoiser.noise = latent_image, noise
        self._use(Prompt(denoiser, extra_args | {"denoise_mask": None}))
        return noise


def with_prompts(
    model: ModelPatcher,
    conditionings: Sequence[tuple[Conditioning, Conditioning]],
    cfg: float,
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    seed: int,
    use: Callable[[list[Prompt]], None],
) -> None:
    """Load the model, prepare every prompt as a KSampler does, and call ``use`` with the denoisers.

    Prompts are nested, one inside the other's sampling, so that all of them are ready at once.

    Args:
        conditionings: positive and negative of each prompt.
        latent: an empty latent of the size to evaluate at a time, ``[m, C, *spatial]``: memory is
            estimated for it.
        sigmas: the longest schedule; models see it in their options.
    """
    prompts: list[Prompt] = []

    def enter(prompt: Prompt) -> None:
        prompts.append(prompt)
        if len(prompts) == len(conditionings):
            use(prompts)
        else:
            prepare(*conditionings[len(prompts)])

    def prepare(positive: Conditioning, negative: Conditioning) -> None:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        guider.sample(latent, latent, _Inside(enter), sigmas, disable_pbar=True, seed=seed)

    prepare(*conditionings[0])


def initial_states(model: ModelPatcher, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Pure noise as a KSampler at full denoise begins with it, on the model's device."""
    sampling = model.get_model_object("model_sampling")
    noise = noise.to(model.load_device)
    full = float(sigma) >= float(sampling.sigma_max) * (1 - 1e-5)
    return sampling.noise_scaling(sigma.to(noise.device), noise, torch.zeros_like(noise), full)


def noise_per_latent(latent: torch.Tensor, seed: int, count: int) -> torch.Tensor:
    """``count`` noises of one latent's shape; a noise does not depend on how many there are."""
    one = latent[:1].expand(count, *latent.shape[1:])
    return comfy.sample.prepare_noise(one, seed, noise_inds=list(range(count)))


def micro_batch_that_fits(model: ModelPatcher, shape: Sequence[int], latents: int) -> int:
    """How many latents ComfyUI's own estimate says can be evaluated at a time, guidance included."""
    device = model.load_device
    budget = _MEMORY_SHARE * comfy.model_management.get_total_memory(device) - model.model_size()
    size = latents
    while size > 1 and model.model.memory_required([2 * size, *shape[1:]]) > budget:
        size = (size + 1) // 2
    return size


def one_prompt_per_row(
    positive: Conditioning, negative: Conditioning
) -> list[tuple[Conditioning, Conditioning]]:
    """A batched conditioning as its rows: ComfyUI gives row i to latent i, a micro-batch would not."""
    rows = max(_rows(positive), _rows(negative))
    return [([_row(c, i) for c in positive], [_row(c, i) for c in negative]) for i in range(rows)]


def _rows(conds: Conditioning) -> int:
    return max((len(cond[0]) for cond in conds if cond[0] is not None), default=1)


def _row(cond: list[Any], i: int) -> list[Any]:
    rows = 1 if cond[0] is None else len(cond[0])

    def pick(value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows > 1
        return value[i % rows : i % rows + 1] if batched else value

    return [pick(cond[0]), {key: pick(value) for key, value in cond[1].items()}]


def check_empty(latent: dict[str, Any]) -> None:
    """Refuse what λ is not fitted from.

    Raises:
        DodeError: the latent is filled or has a mask.
    """
    if latent.get("noise_mask") is not None:
        raise DodeError("λ is fitted from pure noise: take the mask off the latent")
    if torch.count_nonzero(latent["samples"]):
        raise DodeError(
            "λ is fitted from pure noise: connect an Empty Latent Image of the size you will sample"
        )
