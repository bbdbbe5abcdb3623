"""A row's steps with their gradients, and the batches that they are run over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import DodeError
from ..sampling.denoiser import Denoiser, DenoiserProxy, DodeDenoiser
from ..sampling.sample import solver_of
from ..sampling.solvers import Sampler, to_d
from ..sigmas import is_flow
from ..tables.free_outputs import NONE
from ..tables.row import LambdaRow
from .family import under_euler
from .latents import Latents, MicroBatch
from .student import Student
from .teacher import Targets


@dataclass(frozen=True, eq=False)
class Rollout:
    """A row that is trained for, and its steps as Euler's."""

    row: LambdaRow
    solver: Sampler
    student: Student

    @classmethod
    def of(cls, row: LambdaRow, latents: Latents) -> Rollout:
        """Of a row by its own sampler.

        Raises:
            IneligibleSampler, DodeError: it has no gradients.
        """
        solver = solver_of(row, None)
        return cls(row, solver, under_euler(row, solver, latents.lender))

    def check(self, targets: Targets, *, by_step: bool) -> None:
        """That there is what it is trained towards: the end, or the state after each step as well.

        Raises:
            DodeError: there is not.
        """
        sigmas = self.row.sigmas.tolist()
        targets.check([sigmas[0], 0.0])
        if by_step:
            if self.student.corrections.any() or self.student.free != NONE:
                raise DodeError(
                    f"the loss per step is for plain Euler: choose the loss at the end for {self.row.label}"
                )
            targets.check(sigmas[1:])

    def sigmas(self, like: Tensor) -> Tensor:
        """Of its steps, where these states are."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.tensor(self.student.sigmas, dtype=dtype, device=like.device)

    def states(
        self, network: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any], *, detached: bool
    ) -> Iterator[Tensor]:
        """The state after each step, ``[m, C, *spatial]``, with its graph; detached: with that of its step alone."""
        student, s_in = self.student, x.new_ones(len(x))
        denoise = DodeDenoiser(
            network, student.corrections, student.prediction, free=student.free, flow=is_flow(student.sigmas)
        )
        for sigma, sigma_next in pairwise(sigmas):
            d = to_d(x, sigma, denoise(x, sigma * s_in, **extra_args))
            x = x + d * (sigma_next - sigma)
            yield x
            if detached:
                x = x.detach()


class _Checkpointed(DenoiserProxy):
    """A denoiser whose evaluations are run again for their gradients."""

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised: Tensor = checkpoint(self._model, x, sigma, use_reentrant=False, **extra_args)
        return denoised


def shuffled_batches(
    latents: Latents, size: int, seed: int, *, checkpointing: bool
) -> Iterator[MicroBatch | None]:
    """The fitted latents, shuffled again and again; those of a batch share a group.

    Of each batch this rank's share; None where it has none of it.

    Args:
        size: latents in each.
        checkpointing: run every evaluation again for its gradient, in place of keeping all that it computed.
    """
    fitted, first = set(latents.fitted), 0
    groups = []
    for group in latents.groups:
        groups.append([number for number in range(first, first + len(group.x)) if number in fitted])
        first += len(group.x)
    whole = replace(latents, micro_batch=None)
    if checkpointing:
        lean = [replace(group, model=_Checkpointed(group.model)) for group in latents.groups]
        whole = replace(whole, groups=lean)
    random = np.random.default_rng(seed)
    while True:
        parts = []
        for numbers in groups:
            shuffled = random.permutation(numbers).tolist()
            parts += [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
        for i in random.permutation(len(parts)):
            yield next(iter(whole.batches(parts[i])), None)
