"""Train a LoRA for the few timestamps that a row samples at.

The row is kept as it is. The adapters learn to bring the *end* of its trajectory to the teacher's, by backpropagation
through all of its steps. The reference is SFD's own recipe (Zhou et al. 2024, arXiv:2409.19681): a loss after every step
of Euler, no gradient from one step to the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import DodeError, NotFinite
from ..sampling.denoiser import Denoiser, DenoiserProxy, DodeDenoiser
from ..sampling.sample import solver_of
from ..sampling.solvers import Sampler, to_d
from ..sigmas import is_flow
from ..tables.free_outputs import NONE
from ..tables.row import LambdaRow
from .evaluator import Evaluator
from .family import under_euler
from .held_out import distances_of
from .latents import Latents, MicroBatch
from .progress import Progress, Tell
from .ranks import rank_and_size
from .student import Student
from .teacher import Targets

END, STEP = "end", "step"
LOSSES = (END, STEP)
STRENGTHS = (0.25, 0.5, 0.75)
"""Tried beside 0 and 1 on the latents held out."""
_CHECKS = 4  # of the LoRA at full strength, on the latents held out
_WARM_UP = 10
_LATE = 20  # batches, whose mean loss is told
_STAGE, _CHECKING = "training the LoRA", "checking the LoRA"


class Adapters(Protocol):
    """What is trained: it acts in the denoiser of the latents.

    Attributes:
        strength: what its change of the network is multiplied by; 0 for the network as it was.
    """

    strength: float

    def parameters(self) -> Sequence[nn.Parameter]:
        """All that is learned; at first it changes nothing."""


@dataclass(frozen=True)
class LoraRecipe:
    """How to train.

    Attributes:
        iterations: batches of latents.
        batch: latents in each.
        rate: Adam's, at its highest; it warms up and falls as a cosine.
        loss: ``"end"``: the distance of the last state; ``"step"``: SFD's, after every step, each with a step of Adam;
            for plain Euler. Both L1, summed over a latent.
        checkpointing: run every evaluation again for its gradient: as little memory as for one of them.
        seed: of the batches.

    Raises:
        DodeError: one of them is invalid.
    """

    iterations: int
    batch: int = 4
    rate: float = 2e-3
    loss: str = END
    checkpointing: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch < 1:
            raise DodeError("training needs at least one iteration, and one latent in each")
        if not 0 < self.rate < math.inf:
            raise DodeError(f"the learning rate must be a positive number, not {self.rate}")
        if self.loss not in LOSSES:
            raise DodeError(f"the loss must be one of {LOSSES}, not {self.loss!r}")

    @property
    def backward(self) -> int:
        """An evaluation's gradient takes about as long as so many evaluations."""
        return 3 if self.checkpointing else 2

    def cost(self, latents: Latents, evaluations: Sequence[int]) -> int:
        """What training for rows of so many evaluations takes at most, in evaluations of one latent."""
        batch = min(self.batch, len(latents.fitted))
        rows = zip(range(self.iterations), cycle(evaluations), strict=False)
        training = sum(n for _, n in rows) * batch * (1 + self.backward)
        checks = 1 + min(_CHECKS, self.iterations) + len(STRENGTHS)
        return training + checks * len(latents.held_out) * sum(evaluations)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Adapters' numbers, and what they do on the latents held out.

    Attributes:
        numbers: of the adapters' parameters.
        strength: 0 where no strength makes the rows better.
        errors: RMS distance to the teacher's end, row by row.
    """

    numbers: Sequence[Tensor]
    strength: float
    errors: Sequence[float]


class LoraTraining:
    """Trains adapters for one row or, in turns, several.

    It can be ended at any time by an exception from ``progress``. Whatever ends it, the adapters are left with the best
    numbers and strength that the latents held out have shown: with strength 0, if that is none.

    Args:
        targets: the teacher's states, run without the adapters; the adapters act in the model of their latents.
        rows: whose steps are trained for.
        adapters: what learns.
        recipe: how.

    Raises:
        IneligibleSampler, DodeError: a row or a setting cannot be trained with; before any evaluation.

    Attributes:
        cost: of all, in evaluations of one latent at most.
        errors_without: of the rows alone, RMS distance to the teacher's end on the latents held out.
        best: what is kept, so far.
        losses: of every batch so far, L1 summed over a latent.
        stopped_at: the batch at which the answers were not finite any more; None where they were to the end.
    """

    def __init__(
        self, targets: Targets, rows: Sequence[LambdaRow], adapters: Adapters, recipe: LoraRecipe
    ) -> None:
        latents = targets.latents
        if rank_and_size()[1] > 1:
            raise DodeError("train a LoRA in one process: several cannot share this work yet")
        if not rows:
            raise DodeError("give at least one row to train for")
        if not latents.held_out:
            raise DodeError("give at least two latents, one to train and one to check on")
        self._targets, self._adapters, self._recipe = targets, adapters, recipe
        self._parameters = list(adapters.parameters())
        self._trained = [_Trained.of(row, targets, recipe.loss) for row in rows]
        self._held_out = latents.batches(latents.held_out)
        self.cost = recipe.cost(latents, [row.nfe for row in rows])
        self.errors_without: Sequence[float] = []
        self.losses: list[float] = []
        self.stopped_at: int | None = None
        self.best = Chosen(self._numbers(), 0.0, [])
        self._nearest = self.best  # at full strength

    def run(self, progress: Progress | Tell | None = None) -> Chosen:
        """All of it.

        Args:
            progress: told after every evaluation; what it raises ends the training.
        """
        with Progress.of(progress, self.cost) as work:
            self._evaluator = Evaluator(work)
            try:
                self._begin()
                self._learn()
                self._load(self._nearest.numbers)
                for strength in STRENGTHS:
                    self._consider(strength)
            finally:
                self._load(self.best.numbers)
                self._adapters.strength = self.best.strength
        return self.best

    def _begin(self) -> None:
        recipe = self._recipe
        self._good = self._numbers()
        self._optimizer = torch.optim.Adam(self._parameters, recipe.rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._share_of_rate)
        self.losses, self.stopped_at = [], None
        self.errors_without = self._errors(0.0)
        if not all(map(math.isfinite, self.errors_without)):
            raise DodeError(
                "without a LoRA a row already returns NaN or infinite values on these latents. If the model runs in half "
                "precision, try fp32 or bf16"
            )
        self.best = Chosen(self._numbers(), 0.0, self.errors_without)
        self._nearest = replace(self.best, errors=[math.inf])

    def _share_of_rate(self, iteration: int) -> float:
        return min(1, (iteration + 1) / _WARM_UP) * (
            1 + math.cos(math.pi * iteration / self._recipe.iterations)
        ) / 2  # fmt: skip

    def _learn(self) -> None:
        """Batch by batch, and a look at the latents held out from time to time."""
        count = self._recipe.iterations
        looks = {count * (i + 1) // _CHECKS for i in range(_CHECKS)}
        batches = zip(range(1, count + 1), self._batches(), cycle(self._trained), strict=False)
        for number, batch, trained in batches:
            self._adapters.strength = 1.0
            try:
                self.losses.append(self._update(trained, batch))
            except NotFinite:
                self.stopped_at = number
                self._load(self._good)
            else:
                self._schedule.step()
            if number in looks or self.stopped_at is not None:
                self._consider(1.0)
            if self.stopped_at is not None:
                return

    def _batches(self) -> Iterator[MicroBatch]:
        """The fitted latents, shuffled again and again; those of a batch share a group."""
        latents = self._targets.latents
        fitted, first = set(latents.fitted), 0
        groups = []
        for group in latents.groups:
            groups.append([number for number in range(first, first + len(group.x)) if number in fitted])
            first += len(group.x)
        whole = replace(latents, micro_batch=None)
        if self._recipe.checkpointing:
            lean = [replace(group, model=_Checkpointed(group.model)) for group in latents.groups]
            whole = replace(whole, groups=lean)
        random = np.random.default_rng(self._recipe.seed)
        size = self._recipe.batch
        while True:
            parts = []
            for numbers in groups:
                shuffled = random.permutation(numbers).tolist()
                parts += [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
            for i in random.permutation(len(parts)):
                yield from whole.batches(parts[i])

    def _update(self, trained: _Trained, batch: MicroBatch) -> float:
        """One batch: the loss, and a step of Adam; of SFD's loss one after each of the sampler's steps.

        Raises:
            NotFinite: something is not finite; before the step that it would have led to.
        """
        by_step, stage = self._recipe.loss == STEP, self._stage()
        network = self._evaluator.on(batch, stage)
        dtype = torch.promote_types(batch.x.dtype, torch.float32)
        sigmas = torch.tensor(trained.student.sigmas, dtype=dtype, device=batch.x.device)
        losses = []

        def descend(x: Tensor, sigma: float, evaluations: int) -> None:
            losses.append(self._descend(x, self._targets.of(batch, sigma)))
            self._evaluator.count(batch, stage, x.detach(), self._recipe.backward * evaluations)

        def sample(extra_args: dict[str, Any]) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                x = batch.x.clone()
                states = trained.states(network, x, sigmas, extra_args, detached=by_step)
                for x, sigma in zip(states, sigmas[1:].tolist(), strict=True):
                    if by_step:
                        descend(x, sigma, 1)
                if not by_step:
                    descend(x, 0.0, trained.student.evaluations)
            return x.detach()

        batch.run(sample, sigmas)
        return sum(losses)

    def _stage(self) -> str:
        """What it is doing, with the loss of late."""
        late = self.losses[-_LATE:]
        return f"{_STAGE}, loss {sum(late) / len(late):.3g}" if late else _STAGE

    def _descend(self, x: Tensor, target: Tensor) -> float:
        """A step of Adam on the L1 distance of states, ``[m, C, *spatial]``, to the teacher's, summed over a latent."""
        loss = (x - target.to(x)).abs().flatten(1).sum(1).mean()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        if not all(bool(each.isfinite().all()) for each in (loss, *gradients)):
            raise NotFinite("the loss or its gradient is NaN or infinite")
        self._good = self._numbers()
        self._optimizer.step()
        return float(loss.detach())

    def _consider(self, strength: float) -> None:
        """Look at the numbers as they are, at this strength, and keep the best."""
        found = Chosen(self._numbers(), strength, self._errors(strength))
        if strength == 1 and self._score(found) < self._score(self._nearest):
            self._nearest = found
        if self._score(found) < self._score(self.best):
            self.best = found

    def _score(self, chosen: Chosen) -> float:
        """Log of the error as a part of the rows' own, the mean over the rows."""
        pairs = zip(chosen.errors, self.errors_without, strict=False)
        return sum(math.log(max(error, 1e-30) / max(own, 1e-30)) for error, own in pairs) / len(chosen.errors)

    def _errors(self, strength: float) -> list[float]:
        self._adapters.strength = strength
        targets, batches = self._targets, self._held_out
        distances = [
            distances_of(each.row, each.solver, targets, batches, self._evaluator, _CHECKING)
            for each in self._trained
        ]
        return [float(np.sqrt(np.square(each).mean())) for each in distances]

    def _numbers(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _load(self, numbers: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, values in zip(self._parameters, numbers, strict=True):
                parameter.copy_(values)


@dataclass(frozen=True, eq=False)
class _Trained:
    """A row that is trained for, and its steps as Euler's."""

    row: LambdaRow
    solver: Sampler
    student: Student

    @classmethod
    def of(cls, row: LambdaRow, targets: Targets, loss: str) -> _Trained:
        solver = solver_of(row, None)
        student = under_euler(row, solver, targets.latents.lender)
        targets.check([float(row.sigmas[0]), 0.0])
        if loss == STEP:
            if student.corrections.any() or student.free != NONE:
                raise DodeError(
                    f"the loss per step is for plain Euler: choose the loss at the end for {row.label}"
                )
            targets.check(row.sigmas[1:].tolist())
        return cls(row, solver, student)

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
    """A denoiser whose evaluations are run again for their gradients, in place of keeping all that they computed."""

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised: Tensor = checkpoint(self._model, x, sigma, use_reentrant=False, **extra_args)
        return denoised
