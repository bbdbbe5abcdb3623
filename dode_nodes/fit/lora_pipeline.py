"""From latents to rows with a LoRA of their own: the rows' fit, one run of the teacher, the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import DodeError
from ..sigmas import same_sigma
from ..tables.describe import columns, number, percent
from ..tables.gate import finite
from ..tables.kept import Kept
from ..tables.provenance import TrainedLora
from ..tables.row import LambdaRow
from .evaluator import Evaluator
from .latents import Latents
from .levenberg_marquardt import LeastSquaresProblem
from .lora import Adapters, LoraRecipe, LoraTraining, try_batch
from .pipeline import GOES_ON, Pipeline
from .progress import Progress, Tell
from .quality import start_schedule
from .race import MakeSigmas, entrant_of
from .teacher import Targets, Teacher, plan_teacher

ADVISED = 5
"""Evaluations, above which a LoRA hardly pays."""
TEACHER = Teacher("dpmpp_2m", scale=2)
TEACHER_STEPS = 20
"""Of the schedule that the teacher's grid is made of: its end alone is followed, on many noises."""


DONE_BEFORE = "this LoRA was trained before, and is taken as it was. To train it anew, set redo"
_TEACHER, _LORA, _DONE = "teacher", "lora", "done"
"""Parts of what is kept."""


@dataclass(frozen=True)
class LoraQuality:
    """How much work it may be.

    Attributes:
        latents: noises, of which a quarter is held out.
        iterations: for each row.
    """

    latents: int
    iterations: int

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"{self.latents} noises, {self.iterations} batches for each number of steps"


LORA_QUALITIES = {
    "quick": LoraQuality(64, 100),
    "good": LoraQuality(256, 400),
    "best": LoraQuality(1024, 1600),
}
"""Under the names that a fit has for the same choice (``quality``). More noises bring more than more batches on the same
ones (docs/measurements.md)."""


@dataclass(frozen=True)
class LoraCost:
    """What it may come to, at most, in evaluations of one latent; a backward pass counts as two or three of them."""

    rows: int
    trial: int
    teacher: int
    training: int
    comparing: int

    @property
    def total(self) -> int:
        """Of all."""
        return self.rows + self.trial + self.teacher + self.training + self.comparing

    def __str__(self) -> str:
        parts = [f"rows {self.rows}"] if self.rows else []
        parts += [
            f"trying a batch {self.trial}",
            f"teacher {self.teacher}",
            f"training the LoRA {self.training}",
        ]
        return f"at most {self.total} evaluations: {', '.join(parts)}"


@dataclass(frozen=True)
class Outcome:
    """What came of a row. All errors are RMS distances to the teacher's end on the latents held out of the training.

    Attributes:
        row: as it was before.
        error_without: of the row alone.
        error: with the LoRA, at its strength; None where it makes this row no better.
        stock: of the best stock setting that the row's fit has found; None where it has found none.
        latents: how many were held out.
        strength: the LoRA's, one for all rows.
    """

    row: LambdaRow
    error_without: float
    error: float | None
    stock: float | None
    latents: int
    strength: float

    def named(self, content: str, name: str) -> LambdaRow:
        """The row with the LoRA of this hash and file name as its own, if that makes it better."""
        if self.error is None:
            return self.row
        trained = TrainedLora(content, self.strength, self.error, self.error_without, self.latents, name)
        return replace(self.row, trained_lora=trained)


def teacher_schedule(make_sigmas: MakeSigmas, *, flow: bool) -> Tensor:
    """The σ that the teacher's grid is made of, and where its latents and the rows begin."""
    return make_sigmas(start_schedule(flow=flow), TEACHER_STEPS, False)


class LoraPipeline:
    """Trains one LoRA for rows of one or more numbers of steps.

    It can be ended at any time, by an exception from ``progress``; ``rows`` and ``outcomes`` are what there is by then,
    and the adapters are left as ``LoraTraining`` leaves them.

    Args:
        latents: to train on; the adapters act in their model.
        rows: whose steps are trained for; or the distillation that makes them.
        steps: evaluations of each row.
        adapters: what learns; nothing so far.
        recipe: how.
        make_sigmas: the host's schedules.
        flow: whether the model is a rectified flow.
        kept: where the work is kept, for a run that is ended to go on from, and in the end what it came to, for none to
            do it again; None for nowhere.

    Raises:
        IneligibleSampler, DodeError: something cannot serve; before any evaluation.

    Attributes:
        cost: of all, known before.
        remarks: what to know before it starts, one line each.
        rows: that are trained for, once they are known.
        outcomes: what came of them, once it is known.
        losses, stopped_at: see ``LoraTraining``.
    """

    def __init__(
        self,
        latents: Latents,
        rows: Sequence[LambdaRow] | Pipeline,
        steps: Sequence[int],
        adapters: Adapters,
        recipe: LoraRecipe,
        make_sigmas: MakeSigmas,
        *,
        flow: bool,
        kept: Kept | None = None,
    ) -> None:
        self._latents, self._adapters, self._kept = latents, adapters, kept
        self._recipe, self._make_sigmas = recipe, make_sigmas
        self._steps = list(steps)
        self._distillation = rows if isinstance(rows, Pipeline) else None
        self.rows: list[LambdaRow] = [] if isinstance(rows, Pipeline) else list(rows)
        self.outcomes: list[Outcome] = []
        self.losses: list[float] = []
        self.stopped_at: int | None = None
        schedule = teacher_schedule(make_sigmas, flow=flow)
        for row in self.rows:
            if not same_sigma(float(row.sigmas[0]), float(schedule[0])):
                raise DodeError(
                    f"choose a row that begins at σ = {float(schedule[0]):.6g}, as this model's teacher does: "
                    f"{row.label} begins at {row.sigmas[0]:.6g}"
                )
        taught = None if kept is None else kept.part(_TEACHER)
        self._teacher = replace(plan_teacher(latents, schedule, replace(TEACHER, flow=flow)), kept=taught)
        self.cost = LoraCost(
            rows=0 if self._distillation is None else self._distillation.cost.total,
            trial=recipe.trial_cost(latents, self._steps),
            teacher=self._teacher.cost,
            training=recipe.cost(latents, self._steps),
            comparing=sum(self._steps) * len(latents.held_out),
        )
        self.remarks = [] if self._distillation is None else list(self._distillation.remarks)
        if kept is not None and kept.part(_DONE).exists():
            self.remarks.append(DONE_BEFORE)
        elif taught is not None and taught.exists():
            self.remarks.append(GOES_ON)
        if max(self._steps) > ADVISED:
            self.remarks.append(
                f"above {ADVISED} steps a LoRA hardly pays: the row alone comes about as near, at no training"
            )

    def run(
        self,
        progress: Progress | Tell | None = None,
        tried: Callable[[Progress, int], None] = lambda trial, left: None,
    ) -> list[Outcome]:
        """All of it.

        Args:
            progress: told after every evaluation; what it raises ends the work.
            tried: told of the trial of a batch, and how many evaluations there may still be after it.
        """
        cost = self.cost
        with Progress.of(progress, cost.total) as work:
            fitting, trying, teaching, training, comparing = work.split(
                cost.rows, cost.trial, cost.teacher, cost.training, cost.comparing
            )
            if self._take_over():
                return self.outcomes
            self._adapters.strength = 0.0
            if self._distillation is not None:
                with fitting:
                    self._distillation.run(fitting)
                self.rows = best_rows(self._distillation.rows, self._steps)
            try_batch(self._latents, self.rows, self._adapters, self._recipe, trying)
            tried(trying, cost.teacher + cost.training + cost.comparing)
            targets = self._teacher(teaching)
            kept = None if self._kept is None else self._kept.part(_LORA)
            lora = LoraTraining(targets, self.rows, self._adapters, self._recipe, kept)
            try:
                lora.run(training)
            finally:
                self.losses, self.stopped_at = lora.losses, lora.stopped_at
                self.outcomes = self._outcomes(lora)
            strength, self._adapters.strength = self._adapters.strength, 0.0
            try:
                with comparing:
                    evaluator = Evaluator(comparing)
                    errors = [self._error_of_stock(each.row, targets, evaluator) for each in self.outcomes]
            finally:
                self._adapters.strength = strength
            pairs = zip(self.outcomes, errors, strict=True)
            self.outcomes = [replace(each, stock=error) for each, error in pairs]
        self._finish()
        return self.outcomes

    def _finish(self) -> None:
        """Keep what it came to in place of the work."""
        if self._kept is None:
            return
        numbers = {str(i): x.detach().clone() for i, x in enumerate(self._adapters.parameters())}
        told = [[each.error_without, each.error, each.stock, each.latents] for each in self.outcomes]
        facts = {"outcomes": told, "losses": self.losses, "stopped_at": self.stopped_at}
        self._kept.part(_DONE).save(numbers, facts | {"strength": self._adapters.strength})
        for part in (_TEACHER, _LORA):
            self._kept.part(part).remove()

    def _take_over(self) -> bool:
        """What the same work came to before; whether that is known."""
        found = None if self._kept is None else self._kept.part(_DONE).load()
        if found is None:
            return False
        numbers, facts = found
        with torch.no_grad():
            for i, parameter in enumerate(self._adapters.parameters()):
                parameter.copy_(numbers[str(i)])
        strength = self._adapters.strength = facts["strength"]
        self.outcomes = [
            Outcome(row, alone, error, stock, latents, strength)
            for row, (alone, error, stock, latents) in zip(self.rows, facts["outcomes"], strict=True)
        ]
        self.losses, self.stopped_at = facts["losses"], facts["stopped_at"]
        return True

    @property
    def errors(self) -> list[tuple[int, float | None, float, float | None]]:
        """Of each row its evaluations, and the errors of the best stock setting, without the LoRA and with it."""
        return [(each.row.nfe, each.stock, each.error_without, each.error) for each in self.outcomes]

    @property
    def helps(self) -> bool:
        """Whether the LoRA makes a row better."""
        return any(each.error is not None for each in self.outcomes)

    def report(self) -> str:
        """What came of it, in words, with a line for each row."""
        first, *_ = self.outcomes
        what = (
            f"with the LoRA at strength {first.strength:g}" if self.helps else "the LoRA makes no row better"
        )
        lines = [
            *columns([_HEADS, *map(_line, self.outcomes)]),
            "",
            f"RMS distance to the teacher on {first.latents} latents that the LoRA was not trained on; {what}.",
        ]
        if self.stopped_at is not None:
            lines.append(
                f"The training ended at batch {self.stopped_at}, where numbers were not finite any more: try a smaller "
                "learning rate."
            )
        return "\n".join(lines)

    def _outcomes(self, lora: LoraTraining) -> list[Outcome]:
        """None, where the training was ended before it had looked at the latents held out."""
        best, held = lora.best, len(self._latents.held_out)
        return [
            Outcome(row, alone, error if error < alone else None, None, held, best.strength)
            for row, alone, error in zip(self.rows, lora.errors_without, best.errors, strict=False)
        ]

    def _error_of_stock(self, row: LambdaRow, targets: Targets, evaluator: Evaluator) -> float | None:
        if row.best_stock is None:
            return None
        latents, sigma = self._latents, float(row.sigmas[0])
        found = entrant_of(row.best_stock, row.nfe, sigma, self._make_sigmas, latents.lender)
        if found is None:
            return None
        problem = LeastSquaresProblem(targets, latents.held_out, evaluator, "the best stock setting")
        return finite(problem.trial(found.student).error)


_HEADS = ("evaluations", "best stock", "row", "row with the LoRA", "change")


def _line(outcome: Outcome) -> tuple[str, ...]:
    error, alone = outcome.error, outcome.error_without
    change = "no gain" if error is None else percent(error, alone)
    return str(outcome.row.nfe), number(outcome.stock), number(alone), number(error), change


def best_rows(rows: Sequence[LambdaRow], steps: Sequence[int]) -> list[LambdaRow]:
    """For each number of evaluations the row that is nearest to its teacher.

    Raises:
        DodeError: there is none for one of them.
    """
    found = []
    for n in steps:
        serving = [row for row in rows if row.nfe == n]
        if not serving:
            raise DodeError(f"there is no row of {n} evaluation{'s' if n > 1 else ''} to train a LoRA for")
        found.append(min(serving, key=LambdaRow.error_from))
    return found
