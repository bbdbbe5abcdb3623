"""The progress bar of the command line. It also handles interrupts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

from ..fit.progress import Progress
from ..fit.ranks import is_first_rank, meet


class Bar:
    """One bar over everything, with the time left; of several ranks, the first has it.

    Args:
        stop_if_asked: called after every evaluation; what it raises ends the work.
    """

    def __init__(self, stop_if_asked: Callable[[], None] = lambda: None) -> None:
        self._stop_if_asked = stop_if_asked
        self._bar: tqdm | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, *lines: str) -> None:
        """Say what is to come, once all ranks are ready."""
        meet()
        if is_first_rank():
            for line in lines:
                print(line, flush=True)
            self._bar = tqdm(unit=" evaluations", unit_scale=True)

    def say(self, line: str) -> None:
        """Something to read before the work goes on."""
        if self._bar is not None:
            self._bar.write(line)

    def __call__(self, progress: Progress) -> None:
        """After an evaluation."""
        self._stop_if_asked()
        if self._bar is not None:
            self._bar.total = progress.total
            self._bar.set_description(progress.stage, refresh=False)
            self._bar.update(progress.done - self._bar.n)


def raise_with(error: BaseException, where: str) -> NoReturn:
    """End as the error does, and say where what was found by then is."""
    if isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt(where) from error
    print(where, file=sys.stderr)
    raise error
