"""Whether a model is a function: one state has one answer, whatever was asked before it and beside it.

Least squares compares runs that share what the network answered. Caches of earlier steps, guidance with a
momentum, and guidance that mixes the latents of a batch make that wrong without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DodeError
from .evaluator import Evaluator
from .latents import Latents, MicroBatch, root_mean_square
from .progress import Progress

_STEPS = 6
"""Steps of the run whose last state is asked again: caches watch some steps before they leave one out."""
_STEP = 0.93
"""The next σ as a part of the last: as close as a teacher's, where caches reuse an answer."""
_LATENTS = 2
_SAME_BATCH = 10.0  # ε of the dtype
_OTHER_BATCH, _OTHER_BATCH_IN_HALF = 1e-4, 1e-2  # relative RMS


def consistency_cost(latents: Latents) -> int:
    """What ``check_consistency`` takes at most, in evaluations of one latent."""
    return sum((_STEPS + 3) * len(batch.x) + 1 for batch in _trials(latents))


def check_consistency(
    latents: Latents, sigma: float, dtype: torch.dtype, progress: Progress, *, suspects: str = ""
) -> None:
    """Refuse a model that remembers what it was asked, or that mixes the latents of a batch.

    Args:
        latents: of the fit; two of every group are tried.
        sigma: where to ask, in the middle of the schedule: caches leave its ends alone.
        dtype: that the network computes in.
        progress: with ``consistency_cost`` to spend.
        suspects: names of what may be the cause, for the error.

    Raises:
        DodeError: it does; says what to do.
    """
    named = f" ({suspects})" if suspects else ""
    with progress:
        evaluator = Evaluator(progress)
        for batch in _trials(latents):
            states, last = _run_on(batch, sigma, evaluator)
            again = _asked(batch, [states[-1], states[0], states[-1]], evaluator)
            if not all(_same(last, answer, dtype) for answer in (again[0], again[2])):
                raise DodeError(
                    f"remove what remembers earlier steps from the model{named}: a cache such as EasyCache or TeaCache, "
                    "or guidance with momentum. With it the network gives two answers to one latent, and nothing can "
                    "be fitted. You can put it back when you sample with the table"
                )
            if len(batch.x) > 1 and not _alike(last[:1], _asked_alone(batch, states[-1], evaluator), dtype):
                raise DodeError(
                    f"set micro_batch to 1: guidance on this model{named} lets the latents of a batch change each other"
                )


def _trials(latents: Latents) -> list[MicroBatch]:
    """Of every group the first two latents, or one where latents are evaluated one at a time."""
    size = min(_LATENTS, latents.micro_batch or _LATENTS)
    firsts: dict[int, MicroBatch] = {}
    for batch in Latents(latents.groups, size).batches():
        firsts.setdefault(batch.place, batch)
    return list(firsts.values())


State = tuple[Tensor, float]
"""x and σ."""


def _run_on(batch: MicroBatch, sigma: float, evaluator: Evaluator) -> tuple[list[State], Tensor]:
    """Some short steps of Euler: the states that they ask about, and the last answer."""
    schedule = torch.tensor([sigma * _STEP**i for i in range(_STEPS + 1)], dtype=torch.float32)
    model = evaluator.on(batch, "checking the model")
    states: list[State] = []

    def sample(extra_args: dict[str, Any]) -> Tensor:
        x = batch.x / batch.x.std() * sigma
        denoised = x
        for now, then in zip(schedule[:-1].tolist(), schedule[1:].tolist(), strict=True):
            states.append((x, now))
            denoised = model(x, x.new_full((len(x),), now), **extra_args)
            x = x + (then - now) * (x - denoised) / now
        return denoised

    with torch.no_grad():
        return states, batch.run(sample, schedule)


def _asked(batch: MicroBatch, states: list[State], evaluator: Evaluator) -> list[Tensor]:
    """The answers to some states, in a run of their own."""
    model = evaluator.on(batch, "checking the model")
    answers: list[Tensor] = []

    def sample(extra_args: dict[str, Any]) -> Tensor:
        for x, sigma in states:
            answers.append(model(x, x.new_full((len(x),), sigma), **extra_args))
        return answers[-1]

    sigmas = sorted({sigma for _, sigma in states}, reverse=True)
    with torch.no_grad():
        batch.run(sample, torch.tensor([*sigmas, 0.0]))
    return answers


def _asked_alone(batch: MicroBatch, state: State, evaluator: Evaluator) -> Tensor:
    x, sigma = state
    first = MicroBatch(batch.group, batch.place, batch.indices[:1], batch.numbers[:1], batch.x[:1])
    return _asked(first, [(x[:1], sigma)], evaluator)[0]


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return float((a - b).abs().max()) <= _SAME_BATCH * torch.finfo(dtype).eps * float(a.abs().max())


def _alike(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    half = torch.finfo(dtype).bits < 32
    return root_mean_square(a - b) <= (_OTHER_BATCH_IN_HALF if half else _OTHER_BATCH) * root_mean_square(a)
