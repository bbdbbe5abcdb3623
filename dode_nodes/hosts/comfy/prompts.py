"""Network evaluations inside ComfyUI's own sampling path.

CFG, LoRA, hooks, ControlNet, model patches and offloading behave as in a KSampler, because the same
code prepares them: each run of our samplers is a run of a guider and gets the same denoiser.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...fit.latents import Group, Sample
from ...sampling.denoiser import EndOfRun
from .guiders import Guider, guidance_scale, run_guider
from .streams import packed, unpacked

_MEMORY_SHARE = 0.8
_ANIMATEDIFF = "ADE"
"""Where AnimateDiff-Evolved keeps the motion models that it adds to a model."""
_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
"""What newer hosts' empty latents say of themselves, by the host's spelling."""


_NOT_ONE_RUN = (
    "use another guider: this one does not run its sampler once, over the whole latent and the σ that it is given, so "
    "it cannot be distilled"
)


class GuidedModel:
    """The denoiser of a guider, made ready anew for every run: what ComfyUI resets per run is reset.

    Args:
        guider: of any kind.
        noise: of all latents of its group, ``[B, C, *spatial]``, packed.
        seed: what the run is told.
        like: a latent of their shape.
        micro_batch: how many of them are evaluated at a time, at most.
    """

    def __init__(self, guider: Guider, noise: torch.Tensor, seed: int, like: Any, micro_batch: int) -> None:
        self._guider = _always_for(micro_batch, guider)
        self._noise = noise
        self._micro_batch = micro_batch
        self._seed = seed
        self._like = like
        patcher = guider.model_patcher
        between_runs = SimpleNamespace(  # what samplers look for
            inner_model=patcher.model,
            model_patcher=patcher,
            model_options={},
            conds={},
            cfg=getattr(guider, "cfg", 1.0),
        )
        self._between_runs = comfy.samplers.KSamplerX0Inpaint(between_runs, torch.empty(0))
        self._denoiser = self._between_runs
        self._model_options: dict[str, Any] = {}

    def group(self, sigmas: torch.Tensor) -> Group:
        """The latents of its noise, where a run over these σ begins with them."""
        states = [self._beginning(noise, sigmas) for noise in torch.split(self._noise, self._micro_batch)]
        extra_args = {"model_options": {"transformer_options": {}}, "seed": self._seed}
        return Group(self, torch.cat(states), extra_args, self.around)

    def _beginning(self, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """What the host hands its sampler functions: noise, as the model and its patches will have it."""
        begun: list[torch.Tensor] = []

        def sample(model: object, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            begun.append(x.clone())
            return x

        self._run(comfy.samplers.KSAMPLER(sample), noise, sigmas)
        if len(begun) != 1 or begun[0].shape != noise.shape:
            raise DodeError(_NOT_ONE_RUN)
        return begun[0]

    def _run(self, sampler: comfy.samplers.Sampler, noise: torch.Tensor, sigmas: torch.Tensor) -> None:
        sampler.brings_lambda = True  # 'Apply λ to model' keeps out of it
        run_guider(
            self._guider,
            noise.clone(),
            self._like,
            sampler,
            sigmas.clone(),
            disable_pbar=True,
            seed=self._seed,
        )

    def around(self, sample: Sample, indices: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """Run a sampler as the guider does; see ``fit.latents.Around``."""
        noise = self._noise[indices]
        inside = _Inside(self, sample, noise.shape, sigmas)
        try:
            self._run(inside, noise, sigmas)
        finally:
            self._denoiser, self._model_options = self._between_runs, {}
        if inside.end is None:
            raise DodeError(_NOT_ONE_RUN)
        if isinstance(inside.end, EndOfRun):
            raise inside.end
        return inside.end

    def enter(self, denoiser: comfy.samplers.KSamplerX0Inpaint, model_options: dict[str, Any]) -> None:
        """A run has begun; this is its denoiser."""
        self._denoiser, self._model_options = denoiser, model_options
        for cond in self._conditionings():
            for hook in getattr(cond.get("hooks"), "hooks", ()):
                hook.hook_keyframe._curr_t = -1.0  # of the run before: the host's own reset misses it

    def _conditionings(self) -> Iterator[dict[str, Any]]:
        """Those of the run."""
        for conds in getattr(self._denoiser.inner_model, "conds", {}).values():
            yield from conds or []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra_args: Any) -> torch.Tensor:
        return self._denoiser(x, sigma, **extra_args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._denoiser, name)

    def skip_evaluation(self, x: torch.Tensor, sigma: torch.Tensor) -> None:
        """Pass an evaluation whose output is known: what counts the evaluations of a run must count it, too."""
        guider, options = self._denoiser.inner_model, self._model_options
        counts = "context_handler" in options or any("hooks" in cond for cond in self._conditionings())
        if not counts:
            return
        conds = [[_light(cond) for cond in conds or []] for conds in guider.conds.values()]
        without_work = {name: value for name, value in options.items() if name not in _WORK}
        comfy.samplers.calc_cond_batch(_NoNetwork(guider.inner_model), conds, x, sigma, without_work)


_WORK = ("model_function_wrapper", "multigpu_clones")
"""Of a run's options, what evaluates networks."""


def _light(cond: dict[str, Any]) -> dict[str, Any]:
    """A conditioning without networks of its own."""
    return {name: value for name, value in cond.items() if name not in ("control", "gligen")}


class _Lending:
    """Has what a thing of the host's has."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thing, name)


class _NoNetwork(_Lending):
    """A model whose evaluation costs nothing: all that the host does around one is done."""

    def __init__(self, model: comfy.model_base.BaseModel) -> None:
        super().__init__(model)
        self.current_patcher = _NoWeights(model.current_patcher)

    def apply_model(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Of the shape of an answer."""
        return torch.zeros_like(x)


class _NoWeights(_Lending):
    """A patcher that leaves the weights alone."""

    def apply_hooks(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """No transformer options."""
        return {}


def _always_for(micro_batch: int, guider: Guider) -> Guider:
    """The guider, whose runs make room for a whole micro-batch: for less, weights would move back and forth."""

    def prepare(
        executor: Callable[..., Any],
        model: ModelPatcher,
        noise_shape: Sequence[int],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return executor(model, [max(micro_batch, noise_shape[0]), *noise_shape[1:]], *args, **kwargs)

    guider = copy.copy(guider)
    guider.model_options = comfy.model_patcher.create_model_options_clone(guider.model_options)
    comfy.patcher_extension.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING,
        "dode_nodes",
        prepare,
        guider.model_options,
        is_model_options=True,
    )
    return guider


class _Inside(comfy.samplers.Sampler):
    """Where a sampler would run, one of ours does."""

    def __init__(self, model: GuidedModel, sample: Sample, shape: torch.Size, sigmas: torch.Tensor) -> None:
        self._model = model
        self._sample = sample
        self._shape = shape
        self._sigmas = sigmas
        self.end: torch.Tensor | EndOfRun | None = None

    def sample(
        self,
        model_wrap: Guider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        same = noise.shape == self._shape and torch.equal(sigmas.to(self._sigmas), self._sigmas)
        if self.end is not None or not same:
            raise DodeError(_NOT_ONE_RUN)
        denoiser = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        denoiser.latent_image, denoiser.noise = latent_image, noise
        self._model.enter(denoiser, extra_args["model_options"])
        try:
            self.end = self._sample(extra_args | {"denoise_mask": None})
        except EndOfRun as reached:  # the guider must still clean up as after any run
            self.end = reached
        return noise


def fitting_latent(model: ModelPatcher, latent: dict[str, Any]) -> Any:
    """The samples as KSampler takes them: an empty latent gets the model's channels and its pixels per number."""
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    ratios = {name: latent.get(name) for name in _RATIOS if name in known}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


def without_ratios(latent: dict[str, Any]) -> dict[str, Any]:
    """A latent that has been sampled says nothing of what it was when it was empty."""
    return {name: value for name, value in latent.items() if name not in _RATIOS}


def noise_per_latent(latent: Any, seed: int, count: int, first: int = 0) -> torch.Tensor:
    """``count`` noises of one latent's shape, packed, from number ``first`` on; of one stream, a noise does not depend
    on how many there are."""
    one = packed(latent)[:1]
    many = unpacked(one.expand(count, *one.shape[1:]), latent)
    return packed(comfy.sample.prepare_noise(many, seed, noise_inds=list(range(first, first + count))))


def micro_batch_that_fits(guider: Guider, shape: Sequence[int], latents: int) -> int:
    """How many latents of a shape, packed, ComfyUI's own estimate says can be evaluated at a time, guidance included."""
    model = guider.model_patcher
    budget = _MEMORY_SHARE * comfy.model_management.get_total_memory(model.load_device) - model.model_size()
    each, size = _evaluated_for_one(guider), latents
    while size > 1 and model.model.memory_required([each * size, *shape[1:]]) > budget:
        size = (size + 1) // 2
    return size


def _evaluated_for_one(guider: Guider) -> int:
    """How often the network is evaluated for one latent at once: for each conditioning, as of each area or mask."""
    conds = dict(getattr(guider, "original_conds", {}))
    if guidance_scale(guider) == 1 and not guider.model_options.get("disable_cfg1_optimization"):
        conds.pop("negative", None)  # ComfyUI leaves it out
    return max(1, sum(len(cond or ()) for cond in conds.values()))


def check_empty(model: ModelPatcher, latent: dict[str, Any]) -> None:
    """Refuse what λ is not fitted from.

    Raises:
        DodeError: the latent is filled, has a mask, or is of a kind that cannot be distilled.
    """
    if isinstance(model.model, comfy.model_base.SVD_img2vid) or model.additional_models.get(_ANIMATEDIFF):
        raise DodeError(
            "use this model with stock samplers: it turns a batch into the frames of one video, which cannot be "
            "distilled or compared yet"
        )
    if latent.get("noise_mask") is not None:
        raise DodeError("remove the mask from the latent: λ is fitted from pure noise")
    if torch.count_nonzero(packed(latent["samples"])):
        raise DodeError(
            "connect an Empty Latent Image of the size you will sample at: λ is fitted from pure noise"
        )
