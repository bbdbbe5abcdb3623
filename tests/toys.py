"""What the engine's tests run on: schedules, latents, and denoisers that keep count."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dode_nodes import Group, LambdaRow, Latents, Progress, Teacher, distill, run_teacher
from dode_nodes.sampling.solvers import Sampler
from tests.oracles import two_peaks


def karras(steps: int, sigma_max: float = 14.6, sigma_min: float = 0.05) -> Tensor:
    """Karras sigmas and 0, ``[steps + 1]``, float64."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / 7) + ramp * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def uniform(steps: int) -> Tensor:
    """A flow model's plain schedule, ``[steps + 1]``, float64."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def exponential(steps: int) -> Tensor:
    """Equal steps in log σ and a last one to 0, ``[steps + 1]``, float64."""
    return torch.cat([torch.logspace(1, -1, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def latents(batch: int, *shape: int, sigma: float = 14.6, seed: int = 0) -> Tensor:
    """Initial states, ``[batch, *shape]``, float64; ``[batch, 2, 3, 3]`` if no shape is given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *(shape or (2, 3, 3)), generator=generator, dtype=torch.float64) * sigma


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "8x8": lambda x: x.repeat(1, 1, 2, 4),
    "4x6": lambda x: x.repeat(1, 1, 1, 3),
    "video": lambda x: x[:, :, None].repeat(1, 1, 3, 1, 1),
}
"""Latents of 4x2 in other shapes: the same numbers several times, so that two_peaks leaves all means the same."""


def in_shapes(x: Tensor, *shapes: str, micro_batch: int | None = None) -> Latents:
    """Latents of 4x2 as one group a shape, alike in size."""
    parts = zip(shapes, x.split(len(x) // len(shapes)), strict=True)
    return Latents([Group(two_peaks, SHAPES[shape](part)) for shape, part in parts], micro_batch)


class Counting:
    """A denoiser that remembers what it is asked, and has attributes as a host's has."""

    def __init__(self, denoise: Callable[..., Tensor] = two_peaks) -> None:
        self.denoise = denoise
        self.inner_model = object()
        self.sigmas: list[float] = []
        self.batches: list[int] = []
        self.extra_args: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        assert sigma.shape == (len(x),)
        self.sigmas.append(float(sigma[0]))
        self.batches.append(len(x))
        self.extra_args.append(extra_args)
        return self.denoise(x, sigma, **extra_args)

    @property
    def evaluations(self) -> int:
        """Of one latent each."""
        return sum(self.batches)


class Note(NamedTuple):
    """What progress was at one time, with the shape of the denoised."""

    stage: str
    done: int
    total: int
    shape: tuple[int, ...] | None


class Telling(list[Note]):
    """Is told of progress, and keeps it: the object that it is told is always the same one."""

    def __call__(self, progress: Progress) -> None:
        shape = None if progress.denoised is None else tuple(progress.denoised.shape)
        self.append(Note(progress.stage, progress.done, progress.total, shape))

    def check(self, planned: int, spent: int) -> None:
        """That it began with what was planned, ended with what was spent, and in between never went back."""
        assert self[0].total == planned
        assert self[-1].done == self[-1].total == spent
        for before, after in pairwise(self):
            assert before.done <= after.done <= after.total <= before.total


def distilled(
    of: Latents,
    sigmas: Tensor,
    *,
    teacher: Teacher | None = None,
    solver: str | Sampler = "euler",
    solver_options: dict[str, Any] | None = None,
    **of_distill: Any,
) -> LambdaRow:
    """A row by a teacher's run of its own."""
    targets = run_teacher(of, sigmas, teacher or Teacher(), solvers=solver, solver_options=solver_options)
    return distill(targets, sigmas, solver=solver, solver_options=solver_options, **of_distill)


def writes_into_what_it_is_given(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As ComfyUI's uni_pc, and its *_cfg_pp samplers with extra_args."""
    extra_args["seed"] = None
    extra_args["model_options"].clear()
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        x -= (x - denoised) * (1 - sigmas[i + 1] / sigmas[i])
        sigmas[i] = 100.0
    return x


def catches_everything(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for sigma, sigma_next in pairwise(sigmas):
        try:
            denoised = model(x, sigma.expand(len(x)), **extra_args)
        except Exception:
            denoised = torch.zeros_like(x)
        x = denoised + (x - denoised) * sigma_next / sigma
    return x


class Interrupted(Exception):
    """What a host raises to stop a run."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where the work takes longer, as a loop without an end does."""

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError(f"it has not ended within {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
