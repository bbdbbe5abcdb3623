"""What the node 'Distill LoRA' does: trains adapters inside ComfyUI's sampling path."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...fit.latents import Group, Latents, Sample
from ...fit.lora import LoraRecipe
from ...fit.lora_pipeline import LoraPipeline, teacher_schedule
from ...fit.low_rank import LowRank
from ...fit.memory import BatchLimit
from ...fit.progress import Progress, Reporter
from ...tables.kept import Kept
from ...tables.lora_file import Factors
from ...tables.row import LambdaRow
from .combinations import Combinations
from .guiders import Guider
from .job import schedules_of
from .model_facts import check_no_cache, is_flow
from .pace import say_pace

_FIRST_NOISE = 128
"""Of a seed: those before may be what the rows were fitted to."""


@dataclass(frozen=True, kw_only=True)
class LoraRequest(Combinations):
    """What to train, for some combinations of prompts, guidance and sizes. The model's LoRAs and patches stay in force.

    Attributes:
        rows: whose steps are trained for.
        count: noises.
        recipe: how.
        rank: of the LoRA.
    """

    rows: Sequence[LambdaRow]
    count: int
    recipe: LoraRecipe
    rank: int


class LoraDistillation:
    """A request on its way to a LoRA. Whatever ends ``run``, nothing is left on the model.

    Nodes run in inference mode, whose tensors take no part in gradients: all here is done outside of it.

    Args:
        kept: where its work is kept, for another one of the same to go on from; None for nowhere.

    Raises:
        DodeError: something cannot serve; before any evaluation.

    Attributes:
        pipeline: all that is done.
    """

    def __init__(self, request: LoraRequest, reporter: Reporter, kept: Kept | None = None) -> None:
        for model in request.models:
            check_no_cache(model)
        request.check(request.count)
        self._request, self._reporter = request, reporter
        model = request.model
        with torch.inference_mode(False):
            flow, make_sigmas = is_flow(model), schedules_of(model)
            model.model.requires_grad_(False)
            latents = _latents(request, teacher_schedule(make_sigmas, flow=flow))
            self._adapters = LowRank(
                model.model.diffusion_model, request.rank, request.recipe.seed, device=model.load_device
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
                    kept=kept,
                )
            except BaseException:
                self._adapters.remove()
                raise

    def run(self) -> None:
        """All of it."""
        try:
            with torch.inference_mode(False):
                self._reporter.begin(str(self.pipeline.cost), *self.pipeline.remarks)
                self.pipeline.run(self._reporter, self._tried)
        finally:
            self._adapters.remove()

    def _tried(self, trial: Progress, left: int) -> None:
        say_pace(self._reporter, trial, left, self._request.model)

    def factors(self) -> dict[str, Factors]:
        """The LoRA, by the names of ComfyUI's layers; None of it where it makes no row better."""
        return self._adapters.factors() if self.pipeline.helps else {}


def _latents(request: LoraRequest, sigmas: torch.Tensor) -> Latents:
    network = request.model.model
    normal = replace(request, guiders=[_normal_guider(guider) for guider in request.guiders])
    latents = normal.latents(sigmas, request.count, BatchLimit(), first=_FIRST_NOISE)
    return replace(latents, groups=[_trainable(group, network) for group in latents.groups])


def _normal_guider(guider: Guider) -> Guider:
    """With conditionings that gradients can pass."""
    guider = copy.copy(guider)
    guider.original_conds = _normal(guider.original_conds)
    return guider


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
