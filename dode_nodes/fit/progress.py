"""The progress of a long piece of work with any number of parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from torch import Tensor


class Progress:
    """A piece of work, counted in network evaluations of one latent each.

    The total is an upper bound. It is known from the start and only shrinks, when a part ends that did not
    need all of its share. What ``tell`` raises ends the work: that is how it is cancelled.

    Args:
        total: evaluations at most.
        tell: called with the whole after every evaluation.

    Attributes:
        stage: what the evaluations are for at present.
        denoised: the network's last output, for a preview; None before there is one.
    """

    def __init__(self, total: int, tell: Tell | None = None) -> None:
        self.stage = ""
        self.denoised: Tensor | None = None
        self._total = total
        self._done = 0.0  # of all ranks, as far as this one can tell
        self._tell = tell
        self._whole: Progress | None = None
        self._first = self._last = (0.0, 0.0)

    @classmethod
    def of(cls, progress: Progress | Tell | None, total: int) -> Progress:
        """The work of a function that knows its total: its caller's share for it, or a whole of its own.

        Args:
            progress: a part that was planned for it; or what is to be told; or nothing.
            total: evaluations at most.

        Raises:
            ValueError: the share is too small, a mistake of the plan.
        """
        if not isinstance(progress, Progress):
            return cls(total, progress)
        if total > progress._total:
            raise ValueError(f"the work takes {total} evaluations, but {progress._total} were planned")
        progress._shrink_to(total)
        return progress

    @property
    def total(self) -> int:
        """Evaluations at most, those done included."""
        return self._total

    @property
    def done(self) -> int:
        """Evaluations so far."""
        return min(round(self._done), self._total)

    @property
    def pace(self) -> float | None:
        """Seconds per evaluation since the first was done: before that a host may have loaded the model."""
        (first, began), (last, ended) = self._first, self._last
        return (ended - began) / (last - first) if last > first else None

    def split(self, *totals: int) -> list[Progress]:
        """Parts of this work, with a share each.

        Raises:
            ValueError: they are more than the whole, a mistake of the plan.
        """
        if sum(totals) > self._total:
            raise ValueError(f"the parts take {totals} evaluations, but {self._total} were planned")
        parts = [Progress(total) for total in totals]
        for part in parts:
            part._whole = self
        return parts

    def advance(self, evaluations: float, stage: str, denoised: Tensor) -> None:
        """Note evaluations, here and in all that this is a part of, and tell."""
        self._done += evaluations
        self._last = self._done, time.monotonic()
        if not self._first[0]:
            self._first = self._last
        self.stage, self.denoised = stage, denoised
        if self._whole is not None:
            self._whole.advance(evaluations, stage, denoised)
        if self._tell is not None:
            self._tell(self)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The work is over: what it did not need is taken off every total."""
        self._shrink_to(self.done)
        if kind is None and self._tell is not None:
            self._tell(self)

    def _shrink_to(self, total: int) -> None:
        unneeded = self._total - total
        piece: Progress | None = self
        while piece is not None:
            piece._total -= unneeded
            piece = piece._whole


Tell = Callable[[Progress], None]


class Reporter(Protocol):
    """Where a host shows progress, and cancels."""

    def begin(self, *lines: str) -> None:
        """Say what is to come."""

    def say(self, line: str) -> None:
        """Something to read before the work goes on."""

    def __call__(self, progress: Progress) -> None:
        """After an evaluation."""


def so_far(progress: Progress, seconds: float) -> str:
    """Where the work is, and how much longer it takes, after so many seconds and one evaluation at least."""
    done, total = progress.done, progress.total
    left = seconds * (total - done) / max(done, 1)
    return f"{progress.stage}: {done} of {total} evaluations, {in_words(left)} left"


def in_words(seconds: float) -> str:
    """A duration: 40 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
