"""Network evaluations inside ComfyUI's own sampling path.

CFG, LoRA, hooks, ControlNet, model patches and offloading behave as in a KSampler, because the same
code prepares them: each run of our samplers is a run of a guider and gets the same denoiser.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...fit.latents import Group, Sample
from ...sampling.denoiser import EndOfRun

Conditioning = list[list[Any]]

_MEMORY_SHARE = 0.8
_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
"""What newer hosts' empty latents say of themselves, by the host's spelling."""


def cfg_guider(
    model: ModelPatcher, positive: Conditioning, negative: Conditioning, cfg: float
) -> comfy.samplers.CFGGuider:
    """A KSampler's guider."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


class GuidedModel:
    """The denoiser of a guider, made ready anew for every run: what ComfyUI resets per run is reset.

    Args:
        guider: a KSampler's, or any other.
        noise: of all latents of its group, ``[B, C, *spatial]``.
        seed: what the run is told.
    """

    def __init__(self, guider: comfy.samplers.CFGGuider, noise: torch.Tensor, seed: int) -> None:
        self._guider = guider
        self._noise = noise
        self._seed = seed
        patcher = guider.model_patcher
        between_runs = SimpleNamespace(inner_model=patcher.model, model_patcher=patcher, model_options={})
        self._between_runs = comfy.samplers.KSamplerX0Inpaint(between_runs, torch.empty(0))
        self._denoiser = self._between_runs
        self._model_options: dict[str, Any] = {}

    def group(self, x: torch.Tensor) -> Group:
        """The latents of its noise, at the states ``x`` that runs begin with."""
        return Group(self, x, {"model_options": {}, "seed": self._seed}, self.around)

    def around(self, sample: Sample, indices: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """Run a sampler as the guider does; see ``fit.latents.Around``."""
        noise = self._noise[indices]
        inside = _Inside(self, sample)
        try:
            self._guider.sample(
                noise, torch.zeros_like(noise), inside, sigmas, disable_pbar=True, seed=self._seed
            )
        finally:
            self._denoiser, self._model_options = self._between_runs, {}
        if isinstance(inside.end, EndOfRun):
            raise inside.end
        return inside.end

    def enter(self, denoiser: comfy.samplers.KSamplerX0Inpaint, model_options: dict[str, Any]) -> None:
        """A run has begun; this is its denoiser."""
        self._denoiser, self._model_options = denoiser, model_options

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra_args: Any) -> torch.Tensor:
        return self._denoiser(x, sigma, **extra_args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._denoiser, name)

    def skip_evaluation(self, x: torch.Tensor, sigma: torch.Tensor) -> None:
        """Pass an evaluation whose output is known: what counts the evaluations of a run must count it, too."""
        guider = self._denoiser.inner_model
        for conds in getattr(guider, "conds", {}).values():
            for cond in conds or []:
                if "hooks" not in cond:
                    continue
                here = comfy.samplers.get_area_and_mult(cond, x, sigma)
                if here is not None and here.hooks is not None:
                    guider.inner_model.current_patcher.prepare_hook_patches_current_keyframe(
                        sigma, here.hooks, self._model_options
                    )


class _Inside(comfy.samplers.Sampler):
    """Where a sampler would run, one of ours does."""

    brings_lambda = True  # 'Apply λ to model' keeps out of it

    def __init__(self, model: GuidedModel, sample: Sample) -> None:
        self._model = model
        self._sample = sample
        self.end: torch.Tensor | EndOfRun

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
        self._model.enter(denoiser, extra_args["model_options"])
        try:
            self.end = self._sample(extra_args | {"denoise_mask": None})
        except EndOfRun as reached:  # the guider must still clean up as after any run
            self.end = reached
        return noise


def initial_states(model: ModelPatcher, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Pure noise as a KSampler at full denoise begins with it, on the model's device."""
    sampling = model.get_model_object("model_sampling")
    noise = noise.to(model.load_device)
    full = float(sigma) >= float(sampling.sigma_max) * (1 - 1e-5)
    return sampling.noise_scaling(sigma.to(noise.device), noise, torch.zeros_like(noise), full)


def fitting_latent(model: ModelPatcher, latent: dict[str, Any]) -> torch.Tensor:
    """The samples as KSampler takes them: an empty latent gets the model's channels and its pixels per number."""
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    ratios = {name: latent.get(name) for name in _RATIOS if name in known}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


def without_ratios(latent: dict[str, Any]) -> dict[str, Any]:
    """A latent that has been sampled says nothing of what it was when it was empty."""
    return {name: value for name, value in latent.items() if name not in _RATIOS}


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


def one_prompt_per_row(guider: comfy.samplers.CFGGuider) -> list[comfy.samplers.CFGGuider]:
    """A guider for each row of batched conditionings: ComfyUI gives row i to latent i, a micro-batch would not."""
    conds = guider.original_conds
    rows = max((_rows(cond) for name in conds for cond in conds[name] or []), default=1)
    if rows == 1:
        return [guider]
    guiders = [copy.copy(guider) for _ in range(rows)]
    for i, each in enumerate(guiders):
        each.original_conds = {name: [_row(cond, i) for cond in conds[name] or []] for name in conds}
    return guiders


def _rows(cond: dict[str, Any]) -> int:
    return len(cond["cross_attn"]) if cond.get("cross_attn") is not None else 1


def _row(cond: dict[str, Any], i: int) -> dict[str, Any]:
    rows = _rows(cond)

    def pick(value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows > 1
        return value[i % rows : i % rows + 1] if batched else value

    return {key: pick(value) for key, value in cond.items()}


def check_empty(model: ModelPatcher, latent: dict[str, Any]) -> None:
    """Refuse what λ is not fitted from.

    Raises:
        DodeError: the latent is filled, has a mask, or is of a kind that cannot be distilled.
    """
    if getattr(latent["samples"], "is_nested", False):
        raise DodeError(
            "use a latent with pictures only: pictures and sound together cannot be distilled or compared yet"
        )
    if isinstance(model.model, comfy.model_base.SVD_img2vid):
        raise DodeError(
            "use this model with stock samplers: it turns a batch into the frames of one video, which cannot be "
            "distilled or compared yet"
        )
    if latent.get("noise_mask") is not None:
        raise DodeError("remove the mask from the latent: λ is fitted from pure noise")
    if torch.count_nonzero(latent["samples"]):
        raise DodeError(
            "connect an Empty Latent Image of the size you will sample at: λ is fitted from pure noise"
        )
