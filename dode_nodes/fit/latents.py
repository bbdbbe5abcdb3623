"""The latents of a fit: in groups that share a model and a prompt, and in micro-batches that are evaluated together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import DodeError
from ..sampling.denoiser import Denoiser
from .memory import BatchLimit
from .ranks import gather, share

ExtraArgs = dict[str, Any] | Callable[[Tensor], dict[str, Any]] | None
"""The model's keyword arguments, or a function that gives them for the latents' indices."""


Sample = Callable[[dict[str, Any]], Tensor]
"""A run of a sampler that waits for the model's keyword arguments."""
Around = Callable[[Sample, Tensor, Tensor], Tensor]
"""What a host does around every run: ``around(sample, indices, sigmas)`` makes the group's model ready for a run
of these latents over these σ, and returns what ``sample(extra_args)`` does."""


@dataclass(frozen=True, eq=False)
class Group:
    """Latents that share a model and conditioning.

    Attributes:
        model: a denoiser in k-diffusion's convention.
        x: initial states at sigmas[0], ``[B, C, *spatial]``.
        extra_args: the model's keyword arguments for the whole group; or, where they differ from
            latent to latent, a function of the latents' indices (``[m]``, int64) within the group.
        around: what is done around every run that evaluates the model; it gives the run its arguments.
            Where a run passes an evaluation whose output is known, ``model.skip_evaluation(x, sigma)`` is
            called, if the model has it.
        taught_by: the same latents with a model, arguments and host of the teacher's own: what is fitted then brings
            this group's model to where that one ends. None where the teacher runs on this group's.
    """

    model: Denoiser
    x: Tensor
    extra_args: ExtraArgs = None
    around: Around | None = None
    taught_by: Group | None = None

    @property
    def teaching(self) -> Group:
        """What the teacher runs on."""
        return self if self.taught_by is None else self.taught_by


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Latents that are evaluated together: some of a group's.

    Attributes:
        group: theirs.
        place: the group's, among the groups.
        indices: theirs within the group, ``[m]``, int64.
        numbers: theirs over all groups, ``[m]``, int64.
        x: their initial states, ``[m, C, *spatial]``.
        stand_for: latents of all ranks for each of this rank's, to tell of progress.
        limit: how many of them fit into memory at once.
    """

    group: Group
    place: int
    indices: Tensor
    numbers: Tensor
    x: Tensor = field(repr=False)
    stand_for: float = 1.0
    limit: BatchLimit = field(default_factory=BatchLimit, repr=False)

    def extra_args(self) -> dict[str, Any]:
        """Fresh arguments for one run: samplers may write into them."""
        args = self.group.extra_args
        return _fresh_arguments(args(self.indices) if callable(args) else args or {})

    def teaching(self, x: Tensor) -> MicroBatch:
        """The same latents at these states, ``[m, C, *spatial]``, on what the teacher runs on."""
        return replace(self, group=self.group.teaching, x=x)

    def arguments_of(self, part: slice, extra_args: dict[str, Any]) -> dict[str, Any]:
        """A run's arguments for a part of its latents."""
        args = self.group.extra_args
        if (
            self.group.around is not None
            or not callable(args)
            or len(self.indices[part]) == len(self.indices)
        ):
            return extra_args
        return _fresh_arguments(args(self.indices[part]))

    def run(self, sample: Sample, sigmas: Tensor) -> Tensor:
        """A run of a sampler over these latents, as the model's host has it."""
        if self.group.around is None:
            return sample(self.extra_args())
        return self.group.around(sample, self.indices, sigmas)


def _fresh_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: _fresh(value) for name, value in arguments.items()}


def _fresh(value: Any) -> Any:
    """New containers, the same leaves."""
    if isinstance(value, dict):
        return {key: _fresh(item) for key, item in value.items()}
    return [_fresh(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True, eq=False)
class Latents:
    """All latents of a fit. A quarter of them is held out: nothing is fitted on those.

    Attributes:
        groups: at least one; their latents may differ in shape.
        micro_batch: how many latents are evaluated at a time, of one group; None for a group at a time.
            What is found is the same, to rounding.
        limit: where it is noted how many fit into memory at once; see ``memory``.
        free_first: whether a run can do without its first evaluation: some hosts make it before they ask.

    Raises:
        DodeError: there is no latent, or something is not one.
    """

    groups: Sequence[Group]
    micro_batch: int | None = None
    limit: BatchLimit = field(default_factory=BatchLimit, repr=False)
    free_first: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not all(isinstance(group, Group) and callable(group.model) for group in self.groups):
            raise DodeError("latents come in Groups, each with a function model(x, sigma, **extra_args)")
        if not self.groups:
            raise DodeError("there are no latents: the list of groups is empty")
        for group in self.groups:
            _check_latents(group.x)
            if group.teaching.x.shape != group.x.shape:
                raise DodeError(
                    f"the teacher's latents must have the shape of the student's, {tuple(group.x.shape)}, not "
                    f"{tuple(group.teaching.x.shape)}"
                )
        if self.micro_batch is not None and self.micro_batch < 1:
            raise DodeError(f"micro_batch must be at least 1, got {self.micro_batch}")

    @classmethod
    def of(
        cls, model: Denoiser, x: Tensor, *, extra_args: ExtraArgs = None, micro_batch: int | None = None
    ) -> Latents:
        """Of one model and one prompt.

        Args:
            model: the denoiser, ``model(x, sigma[B], **extra_args) -> denoised``.
            x: initial states at sigmas[0], ``[B, C, *spatial]``, any float dtype and device.
            extra_args: see ``Group``.
            micro_batch: how many latents are evaluated at a time; None for all.
        """
        return cls((Group(model, x, extra_args),), micro_batch)

    def __len__(self) -> int:
        return sum(len(group.x) for group in self.groups)

    @property
    def lender(self) -> Denoiser:
        """A denoiser whose attributes a sampler may look at."""
        return self.groups[0].model

    @property
    def teaching(self) -> Latents:
        """The same latents on what the teacher runs on."""
        return replace(self, groups=[group.teaching for group in self.groups])

    @property
    def have_another_teacher(self) -> bool:
        """Whether that is something else than what is fitted."""
        return any(group.taught_by is not None for group in self.groups)

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the groups'."""
        return max((group.x.dtype for group in self.groups), key=lambda dtype: torch.finfo(dtype).bits)

    @cached_property
    def held_out(self) -> list[int]:
        """Numbers of the latents that nothing is fitted on, from the ends of all groups in turn."""
        last = [sum(len(g.x) for g in self.groups[: i + 1]) - 1 for i in range(len(self.groups))]
        from_the_end = [
            last[i] - back
            for back in range(max(len(g.x) for g in self.groups))
            for i, group in reversed(list(enumerate(self.groups)))
            if back < len(group.x)
        ]
        return sorted(from_the_end[: held_out_count(len(self))])

    @cached_property
    def fitted(self) -> list[int]:
        """Numbers of the others, one of every group in turn."""
        sizes = [len(group.x) for group in self.groups]
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        in_turn = [
            first + i
            for i in range(max(sizes))
            for first, size in zip(firsts, sizes, strict=True)
            if i < size
        ]
        held = set(self.held_out)
        return [number for number in in_turn if number not in held]

    def batches(self, only: Sequence[int] | None = None) -> list[MicroBatch]:
        """This rank's share of the latents, in micro-batches.

        Args:
            only: just the latents of these numbers.
        """
        wanted = range(len(self)) if only is None else sorted(only)
        mine = set(share(wanted))
        batches, first = [], 0
        for place, group in enumerate(self.groups):
            indices = torch.tensor([i for i in range(len(group.x)) if first + i in mine], dtype=torch.int64)
            for part in torch.split(indices, self.micro_batch or len(group.x)):
                if len(part):
                    x = group.x[part.to(group.x.device)]
                    stand_for = len(wanted) / len(mine)
                    batches.append(MicroBatch(group, place, part, part + first, x, stand_for, self.limit))
            first += len(group.x)
        return batches

    def by_group(self, batches: Sequence[MicroBatch], parts: Sequence[Tensor]) -> list[Tensor]:
        """One tensor per micro-batch as one per group, in the latents' order; see ``in_order``."""
        return [
            in_order(*_chosen(batches, parts, [batch.place == place for batch in batches]))
            for place in range(len(self.groups))
        ]


def held_out_count(latents: int) -> int:
    """How many of so many latents nothing is fitted on: a quarter, one at least; none of one."""
    return max(1, latents // 4) if latents > 1 else 0


def in_order(batches: Sequence[MicroBatch], parts: Sequence[Tensor]) -> Tensor:
    """One tensor per micro-batch, ``[m, …]``, as one for all latents, in the latents' order.

    Under several ranks: everybody's, from everybody's micro-batches; every rank must call it. Empty where
    nobody has any.
    """
    numbers = gather(_joined([batch.numbers for batch in batches]))
    values = gather(_joined(parts))
    return torch.cat(values)[torch.cat(numbers).argsort()] if numbers else torch.empty(0)


def _chosen(
    batches: Sequence[MicroBatch], parts: Sequence[Tensor], chosen: Sequence[bool]
) -> tuple[list[MicroBatch], list[Tensor]]:
    kept = [pair for pair, yes in zip(zip(batches, parts, strict=True), chosen, strict=True) if yes]
    return [batch for batch, _ in kept], [part for _, part in kept]


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(parts)) if parts else None


def mean_squares(difference: Tensor) -> Tensor:
    """The mean square of each latent, ``[B]``, float64 on the CPU: not every device has float64."""
    return difference.detach().cpu().double().flatten(1).square().mean(1)


def root_mean_square(difference: Tensor) -> float:
    """Over all latents, ``[B, …]``."""
    return float(mean_squares(difference).mean().sqrt())


def nearest_to_their_own(previews: Tensor, finished: Tensor) -> int:
    """How many of the latents ``[B, C, *spatial]`` are nearer to the finished one of their noise than to the others."""
    distances = torch.cdist(previews.double().flatten(1), finished.double().flatten(1))
    return int((distances.argmin(1).cpu() == torch.arange(len(previews))).sum())


def _check_latents(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        raise DodeError("x must be a floating-point tensor of shape [batch, channels, *spatial]")
    if x.numel() == 0:
        raise DodeError(f"x has no elements: its shape is {tuple(x.shape)}")
    if not x.isfinite().all():
        raise DodeError("x contains NaN or infinite values")
