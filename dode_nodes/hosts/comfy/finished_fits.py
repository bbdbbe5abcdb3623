"""Fits that are done are not made again, and fits that were ended go on.

Which table a fit has become is noted in ComfyUI's user folder, where no table comes: no file can pose as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import folder_paths

from ...errors import TableError
from ...fit.key import Identity
from ...tables.kept import Kept
from ...tables.notes import Notes
from ...tables.table import LambdaTable
from . import table_files
from .fit_key import key_of_request
from .job import Distillation, Distilled, Request
from .reporter import ProgressReporter
from .streams import packed, unpacked

_MOST_BYTES = 256 * 2**20
"""Of the latents of all finished fits. What is not kept any more is sampled again."""
_LATENTS = ("teacher", "dode", "stock")


@dataclass(frozen=True)
class Fit:
    """A request as another run of the same knows it.

    Attributes:
        request: the request.
        identity: by ``key_of_request``.
    """

    request: Request
    identity: Identity

    @classmethod
    def of(cls, request: Request, *, redo: bool = False) -> Fit:
        """``redo``: what was kept of a fit that was ended is not gone on with."""
        fit = cls(request, Identity.of(lambda: key_of_request(request)))
        work_of(fit.identity, redo=redo)
        return fit

    @property
    def work(self) -> Kept | None:
        """What is kept while the fit is not done."""
        return work_of(self.identity)

    @property
    def remarks(self) -> list[str]:
        """What the user should know, one line each."""
        return self.identity.remarks

    def find(self, node_id: str | None) -> Distilled | None:
        """What the fit has come to; None where it has not been made, or its table is gone or was changed."""
        table = self._table()
        if table is None:
            return None
        if (kept := self._latents().load()) is not None:
            like, device = self.request.latent, comfy.model_management.intermediate_device()
            latents, facts = kept
            given = {name: unpacked(latents[name].to(device), like) for name in _LATENTS}
            return Distilled(table, **given, opponent=facts.get("opponent", ""))
        with ProgressReporter(self.request.model, self.request.latent, node_id) as reporter:
            again = Distillation(self.request, reporter).again(table)
        self._keep_latents(again)
        return again

    def finish(self, distilled: Distilled, place: Path) -> None:
        """Note what the fit has come to, and where that is saved."""
        if self.work is None:
            return
        self.work.clear()
        self._keep_latents(distilled)
        _notes().add(fit=self.identity.key, table=str(place.absolute()), numbers=distilled.table.sha256)

    def _table(self) -> LambdaTable | None:
        for note in _notes().find(fit=self.identity.key) if self.identity.key else []:
            try:
                table = LambdaTable.load(note["table"]) if "table" in note else None
            except TableError:
                continue
            if table is not None and table.sha256 == note.get("numbers"):
                return table
        return None

    def _latents(self) -> Kept:
        return Kept(_folder() / "finished", self.identity.key, _notes(), _MOST_BYTES, "latents")

    def _keep_latents(self, distilled: Distilled) -> None:
        latents = {name: packed(getattr(distilled, name)).cpu() for name in _LATENTS}
        self._latents().save(latents, {"opponent": distilled.opponent})


def work_of(identity: Identity, *, redo: bool = False) -> Kept | None:
    """Where what is known by this keeps its work: where tables are; None where it has no key.

    Args:
        redo: what is kept there is forgotten.
    """
    if not identity.key:
        return None
    kept = Kept(table_files.save_folder(), identity.key, _notes())
    if redo:
        kept.clear()
    return kept


def _folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "dode_nodes"


def _notes() -> Notes:
    return Notes(_folder() / "fits.jsonl")
