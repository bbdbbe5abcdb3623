"""Train a LoRA for the few timestamps that a row samples at.

The row is kept as it is. The adapters learn to bring the *end* of its trajectory to the teacher's, by backpropagation
through all of its steps. The reference is SFD's own recipe (Zhou et al. 2024, arXiv:2409.19681): a loss after every step
of Euler, no gradient from one step to the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DodeError, NotFinite
from ..tables.kept import Kept
from ..tables.row import LambdaRow
from .evaluator import Evaluator
from .held_out import distances_of
from .latents import Latents, MicroBatch
from .lora_rollout import Rollout, shuffled_batches
from .lora_state import Chosen, State
from .memory import is_out_of_memory
from .progress import Progress, Tell
from .ranks import add_up
from .teacher import Targets

END, STEP = "end", "step"
LOSSES = (END, STEP)
STRENGTHS = (0.25, 0.5, 0.75)
"""Tried beside 0 and 1 on the latents held out."""
_CHECKS = 4  # of the LoRA at full strength, on the latents held out
_WARM_UP = 10
_LATE = 20  # batches, whose mean loss is told
_STAGE, _CHECKING, _TRYING = "training the LoRA", "checking the LoRA", "trying a batch"
_KEEP_SECONDS = 120.0
"""What a crash can cost at most, beside a batch."""


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

    def batches(self, latents: Latents) -> Iterator[MicroBatch | None]:
        """What is trained on, without an end: this rank's share of each batch, if it has one."""
        return shuffled_batches(latents, self.batch, self.seed, checkpointing=self.checkpointing)

    def trial_cost(self, latents: Latents, evaluations: Sequence[int]) -> int:
        """What ``try_batch`` takes at most, with one of such rows."""
        return min(self.batch, len(latents.fitted)) * max(evaluations) * (1 + self.backward)


class LoraTraining:
    """Trains adapters for one row or, in turns, several.

    It can be ended at any time by an exception from ``progress``. Whatever ends it, the adapters are left with the best
    numbers and strength that the latents held out have shown: with strength 0, if that is none.

    Args:
        targets: the teacher's states, run without the adapters; the adapters act in the model of their latents.
        rows: whose steps are trained for.
        adapters: what learns.
        recipe: how.
        kept: where its state is kept, for another one of the same to go on from; None for nowhere.

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
        self,
        targets: Targets,
        rows: Sequence[LambdaRow],
        adapters: Adapters,
        recipe: LoraRecipe,
        kept: Kept | None = None,
    ) -> None:
        latents = targets.latents
        if not rows:
            raise DodeError("give at least one row to train for")
        if not latents.held_out:
            raise DodeError("give at least two latents, one to train and one to check on")
        self._targets, self._adapters, self._recipe, self._kept = targets, adapters, recipe, kept
        self._parameters = list(adapters.parameters())
        self._trained = [Rollout.of(row, latents) for row in rows]
        for each in self._trained:
            each.check(targets, by_step=recipe.loss == STEP)
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
                self._keep()
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
        self.losses, self.stopped_at, self._looked = [], None, 0
        if self._go_on():
            return
        self.errors_without = self._errors(0.0)
        if not all(map(math.isfinite, self.errors_without)):
            raise DodeError(
                "without a LoRA a row already returns NaN or infinite values on these latents. If the model runs in half "
                "precision, try fp32 or bf16"
            )
        self.best = Chosen(self._numbers(), 0.0, self.errors_without)
        self._nearest = replace(self.best, errors=[math.inf])

    def _rate(self, iteration: int) -> float:
        """It warms up, and falls as a cosine."""
        recipe = self._recipe
        falling = (1 + math.cos(math.pi * iteration / recipe.iterations)) / 2
        return recipe.rate * min(1, (iteration + 1) / _WARM_UP) * falling

    def _learn(self) -> None:
        """Batch by batch, and a look at the latents held out from time to time."""
        count, done = self._recipe.iterations, len(self.losses)
        looks = {count * (i + 1) // _CHECKS for i in range(_CHECKS)}
        if done in looks and done > self._looked:
            self._look()
        numbered = zip(
            range(1, count + 1),
            self._recipe.batches(self._targets.latents),
            cycle(self._trained),
            strict=False,
        )
        kept_at = time.monotonic()
        for number, batch, trained in islice(numbered, done, None):
            try:
                self._adapters.strength = 1.0
                self._optimizer.param_groups[0]["lr"] = self._rate(number - 1)
                loss = self._update(trained, batch)
            except NotFinite:
                self.stopped_at = number
                self._load(self._good)
            except BaseException:
                if self._recipe.loss == END:  # of this batch nothing has been learned yet
                    self._keep()
                raise
            else:
                self.losses.append(loss)
            if number in looks or self.stopped_at is not None:
                self._look()
            elif time.monotonic() - kept_at > _KEEP_SECONDS:
                self._keep()
                kept_at = time.monotonic()
            if self.stopped_at is not None:
                return

    def _look(self) -> None:
        """At the latents held out."""
        self._keep()
        self._consider(1.0)
        self._looked = len(self.losses)

    def _keep(self) -> None:
        """All that another training needs to go on as this one would."""
        if self._kept is not None:
            adam = self._optimizer.state_dict()["state"]
            State(
                self._numbers(),
                adam,
                self.best,
                self._nearest,
                self.losses,
                self.errors_without,
                self._looked,
            ).save(self._kept)

    def _go_on(self) -> bool:
        """From where another one was ended; whether there was one."""
        found = None if self._kept is None else State.load(self._kept, self._parameters)
        if found is None:
            return False
        self._load(found.now)
        self._good = self._numbers()
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": found.adam, "param_groups": groups})
        self.best, self._nearest = found.best, found.nearest
        self.losses, self.errors_without, self._looked = found.losses, found.errors_without, found.looked
        return True

    def _update(self, trained: Rollout, batch: MicroBatch | None) -> float:
        """One batch: the loss, and a step of Adam; of SFD's loss one after each of the sampler's steps.

        Raises:
            NotFinite: something is not finite; before the step that it would have led to.
        """
        by_step = self._recipe.loss == STEP
        steps = trained.row.steps if by_step else 1
        losses: list[float] = []
        try:
            if batch is not None:
                self._descend_along(trained, batch, losses)
            while len(losses) < steps:  # none of this batch is this rank's
                self._optimizer.zero_grad()
                self._step(0.0, losses)
        except NotFinite:
            if all(map(math.isfinite, losses)):  # seen by this rank alone, and the others wait for its part
                self._step(math.nan, losses)
            raise
        return sum(losses)

    def _descend_along(self, trained: Rollout, batch: MicroBatch, losses: list[float]) -> None:
        """By this rank's share of a batch; the losses are added to those given."""
        by_step, stage = self._recipe.loss == STEP, self._stage()
        network = self._evaluator.on(batch, stage)
        sigmas = trained.sigmas(batch.x)

        def descend(x: Tensor, sigma: float, evaluations: int) -> None:
            loss = self._backward(x, self._targets.of(batch, sigma), batch.stand_for)
            self._evaluator.count(batch, stage, x.detach(), self._recipe.backward * evaluations)
            self._step(loss, losses)

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

    def _stage(self) -> str:
        """What it is doing, with the loss of late."""
        late = self.losses[-_LATE:]
        return f"{_STAGE}, loss {sum(late) / len(late):.3g}" if late else _STAGE

    def _backward(self, x: Tensor, target: Tensor, stand_for: float) -> float:
        """The L1 distance of states, ``[m, C, *spatial]``, to the teacher's, summed over a latent; its gradient is left
        at the parameters. Of this rank's part of a batch: over all ranks they add up to the batch's mean."""
        loss = (x - target.to(x)).abs().flatten(1).sum(1).mean() / stand_for
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _step(self, loss: float, losses: list[float]) -> None:
        """One of Adam, by all ranks' gradients; the whole loss is added to those given.

        Raises:
            NotFinite: it or the gradient is not finite; on all ranks, and no step is taken.
        """
        for each in self._parameters:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        whole = gradients[0].new_tensor([loss])
        add_up([whole, *gradients])
        losses.append(float(whole))
        if not all(bool(each.isfinite().all()) for each in (whole, *gradients)):
            raise NotFinite("the loss or its gradient is NaN or infinite")
        self._good = self._numbers()
        self._optimizer.step()

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


def try_batch(
    latents: Latents,
    rows: Sequence[LambdaRow],
    adapters: Adapters,
    recipe: LoraRecipe,
    progress: Progress | Tell | None = None,
) -> None:
    """One batch of the longest row, forwards and backwards: how long it takes and what memory it needs shows before
    anything else is done. Nothing is learned.

    Raises:
        DodeError: memory is not enough.
    """
    trained = max((Rollout.of(row, latents) for row in rows), key=lambda each: each.student.evaluations)
    evaluations = trained.student.evaluations
    batch = next(recipe.batches(latents))
    if batch is None:  # the other ranks try it
        return

    def sample(extra_args: dict[str, Any]) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            start = batch.x.clone()
            *_, x = trained.states(network, start, trained.sigmas(start), extra_args, detached=False)
            x.square().mean().backward()  # type: ignore[no-untyped-call]
        evaluator.count(batch, _TRYING, x.detach(), recipe.backward * evaluations)
        return x.detach()

    with Progress.of(progress, recipe.trial_cost(latents, [evaluations])) as work:
        evaluator = Evaluator(work)
        network = evaluator.on(batch, _TRYING)
        adapters.strength = 1.0
        try:
            batch.run(sample, trained.sigmas(batch.x))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DodeError(
                f"make batch_size smaller than {len(batch.x)}, or the latent: memory ran out in a training batch"
            ) from error
        finally:
            adapters.strength = 0.0
            for parameter in adapters.parameters():
                parameter.grad = None
