"""The rows that a fit has found so far, as they are kept: a fit that was ended goes on with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import DodeError
from ..sampling.denoiser import Denoiser
from ..sampling.solvers import resolve
from ..tables.kept import Kept
from ..tables.provenance import StockSetting, read
from ..tables.row import LambdaRow
from ..tables.table import LambdaTable
from .headline import Contender
from .race import Favourites, MakeSigmas, entrant_of


class RowsSoFar:
    """The rows after each step of a fit.

    Args:
        kept: where; None for nowhere.
        make_sigmas, lender: of the fit.
    """

    def __init__(self, kept: Kept | None, make_sigmas: MakeSigmas | None, lender: Denoiser) -> None:
        self._kept = kept
        self._make_sigmas = make_sigmas
        self._lender = lender

    def save(self, steps: int, contenders: Sequence[Contender], favourites: Favourites) -> None:
        """Keep the rows after so many steps, and the races' favourites; not where a row runs a function of the caller's
        own, which no file holds."""
        rows = [each.row for each in contenders]
        if self._kept is None or any(row.is_callable or row.plain.is_callable for row in rows):
            return
        table = LambdaTable(rows).to_json()
        beside = [_beside(each) for each in contenders]
        self._kept.save(
            {}, {"steps": steps, "table": table, "beside": beside, "favourites": dict(favourites)}
        )

    def load(self) -> tuple[int, list[Contender], dict[str, Sequence[str]]]:
        """After how many steps which rows and favourites were kept; 0 and none where there is nothing to go on from."""
        found = None if self._kept is None else self._kept.load()
        if found is None:
            return 0, [], {}
        _, facts = found
        try:
            rows = LambdaTable.from_json(facts["table"]).rows
            contenders = [self._contender(*both) for both in zip(rows, facts["beside"], strict=True)]
        except DodeError:  # a sampler or schedule that is not here any more
            return 0, [], {}
        return facts["steps"], contenders, facts["favourites"]

    def _contender(self, row: LambdaRow, beside: dict[str, Any]) -> Contender:
        solver, plain, schedule = resolve(row.solver), resolve(row.plain.solver), beside["schedule"]
        if beside["setting"] is None or self._make_sigmas is None:
            return Contender(row, solver, plain, schedule)
        setting = read(StockSetting, beside["setting"], "'setting'")
        begins = float(row.plain.sigmas[0])
        stock = entrant_of(setting, beside["evaluations"], begins, self._make_sigmas, self._lender)
        if stock is None:
            raise DodeError(
                f"there is no schedule {setting.scheduler} with {beside['evaluations']} evaluations"
            )
        return Contender(row, solver, plain, schedule, stock, setting)


def _beside(contender: Contender) -> dict[str, Any]:
    """What is known of a contender beside its row."""
    stock, setting = contender.stock, contender.setting
    return {
        "schedule": contender.schedule,
        "setting": None if setting is None else setting.to_json(),
        "evaluations": None if stock is None else stock.student.evaluations,
    }
