"""What the node 'Distill LoRA' does: trains adapters inside ComfyUI's sampling path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...fit.latents import Group, Latents, Sample
from ...fit.lora import LoraRecipe
from ...fit.lora_pipeline import LoraPipeline, teacher_schedule
from ...fit.low_rank import LowRank
from ...fit.progress import Reporter
from ...tables.lora_file import Factors
from ...tables.row import LambdaRow
from .guiders import Conditioning, cfg_guider
from .job import schedules_of
from .model_facts import check_no_cache, is_flow
from .prompts import GuidedModel, micro_batch_that_fits, noise_per_latent


@dataclass(frozen=True)
class LoraRequest:
    """What to train.

    Attributes:
        model: with the LoRAs and patches that stay in force.
        positive, negative, cfg: of the teacher and of the student.
        latent: an empty latent of the size to train at, ``[1, C, *spatial]``.
        rows: whose steps are trained for.
        latents: noises.
        recipe: how.
        rank: of the LoRA.
    """

    model: ModelPatcher
    positive: Conditioning
    negative: Conditioning
    cfg: float
    latent: Any
    rows: Sequence[LambdaRow]
    latents: int
    recipe: LoraRecipe
    rank: int


class LoraDistillation:
    """A request on its way to a LoRA. Whatever ends ``run``, nothing is left on the model.

    Nodes run in inference mode, whose tensors take no part in gradients: all here is done outside of it.

    Raises:
        DodeError: something cannot serve; before any evaluation.

    Attributes:
        pipeline: all that is done.
    """

    def __init__(self, request: LoraRequest, reporter: Reporter) -> None:
        check_no_cache(request.model)
        self._reporter = reporter
        with torch.inference_mode(False):
            flow, make_sigmas = is_flow(request.model), schedules_of(request.model)
            request.model.model.requires_grad_(False)
            latents = _latents(request, teacher_schedule(make_sigmas, flow=flow))
            self._adapters = LowRank(
                request.model.model.diffusion_model,
                request.rank,
                request.recipe.seed,
                device=request.model.load_device,
            )
            try:
                self.pipeline = LoraPipeline(
                    latents,
                    request.rows,
                    [row.nfe for row in request.rows],
                    self._adapters,
                    request.recipe,
                    make_sigmas,
                    flow=flow,
                )
            except BaseException:
                self._adapters.remove()
                raise

    def run(self) -> None:
        """All of it."""
        try:
            with torch.inference_mode(False):
                self._reporter.begin(str(self.pipeline.cost), *self.pipeline.remarks)
                self.pipeline.run(self._reporter)
        finally:
            self._adapters.remove()

    def factors(self) -> dict[str, Factors]:
        """The LoRA, by the names of ComfyUI's layers; None of it where it makes no row better."""
        return self._adapters.factors() if self.pipeline.helps else {}


def _latents(request: LoraRequest, sigmas: torch.Tensor) -> Latents:
    model, recipe = request.model, request.recipe
    guider = cfg_guider(model, _normal(request.positive), _normal(request.negative), request.cfg)
    at_once = min(micro_batch_that_fits(model, request.latent.shape, request.latents), request.latents)
    noise = noise_per_latent(request.latent, recipe.seed, request.latents)
    group = GuidedModel(guider, noise, recipe.seed, request.latent, at_once).group(sigmas)
    return Latents([_trainable(group, model.model)], at_once)


def _trainable(group: Group, network: nn.Module) -> Group:
    """The group, whose runs find weights that gradients can pass: loading and patching may make new ones for each."""
    begin = group.around
    assert begin is not None  # noqa: S101  # a guided model's has one

    def around(sample: Sample, indices: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        def ready(extra_args: dict[str, Any]) -> torch.Tensor:
            _leave_inference_mode(network)
            return sample(extra_args)

        return begin(ready, indices, sigmas)

    return replace(group, around=around)


def _leave_inference_mode(network: nn.Module) -> None:
    """Put equal weights in the place of those that were made in inference mode."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_inference():
                setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_inference():
                setattr(module, name, buffer.clone())


def _normal(value: Any) -> Any:
    """Conditionings with copies of their tensors, made outside of inference mode."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    return [_normal(item) for item in value] if isinstance(value, list) else value
