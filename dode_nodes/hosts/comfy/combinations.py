"""What a fit is made for: prompts, guidance scales and sizes, and the latents of every combination of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...fit.latents import Latents
from ...fit.memory import BatchLimit
from .guiders import Guider, guidance_scale, one_prompt_per_row
from .prompts import GuidedModel, micro_batch_that_fits, noise_per_latent
from .streams import packed


@dataclass(frozen=True, kw_only=True)
class Combinations:
    """Guiders and sizes, each of which takes an equal share of the latents with each.

    Attributes:
        guiders: of one model; a batched prompt's rows share a guider's part.
        teachers: the guiders that the teacher runs with in their places, all of one model; none where these do.
        latent: an empty latent of the size to fit at, ``[1, C, *spatial]``, or of several streams.
        further: empty latents of further sizes.
        seed: of the noises.
        micro_batch: latents evaluated at a time; 0 for what fits.
    """

    guiders: Sequence[Guider]
    latent: Any
    seed: int
    teachers: Sequence[Guider] = ()
    further: Sequence[Any] = ()
    micro_batch: int = 0

    @property
    def parts(self) -> dict[str, Any]:
        """To make more of it."""
        return {each.name: getattr(self, each.name) for each in fields(Combinations)}

    @property
    def model(self) -> ModelPatcher:
        """The guiders'."""
        model: ModelPatcher = self.guiders[0].model_patcher
        return model

    @property
    def models(self) -> list[ModelPatcher]:
        """The guiders' and, if there is one, the teacher's own."""
        return [self.model, *(guider.model_patcher for guider in self.teachers[:1])]

    @cached_property
    def prompted(self) -> list[Guider]:
        """The guiders, one for each row of batched prompts."""
        return self._one_per_row(self.guiders)

    @cached_property
    def _teaching(self) -> Sequence[Guider | None]:
        return self._one_per_row(self.teachers) if self.teachers else [None] * len(self.prompted)

    def _one_per_row(self, guiders: Sequence[Guider]) -> list[Guider]:
        return [one for guider in guiders for one in one_prompt_per_row(guider, self.latent)]

    @property
    def scales(self) -> list[float]:
        """The guidance of the guiders that say theirs, the first one's first."""
        scales = map(guidance_scale, self.prompted)
        return list(dict.fromkeys(scale for scale in scales if scale is not None))

    @property
    def shares(self) -> int:
        """How many combinations there are."""
        return len(self.prompted) * (1 + len(self.further))

    def check(self, latents: int) -> None:
        """That so many latents are enough.

        Raises:
            DodeError: they are not, or the sizes are of different kinds.
        """
        for each in self.further:
            one, other = packed(self.latent), packed(each)
            if one.ndim != other.ndim or one.shape[1] != other.shape[1]:
                raise DodeError("connect latents of one kind: only their sizes may differ")
        several = self.further or len(self.scales) > 1
        what = "combinations of prompt, cfg and size" if several else "prompts"
        if latents < max(2, self.shares):
            raise DodeError(
                f"{self.shares} {what} need at least {max(2, self.shares)} latents, not {latents}: "
                "some are held out to check λ"
            )

    def latents(self, sigmas: torch.Tensor, count: int, limit: BatchLimit, *, first: int = 0) -> Latents:
        """So many noises, from number ``first`` on, in equal shares; those of ``latent``'s size come last."""
        sizes = [*self.further, self.latent]
        shape = max((packed(size).shape for size in sizes), key=math.prod)
        asked = [each for each in (*self.prompted, *self._teaching) if each is not None]
        at_once = self.micro_batch or min(micro_batch_that_fits(guider, shape, count) for guider in asked)
        at_once = min(at_once, count)
        takers = [(size, *both) for size in sizes for both in zip(self.prompted, self._teaching, strict=True)]
        shares = torch.arange(count).tensor_split(len(takers))
        noises = {id(size): noise_per_latent(size, self.seed, count, first) for size in sizes}
        groups = []
        for (size, guider, teacher), share in zip(takers, shares, strict=True):
            noise = noises[id(size)][share]
            group, *taught_by = (
                GuidedModel(each, noise, self.seed, size, at_once).group(sigmas)
                for each in (guider, teacher)
                if each is not None
            )
            groups.append(replace(group, taught_by=taught_by[0] if taught_by else None))
        return Latents(groups, at_once, limit)

    @property
    def facts(self) -> dict[str, Any]:
        """For a row's settings."""
        scales = self.scales
        facts: dict[str, Any] = {"seed": self.seed, "host": "ComfyUI"}
        facts["prompts"] = len(self.prompted) // max(1, len(scales))
        facts["latent_shape"] = list(packed(self.latent).shape[1:])
        if guidance_scale(self.prompted[0]) is not None:
            facts["cfg"] = scales[0]
        if len(scales) > 1:
            facts["cfg_range"] = [min(scales), max(scales)]
        if self.teachers:
            facts["teacher_cfg"] = guidance_scale(self.teachers[0])
        return facts
