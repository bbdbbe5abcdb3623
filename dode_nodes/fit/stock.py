"""The best stock setting for a model and a number of evaluations: what a few-step solver has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..errors import DodeError
from ..sigmas import is_flow
from ..tables.gate import Facts
from ..tables.provenance import PLAIN, Distances, HeldOutErrors, Origin, StockSetting
from ..tables.row import LambdaRow
from .evaluator import Evaluator
from .levenberg_marquardt import LeastSquaresProblem
from .progress import Progress, Tell
from .race import Entrant, Favourites, MakeSigmas, admitted, entrants, finalists, race, race_cost
from .teacher import Targets, TeacherRun

_STAGE = "stock settings"


@dataclass(frozen=True, eq=False)
class Found:
    """What a search has found.

    Attributes:
        ranked: all settings, the best first; their distances are of the latents that each has run.
        setting: the best, as a row keeps it.
    """

    ranked: Sequence[Entrant]
    setting: StockSetting

    @property
    def best(self) -> Entrant:
        """The best setting."""
        return self.ranked[0]

    def as_row(self, targets: Targets, settings: Facts) -> LambdaRow:
        """The setting itself as a row of a table, for hosts to sample with.

        Args:
            targets: what the search was made on, with latents held out.
            settings: facts to keep in the row.
        """
        best, error = self.best, self.setting.error
        sigmas = best.student.sigmas
        named = {} if best.discard_penultimate else {"scheduler": best.scheduler}
        steps, latents = len(sigmas) - 1, targets.latents
        return LambdaRow(
            best.solver,
            sigmas,
            (1,) * steps,
            np.zeros(steps),
            solver_options=best.options,
            origin=Origin(PLAIN),
            errors=HeldOutErrors.of_whole(len(latents.held_out), steps, error, error),
            best_stock=self.setting,
            settings={name: fact for name, fact in settings.items() if name != "scheduler"} | named,
            report={
                "fitted_latents": len(latents.fitted),
                "held_out_latents": len(latents.held_out),
                "checked": True,
                "teacher_error": targets.own_error,
            },
        )


def steps_needed(steps: int, error: float, error_with: Callable[[int], float]) -> int:
    """The fewest steps beyond these with which a solver has no larger error, by bisection: more are nearer.

    Args:
        steps: that are too few.
        error: to be reached.
        error_with: the solver's with so many steps.

    Returns:
        At most twice the steps; one more where these do not reach it either.
    """
    too_few, enough = steps, 2 * steps + 1
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if error_with(middle) <= error:
            enough = middle
        else:
            too_few = middle
    return enough


class StockSearch:
    """A race of stock samplers on a host's schedules, and of those in front the one nearest all latents.

    Args:
        teacher: the teacher, planned or run.
        evaluations: of the network, for one picture.
        sigmas: a schedule that begins where the settings are to begin.
        make_sigmas: the host's schedules.
        favourites: see ``race.Favourites``.

    Raises:
        DodeError: no setting has so many evaluations.
    """

    def __init__(
        self,
        teacher: TeacherRun | Targets,
        evaluations: int,
        sigmas: Tensor,
        make_sigmas: MakeSigmas,
        favourites: Favourites | None = None,
    ) -> None:
        latents = teacher.latents
        everybody = entrants(
            evaluations,
            float(sigmas[0]),
            flow=is_flow(sigmas),
            make_sigmas=make_sigmas,
            lender=latents.lender,
            free_first=False,
        )
        self._runners = admitted(everybody, favourites or {})
        if not self._runners:
            raise DodeError(f"there is no stock setting with {evaluations} evaluations to compare with")
        self._last = finalists(self._runners)
        self.cost = race_cost(self._runners, len(latents.fitted))
        self.cost += self._last * evaluations * len(latents.held_out)

    def __call__(self, targets: Targets, progress: Progress | Tell | None = None) -> Found:
        """Race them.

        Raises:
            DodeError: none of them ends in finite numbers.
        """
        with Progress.of(progress, self.cost) as work:
            evaluator = Evaluator(work)

            def on(numbers: Sequence[int]) -> LeastSquaresProblem:
                return LeastSquaresProblem(targets, numbers, evaluator, _STAGE)

            ranked = race(self._runners, targets.latents.fitted, on)
            held_out = targets.latents.held_out
            checked = on(held_out)
            last = []
            for each in ranked[: self._last]:
                ran = checked.trial(each.student).distances if held_out else np.empty(0)
                last.append((replace(each, distances=np.concatenate([each.distances, ran])), ran))
            last.sort(key=lambda pair: pair[0].mean)
            best, shown = last[0]
            shown = shown if held_out else best.distances
            if not np.isfinite(best.distances).all():
                raise DodeError("no stock setting ends in finite numbers. Try fp32 or bf16")
            setting = best.setting(Distances.over(shown).rms, len(shown), len(self._runners))
            return Found([*(each for each, _ in last), *ranked[self._last :]], setting)
