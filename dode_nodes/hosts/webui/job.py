"""A distillation in the host's queue, whoever asks for it: the tab or the API."""

from __future__ import annotations

import io
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from modules import call_queue, errors, shared
from PIL import Image

from ...errors import DodeError, TableError
from ...fit.progress import Progress, so_far
from ...tables import publish
from ...tables.describe import headlines, printable
from ...tables.names import SUFFIX, parts_of
from ...tables.plots import report_figure
from ...tables.table import LambdaTable
from . import folders, picture
from .distilling import Distillation
from .request import Request


class Job:
    """One of them.

    Raises:
        DodeError: no table can be saved under this name.

    Attributes:
        lines: what has been said: the cost first, then what came of it.
        progress: where it is.
        table: that was made, or as much of it as there was until it was interrupted; None where that is nothing.
        path: where it is saved.
        report: the table's picture; None where it cannot be drawn.
        failed: why it ended early; empty where it did not.
    """

    def __init__(self, request: Request) -> None:
        self.lines: list[str] = []
        self.progress = "in the queue"
        self.table: LambdaTable | None = None
        self.path: Path | None = None
        self.report: Image.Image | None = None
        self.failed = ""
        self._request = request
        self._place = _place_for(request.name, for_comfyui=request.for_comfyui)
        self._begun = time.monotonic()
        self._cancelled = self._runs = False

    def run(self) -> None:
        """All of it, when the host's queue gets to it."""
        with call_queue.queue_lock:
            shared.state.begin(job="D-ODE distilling")
            self._runs = True
            try:
                if not self._cancelled:
                    _on_the_hosts_thread(self._distil)
                if self._cancelled or shared.state.interrupted:
                    self.failed = self.failed or "it was interrupted"
            finally:
                self._runs = False
                shared.state.end()
        self._keep()
        self.progress = ""

    def cancel(self) -> None:
        """End it at the next evaluation; what has been found is kept."""
        self._cancelled = True
        if self._runs:
            shared.state.interrupt()

    def begin(self, *lines: str) -> None:
        """Say what is to come, and start the clock."""
        self.lines += lines
        self._begun = time.monotonic()

    def say(self, line: str) -> None:
        """Something to read before the work goes on."""
        self.lines.append(line)

    def __call__(self, progress: Progress) -> None:
        """After an evaluation."""
        self.progress = so_far(progress, time.monotonic() - self._begun)
        shared.state.sampling_step, shared.state.sampling_steps = progress.done, progress.total
        shared.state.textinfo = self.progress

    def _distil(self) -> None:
        try:
            distillation = Distillation(self._request, self)
            try:
                distillation.run()
            finally:
                self.table = distillation.table()
        except DodeError as error:
            self.failed = str(error)
        except Exception as error:  # of the host's, or of an extension's
            errors.report("D-ODE: distilling failed", exc_info=True)
            self.failed = f"{type(error).__name__}: {error}"

    def _keep(self) -> None:
        if self.failed:
            self.lines.append(printable(self.failed))
        if self.table is None:
            return
        try:
            self.path = _save(self.table, self._place)
        except TableError as error:
            self.failed = str(error)
            self.lines.append(self.failed)
            return
        self.table = LambdaTable.load(self.path)  # by its name
        picture.trust().add(self.table)
        self.lines += [f"Saved as {self.path}", *headlines(self.table)]
        self.report = _report(self.table)


def _on_the_hosts_thread(work: Callable[[], None]) -> None:
    """Forge and Neo move models on one thread alone."""
    try:
        from modules_forge.main_thread import run_and_wait_result
    except ImportError:
        work()
        return
    if threading.current_thread() is threading.main_thread():
        work()
    else:
        run_and_wait_result(work)


def _place_for(name: str, *, for_comfyui: bool) -> Path:
    """Where a table of this name is saved, without what a file's name has after it. It is tried before the work.

    Raises:
        TableError: it is no name for a table, or the folder cannot be written.
    """
    folder = folders.models_folder() if for_comfyui else folders.folders()[0]
    stem = folder.joinpath(*parts_of(name))
    try:
        publish.try_writing(stem.parent)
    except OSError as error:
        raise publish.unwritable(stem.parent, error) from error
    return stem


def _save(table: LambdaTable, stem: Path) -> Path:
    """Save a table that has cost work: in the place that was found for it, else in another folder.

    Raises:
        TableError: it can be saved nowhere.
    """

    def save_in(folder: Path) -> Path:
        file = folder / f"{table.named(stem.name)}{SUFFIX}"
        return publish.first_free(publish.numbered(file), table.save)

    return publish.in_first([stem.parent, *folders.folders(), Path(tempfile.gettempdir())], save_in)


def _report(table: LambdaTable) -> Image.Image | None:
    """A picture is never worth losing the work that it would show."""
    file = io.BytesIO()
    try:
        report_figure(table).savefig(file, format="png")
    except Exception as error:  # whatever a broken or foreign matplotlib makes of it
        logging.warning("D-ODE: no picture: %s", error)
        return None
    return Image.open(file)
