"""Checks that a model gives the same result for the same latent, whatever it evaluated before or in the same batch.

The fit relies on this. Caches of earlier steps, guidance with momentum, and guidance that mixes the latents of a
batch break it without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DodeError
from .evaluator import Evaluator
from .latents import Latents, MicroBatch, root_mean_square
from .memory import is_out_of_memory
from .progress import Progress
from .runs import Tape

_STEPS = 5
"""Of a run whose last answer is compared: caches watch some steps before they leave one out."""
_STEP, _LAST_STEP = 0.97, 0.995
"""The next σ as a part of the last: as close as a teacher's, where caches reuse an answer, and closer."""
_LATENTS = 2
_SAME_BATCH = 10.0  # ε of the dtype
_OTHER_BATCH, _OTHER_BATCH_IN_HALF = 1e-4, 1e-2  # relative RMS


def consistency_cost(latents: Latents) -> int:
    """What ``check_consistency`` takes at most, in evaluations of one latent."""
    return sum((2 * _STEPS + 2) * len(batch.x) for batch in _trials(latents))


def check_consistency(
    latents: Latents, sigma: float, dtype: torch.dtype, progress: Progress, *, suspects: str = ""
) -> None:
    """Refuse a model that remembers what it was asked, or that mixes the latents of a batch.

    The same state is asked about at the same step of three runs, after other latents in one than in another, and
    after none in a third that begins there. (What a model does may depend on the step: scheduled hooks count them.)

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
            states = _some_states(batch, sigma)
            others = [(-x, at) for x, at in states[:-1]]
            answers = _answers(batch, states, evaluator, named)
            try:
                after_others = _asked(batch, [*others, states[-1]], evaluator)
                alone = _asked_alone(batch, states[0], evaluator)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise DodeError(
                    f"remove the cache of earlier steps from the model{named}: with it, the model fails on a second "
                    f"latent: {error}"
                ) from error
            if not _same(answers[-1], after_others[-1], dtype):
                raise DodeError(
                    "remove the cache of earlier steps (such as EasyCache or TeaCache), the guidance with momentum or "
                    f"the random patch (such as token merging) from the model{named}: with it, the network gives "
                    "different results for the same latent, and nothing can be fitted. You can put it back when you "
                    "sample with the table"
                )
            if not _alike(answers[0], alone, dtype):
                raise DodeError(
                    f"set micro_batch to 1: with the guidance on this model{named}, the latents of a batch affect each "
                    "other. A model that makes one video of a batch cannot be distilled"
                )
            entered = _asked(batch, states, evaluator, answers[:-1])
            if not _same(answers[-1], entered[-1], dtype):
                raise DodeError(
                    f"use other guidance to distil{named}: this one depends on the earlier steps of a run, as adaptive "
                    "guidance does, but a fit begins many runs in the middle"
                )


def _trials(latents: Latents) -> list[MicroBatch]:
    """Of every group the first two latents, or one where latents are evaluated one at a time."""
    size = min(_LATENTS, latents.micro_batch or _LATENTS)
    firsts: dict[int, MicroBatch] = {}
    for batch in Latents(latents.groups, size, latents.limit).batches():
        firsts.setdefault(batch.place, batch)
    return list(firsts.values())


State = tuple[Tensor, float]
"""x and σ."""


def _some_states(batch: MicroBatch, sigma: float) -> list[State]:
    """As a sampler with short steps asks about them: near each other."""
    noise = batch.x / batch.x.std()
    sigmas = [sigma * _STEP**i for i in range(_STEPS - 1)]
    return [(noise * at, at) for at in (*sigmas, sigmas[-1] * _LAST_STEP)]


def _asked(
    batch: MicroBatch, states: list[State], evaluator: Evaluator, played: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The answers to some states, in a run of their own; those played are known, so it begins after them."""
    model = Tape(evaluator.on(batch, "checking the model"), played)
    answers: list[Tensor] = []

    def sample(extra_args: dict[str, Any]) -> Tensor:
        for x, sigma in states:
            answers.append(model(x, x.new_full((len(x),), sigma), **extra_args))
        return answers[-1]

    with torch.no_grad():
        batch.run(sample, torch.tensor([*(sigma for _, sigma in states), 0.0]))
    return answers


def _answers(batch: MicroBatch, states: list[State], evaluator: Evaluator, named: str) -> list[Tensor]:
    """The same, for the first time.

    Raises:
        DodeError: the model cannot be asked about several latents at once.
    """
    try:
        return _asked(batch, states, evaluator)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        if is_out_of_memory(error) or len(batch.x) == 1:
            raise
        _asked_alone(batch, states[0], evaluator)  # what fails here, too, fails in any sampler
        raise DodeError(
            f"set micro_batch to 1: this model{named} fails on several latents at once: {error}"
        ) from error


def _asked_alone(batch: MicroBatch, state: State, evaluator: Evaluator) -> Tensor:
    """The answers to a state, each latent's in a run of its own."""
    x, sigma = state
    alone = []
    for i in range(len(x)):
        only = slice(i, i + 1)
        one = MicroBatch(batch.group, batch.place, batch.indices[only], batch.numbers[only], batch.x[only])
        alone += _asked(one, [(x[only], sigma)], evaluator)
    return torch.cat(alone)


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return float((a - b).abs().max()) <= _SAME_BATCH * torch.finfo(dtype).eps * float(a.abs().max())


def _alike(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    half = torch.finfo(dtype).bits < 32
    return root_mean_square(a - b) <= (_OTHER_BATCH_IN_HALF if half else _OTHER_BATCH) * root_mean_square(a)
