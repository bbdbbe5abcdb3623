"""What the node 'Distill λ' does: the pipeline from latents to rows, inside ComfyUI's sampling path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...fit.consistency import check_consistency, consistency_cost
from ...fit.evaluator import Evaluator
from ...fit.headline import LATENTS as UNSEEN
from ...fit.latents import Latents, in_order
from ...fit.memory import BatchLimit
from ...fit.pipeline import Pipeline
from ...fit.progress import Progress, Reporter
from ...fit.race import MakeSigmas
from ...fit.recipe import Recipe
from ...fit.runs import Run
from ...sampling.sample import corrected
from ...sampling.solvers import resolve
from ...sigmas import HOST_RTOL, check_schedules, same_sigma
from ...tables.kept import Kept
from ...tables.row import LambdaRow
from ...tables.table import LambdaTable
from .attached import attached_names
from .combinations import Combinations
from .model_facts import check_no_cache, computing_dtype, is_flow, model_facts
from .pace import say_pace
from .streams import unpacked
from .usage import opponent_of, opponent_text


class Schedule(NamedTuple):
    """A student's σ, and the number of steps that a KSampler is given for them; None for σ of the user's own."""

    sigmas: torch.Tensor
    steps: int | None


@dataclass(frozen=True, kw_only=True)
class Request(Combinations):
    """What to distil, for some combinations of prompts, guidance and sizes.

    Attributes:
        count: how many noises to draw from ``seed``. The next ones are for the rows' figures.
        schedules: the students'.
        recipe: what to fit, and how.
    """

    count: int
    schedules: Sequence[Schedule]
    recipe: Recipe


@dataclass(frozen=True)
class Distilled:
    """The table, and the held-out latents by the teacher, by the first schedule's best row, and by its opponent.

    Attributes:
        opponent: which stock sampler that is, over which σ.
        remarks: what the user should know afterwards, one line each.
    """

    table: LambdaTable
    teacher: Any
    dode: Any
    stock: Any
    opponent: str
    remarks: Sequence[str] = ()


def schedule(model: ModelPatcher, solver: str, scheduler: str, steps: int) -> Schedule:
    """That of a KSampler with these settings, on the CPU.

    Raises:
        DodeError: the scheduler makes nothing of this number of steps that can be sampled over.
    """
    ksampler = comfy.samplers.KSampler(model, steps, "cpu", sampler=solver, scheduler=scheduler, denoise=1.0)
    try:
        check_schedules([ksampler.sigmas])
    except DodeError as error:
        raise DodeError(
            f"choose another scheduler or another number of steps: for {solver} and {steps}, {scheduler} makes no "
            f"schedule: {error}"
        ) from error
    return Schedule(ksampler.sigmas, steps)


def schedules_of(model: ModelPatcher) -> MakeSigmas:
    """This ComfyUI's schedules for the model, as a race asks for them."""
    sampling = model.get_model_object("model_sampling")

    def make_sigmas(scheduler: str, steps: int, discard_penultimate: bool) -> torch.Tensor:
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps + discard_penultimate)
        if discard_penultimate:
            sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
        check_schedules([sigmas])
        return sigmas

    return make_sigmas


@dataclass(frozen=True, eq=False)
class _Fit:
    """A pipeline of schedules that begin at one σ, and the latents there."""

    latents: Latents
    pipeline: Pipeline
    schedules: Sequence[Schedule]

    def rows(self) -> list[LambdaRow]:
        """What was found so far, each under every number of steps that it was asked for by."""
        return [each for row in self.pipeline.found for each in self._as_asked(row)]

    def _as_asked(self, row: LambdaRow) -> list[LambdaRow]:
        began = row.plain.sigmas
        asked = [steps for sigmas, steps in self.schedules if steps is not None and _are_same(sigmas, began)]
        return [replace(row, settings=dict(row.settings) | {"steps": steps}) for steps in asked] or [row]


class Distillation:
    """A request on its way to a table.

    Args:
        kept: where its work is kept, for another one of the same to go on from; None for nowhere.

    Raises:
        DodeError: there are fewer latents than prompts, or a schedule is none.
    """

    def __init__(self, request: Request, reporter: Reporter, kept: Kept | None = None) -> None:
        for each in request.schedules:
            check_schedules([each.sigmas])
        for model in request.models:
            check_no_cache(model)
        request.check(request.count)
        self._request = request
        self._kept = kept
        self._facts = model_facts(request.model)
        self._reporter = reporter
        self._limit = BatchLimit()
        self._fits: list[_Fit] = []

    def run(self) -> Distilled:
        """All of it, inside ComfyUI's sampling path."""
        self._fits = [self._fit(*each) for each in enumerate(_by_start(self._request.schedules))]
        first = self._fits[0]
        shown = 2 * len(self._shown(first.latents)) * first.pipeline.evaluations(0)
        trials = self.checking_cost(first.latents)
        costs = [fit.pipeline.cost for fit in self._fits]
        self._reporter.begin(
            f"{'; '.join(map(str, costs))}; plus {trials} to check the model first and {shown} for the result "
            "latents",
            *dict.fromkeys(line for fit in self._fits for line in fit.pipeline.remarks),
        )
        totals = [cost.total for cost in costs]
        with Progress(trials + sum(totals) + shown, self._reporter) as work:
            trying, *fitting, showing = work.split(trials, *totals, shown)
            self.check_model(first.latents, trying)
            say_pace(self._reporter, trying, sum(totals) + shown, self._request.model)
            for fit, part in zip(self._fits, fitting, strict=True):
                fit.pipeline.run(part)
            with showing:
                dode, stock, opponent = self._results(first.pipeline.rows, first.latents, showing)
        assert first.pipeline.targets is not None  # noqa: S101  # the pipeline has run
        of_size = torch.cat(list(first.pipeline.targets.ends)[-len(self._request.prompted) :])
        ends = of_size[[number - len(first.latents) for number in self._shown(first.latents)]]
        table = self.table()
        assert table is not None  # noqa: S101
        teacher, dode, stock = map(self._as_latent, (ends, dode, stock))
        return Distilled(table, teacher, dode, stock, opponent, self._remarks())

    def again(self, table: LambdaTable) -> Distilled:
        """What an earlier run of this request gave out beside its table, sampled again: nothing is fitted."""
        schedules, recipe = _by_start(self._request.schedules)[0], self._recipe()
        latents = self.latents_for(schedules[0].sigmas, self._request.count)
        sigmas = [each.sigmas.to(latents.groups[0].x.device) for each in schedules]
        teacher = recipe.teacher_run(latents, sigmas)
        shown = self._shown(latents)
        teaching = teacher.ends_cost(len(shown))
        showing = 2 * len(shown) * _best_of_first_schedule(table.rows).nfe
        self._reporter.begin(
            f"{teaching + showing} evaluations for the result latents, which are not kept any more"
        )
        with Progress(teaching + showing, self._reporter) as work:
            for_teacher, for_rows = work.split(teaching, showing)
            ends = teacher.ends(shown, for_teacher)
            dode, stock, opponent = self._results(table.rows, latents, for_rows)
        teacher, dode, stock = map(self._as_latent, (ends, dode, stock))
        return Distilled(table, teacher, dode, stock, opponent)

    def _results(
        self, rows: Sequence[LambdaRow], latents: Latents, progress: Progress
    ) -> tuple[torch.Tensor, torch.Tensor, str]:
        """Of the first schedule's best row and of its opponent, on the held-out latents; and who that is."""
        row = _best_of_first_schedule(rows)
        stock = opponent_of(row, schedules_of(self._request.model))
        dode, by_stock = (self._held_out_by(each, latents, progress) for each in (row, stock.row))
        return dode, by_stock, opponent_text(stock)

    def table(self) -> LambdaTable | None:
        """The rows so far, and the best of a refinement that was ended; None where there is no row yet."""
        rows = [row for fit in self._fits for row in fit.rows()]
        return LambdaTable(rows, model=self._facts) if rows else None

    def _remarks(self) -> list[str]:
        size = self._limit.size
        if size is None:
            return []
        return [
            f"memory ran out: latents were evaluated {size} at a time. Set micro_batch to {size} next time"
        ]

    def _fit(self, number: int, schedules: Sequence[Schedule]) -> _Fit:
        request = self._request
        latents = self.latents_for(schedules[0].sigmas, request.count)
        of_each = (
            2 if request.teachers else 1
        )  # two of a prompt tell whether they end where the teacher's end
        unseen = self.latents_for(
            schedules[0].sigmas, max(UNSEEN, of_each * request.shares), first=request.count
        )
        sigmas = [each.to(latents.groups[0].x.device) for each in _each_once(schedules)]
        kept = None if self._kept is None else self._kept.part(str(number))
        return _Fit(latents, Pipeline(latents, sigmas, self._recipe(), unseen, kept), schedules)

    def latents_for(self, sigmas: torch.Tensor, count: int, first: int = 0) -> Latents:
        """So many of the request's noises, from number ``first`` on."""
        return self._request.latents(sigmas, count, self._limit, first=first)

    def _shown(self, latents: Latents) -> list[int]:
        """Numbers of the held-out latents of the request's own size."""
        others = sum(len(group.x) for group in latents.groups[: -len(self._request.prompted)])
        return [number for number in latents.held_out if number >= others]

    def checking_cost(self, latents: Latents) -> int:
        """What ``check_model`` takes at most, in evaluations of one latent."""
        return sum(consistency_cost(each) for each in self._run_on(latents))

    def check_model(self, latents: Latents, progress: Progress) -> None:
        """Before the teacher: that one state has one answer."""
        each_on = self._run_on(latents)
        parts = progress.split(*map(consistency_cost, each_on))
        for model, each, part in zip(self._request.models, each_on, parts, strict=True):
            middle = float(model.get_model_object("model_sampling").percent_to_sigma(0.5))
            suspects = ", ".join(attached_names(model))
            check_consistency(each, middle, computing_dtype(model), part, suspects=suspects)

    def _run_on(self, latents: Latents) -> list[Latents]:
        """The latents on each of the request's models."""
        return [latents, latents.teaching] if latents.have_another_teacher else [latents]

    def _recipe(self) -> Recipe:
        """With what is known of the model, and what is kept of the request."""
        recipe = self._request.recipe
        return replace(
            recipe,
            teacher=replace(recipe.teacher, flow=is_flow(self._request.model)),
            settings=dict(recipe.settings) | self._request.facts,
        )

    def _held_out_by(self, row: LambdaRow, latents: Latents, progress: Progress) -> torch.Tensor:
        """The results of a row on the held-out latents."""
        batches = latents.batches(self._shown(latents))
        evaluator, run = Evaluator(progress), Run.of(row, resolve(row.solver), torch.float32)
        ends = [run(corrected(evaluator.on(batch, "result latents"), row), batch) for batch in batches]
        return in_order(batches, ends)

    def _as_latent(self, x: torch.Tensor) -> Any:
        """As ComfyUI passes latents on, where it keeps them."""
        latent = self._request.model.model.process_latent_out(x.float())
        return unpacked(latent.to(comfy.model_management.intermediate_device()), self._request.latent)


def _by_start(schedules: Sequence[Schedule]) -> list[list[Schedule]]:
    """Schedules that begin at one σ together, for they share a teacher; ddim_uniform's do not."""
    groups: list[list[Schedule]] = []
    for each in schedules:
        start = float(each.sigmas[0])
        own = next((g for g in groups if same_sigma(float(g[0].sigmas[0]), start)), None)
        if own is None:
            groups.append([each])
        else:
            own.append(each)
    return groups


def _each_once(schedules: Sequence[Schedule]) -> list[torch.Tensor]:
    """The σ, without those that are there before: ddim_uniform makes one list for 42 and for 43 steps."""
    every = [each.sigmas for each in schedules]
    return [each for i, each in enumerate(every) if not any(_are_same(each, before) for before in every[:i])]


def _are_same(a: torch.Tensor, b: torch.Tensor | np.ndarray) -> bool:
    return len(a) == len(b) and np.allclose(a, b, rtol=HOST_RTOL)


def _best_of_first_schedule(rows: Sequence[LambdaRow]) -> LambdaRow:
    """The greedy row, or its refinement where that is nearer to the teacher on the held-out latents."""
    asked = rows[0].sigmas
    return min((row for row in rows if np.array_equal(row.plain.sigmas, asked)), key=LambdaRow.error_from)
