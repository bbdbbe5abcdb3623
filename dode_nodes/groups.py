"""Latents in groups and micro-batches, and the one place where the network is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .denoiser import Denoiser, DenoiserProxy
from .errors import DodeError
from .ranks import gather, share, sum_over_ranks

ExtraArgs = dict[str, Any] | Callable[[Tensor], dict[str, Any]] | None
"""The model's keyword arguments, or a function that gives them for the latents' indices."""


class Progress(NamedTuple):
    """What a long run tells after each network evaluation.

    ``done`` and ``total`` count evaluations of one latent each; ``total`` grows if a search for a
    harmless λ turns out to be needed. ``denoised`` is the network's last output, for a preview.
    """

    stage: str
    done: int
    total: int
    denoised: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Latents that share a model and conditioning.

    Attributes:
        model: a denoiser in k-diffusion's convention.
        x: initial states at sigmas[0], ``[B, C, *spatial]``.
        extra_args: the model's keyword arguments for the whole group; or, where they differ from
            latent to latent, a function of the latents' indices (``[m]``, int64) within the group.
    """

    model: Denoiser
    x: Tensor
    extra_args: ExtraArgs = None


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Latents that are evaluated together: some of a group's.

    Attributes:
        group: theirs.
        indices: theirs within the group, ``[m]``, int64.
        numbers: theirs over all groups, ``[m]``, int64.
        x: their initial states, ``[m, C, *spatial]``.
        stand_for: latents of all ranks for each of this rank's, to tell of progress.
    """

    group: Group
    indices: Tensor
    numbers: Tensor
    x: Tensor = field(repr=False)
    stand_for: float = 1.0

    def extra_args(self) -> dict[str, Any]:
        """Fresh arguments for one run: samplers may write into them."""
        args = self.group.extra_args
        return _fresh(args(self.indices) if callable(args) else args or {})


def _fresh(value: Any) -> Any:
    """New containers, the same leaves."""
    if isinstance(value, dict):
        return {key: _fresh(item) for key, item in value.items()}
    return [_fresh(item) for item in value] if isinstance(value, list) else value


def as_groups(model: Denoiser | Sequence[Group], x: Tensor | None, extra_args: ExtraArgs) -> list[Group]:
    """``distill``'s first arguments as groups, validated.

    Raises:
        DodeError: they are not latents, or do not fit together.
    """
    if callable(model):
        if x is None:
            raise DodeError(
                "x is missing: give the initial latents, or a list of groups in the model's place"
            )
        groups = [Group(model, x, extra_args)]
    else:
        groups = list(model) if isinstance(model, Sequence) else [model]
        if not all(isinstance(group, Group) for group in groups):
            raise DodeError("the model must be a function (x, sigma, **extra_args) or a list of Groups")
        if x is not None or extra_args is not None:
            raise DodeError("with a list of groups, x and extra_args belong into the groups")
    if not groups:
        raise DodeError("there are no latents: the list of groups is empty")
    for group in groups:
        _check_latents(group.x)
    if len({group.x.shape[1:] for group in groups}) > 1:
        raise DodeError(f"the groups' latents differ in shape: {[tuple(g.x.shape) for g in groups]}")
    return groups


def _check_latents(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        raise DodeError("x must be a floating-point tensor of shape [batch, channels, *spatial]")
    if x.numel() == 0:
        raise DodeError(f"x has no elements: its shape is {tuple(x.shape)}")
    if not x.isfinite().all():
        raise DodeError("x contains NaN or infinite values")


def micro_batches(
    groups: Sequence[Group], size: int | None, only: Sequence[int] | None = None
) -> list[MicroBatch]:
    """This rank's share of the groups' latents, at most ``size`` of one group together.

    Args:
        size: None for all that a group has in the share.
        only: just the latents of these numbers.

    Raises:
        DodeError: the size is below 1.
    """
    if size is not None and size < 1:
        raise DodeError(f"micro_batch must be at least 1, got {size}")
    wanted = range(count_latents(groups)) if only is None else sorted(only)
    mine = set(share(wanted))
    batches, first = [], 0
    for group in groups:
        indices = torch.tensor([i for i in range(len(group.x)) if first + i in mine], dtype=torch.int64)
        for part in indices.split(size or len(group.x)):
            if len(part):
                x = group.x[part.to(group.x.device)]
                batches.append(MicroBatch(group, part, part + first, x, len(wanted) / len(mine)))
        first += len(group.x)
    return batches


def count_latents(groups: Sequence[Group]) -> int:
    return sum(len(group.x) for group in groups)


def by_turns(groups: Sequence[Group]) -> list[int]:
    """Numbers of all latents, one of every group in turn."""
    sizes = [len(group.x) for group in groups]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        first + i for i in range(max(sizes)) for first, size in zip(firsts, sizes, strict=True) if i < size
    ]


def held_out_count(latents: int) -> int:
    """How many of so many latents nothing is fitted on: a quarter, one at least; none of one."""
    return max(1, latents // 4) if latents > 1 else 0


def held_out(groups: Sequence[Group]) -> list[int]:
    """Numbers of the latents that nothing is fitted on, from the ends of all groups."""
    last = [sum(len(g.x) for g in groups[: i + 1]) - 1 for i in range(len(groups))]
    from_the_end = [
        last[i] - back
        for back in range(max(len(g.x) for g in groups))
        for i, group in reversed(list(enumerate(groups)))
        if back < len(group.x)
    ]
    return sorted(from_the_end[: held_out_count(count_latents(groups))])


class Evaluator:
    """Evaluates networks: counts, reports progress, and stops at the first NaN.

    Args:
        progress: told after every evaluation.
        before: evaluations that were made already, by all ranks.
        total: evaluations in all, those before included.
    """

    def __init__(
        self, progress: Callable[[Progress], None] | None = None, *, before: int = 0, total: int = 0
    ) -> None:
        self._progress = progress
        self._before = before
        self._own = 0
        self._all = 0.0  # as far as this rank can tell
        self.total = total

    def on(self, batch: MicroBatch, stage: str) -> Denoiser:
        """The micro-batch's denoiser, watched."""
        return _Watched(self, batch, stage)

    def count(self, batch: MicroBatch, stage: str, denoised: Tensor) -> None:
        """Note an evaluation of the micro-batch, and tell. The other ranks are taken to be as far."""
        self._own += len(denoised)
        self._all += len(denoised) * batch.stand_for
        if self._progress is not None:
            done = self._before + round(self._all)
            self._progress(Progress(stage, done, max(self.total, done), denoised))

    def spent(self) -> int:
        """Evaluations of one latent each that went through this, of all ranks; every rank must call it."""
        return int(sum_over_ranks(np.array(self._own)))


class _Watched(DenoiserProxy):
    def __init__(self, evaluator: Evaluator, batch: MicroBatch, stage: str) -> None:
        super().__init__(batch.group.model)
        self._evaluator = evaluator
        self._batch = batch
        self._stage = stage

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised = self._model(x, sigma, **extra_args)
        if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
            what = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise DodeError(
                f"the model must return the denoised latents, {tuple(x.shape)}; it returned {what}"
            )
        if not denoised.isfinite().all():
            raise DodeError(
                f"the model returned NaN or infinite values at σ = {float(sigma.flatten()[0]):.6g} "
                f"({self._stage}). A model in half precision may need fp32 or bf16"
            )
        self._evaluator.count(self._batch, self._stage, denoised)
        return denoised


def root_mean_square(error: Tensor) -> float:
    """√(mean of squares) over everything, in float64 (on the CPU: not every device has float64)."""
    return float(error.detach().cpu().double().square().mean().sqrt())


def in_order(batches: Sequence[MicroBatch], parts: Sequence[Tensor]) -> Tensor:
    """One tensor per micro-batch, ``[m, …]``, as one for all latents, in the latents' order.

    Under several ranks: everybody's, from everybody's micro-batches; every rank must call it.
    """
    order = torch.cat(gather(_joined([batch.numbers for batch in batches]))).argsort()
    return torch.cat(gather(_joined(parts)))[order]


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(parts)) if parts else None
