"""What the node 'Distill λ' does: the pipeline from latents to rows, inside ComfyUI's sampling path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import numpy as np
import psutil
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...fit.consistency import check_consistency, consistency_cost
from ...fit.evaluator import Evaluator
from ...fit.headline import LATENTS as UNSEEN
from ...fit.latents import Latents, in_order
from ...fit.memory import BatchLimit
from ...fit.pipeline import Pipeline, Recipe
from ...fit.progress import Progress, Reporter, in_words
from ...fit.race import MakeSigmas
from ...fit.runs import Run
from ...fit.teacher import plan_teacher
from ...sampling.sample import corrected
from ...sampling.solvers import resolve
from ...sigmas import HOST_RTOL, check_schedules, same_sigma
from ...tables.kept import Kept
from ...tables.row import LambdaRow
from ...tables.table import LambdaTable
from .attached import attached_names
from .guiders import Guider, guidance_scale, one_prompt_per_row
from .model_facts import check_no_cache, computing_dtype, is_flow, model_facts
from .prompts import GuidedModel, micro_batch_that_fits, noise_per_latent
from .streams import packed, unpacked
from .usage import opponent_of, opponent_text


class Schedule(NamedTuple):
    """A student's σ, and the number of steps that a KSampler is given for them; None for σ of the user's own."""

    sigmas: torch.Tensor
    steps: int | None


@dataclass(frozen=True)
class Request:
    """What to distil.

    Attributes:
        guiders: of one model; each takes an equal share of the latents, and a batched prompt's rows share it.
        latent: an empty latent of the size to distil at, ``[1, C, *spatial]``, or of several streams.
        further: empty latents of further sizes; every guider takes a share at each.
        latents: how many noises to draw from ``seed``. The next ones are for the rows' figures.
        schedules: the students'.
        recipe: what to fit, and how.
        micro_batch: latents evaluated at a time; 0 for what fits.
    """

    guiders: Sequence[Guider]
    latent: Any
    latents: int
    seed: int
    schedules: Sequence[Schedule]
    recipe: Recipe
    micro_batch: int = 0
    further: Sequence[Any] = ()

    @property
    def model(self) -> ModelPatcher:
        """The guiders'."""
        model: ModelPatcher = self.guiders[0].model_patcher
        return model


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
        """What was found so far, each with the number of steps that was asked for."""
        return [self._as_asked(row) for row in self.pipeline.found]

    def _as_asked(self, row: LambdaRow) -> LambdaRow:
        began = row.plain.sigmas
        for sigmas, steps in self.schedules:
            if steps is not None and len(sigmas) == len(began) and np.allclose(sigmas, began, rtol=HOST_RTOL):
                return replace(row, settings=dict(row.settings) | {"steps": steps})
        return row


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
        check_no_cache(request.model)
        self._request = request
        self._kept = kept
        self._facts = model_facts(request.model)
        self._reporter = reporter
        self._guiders = [
            one for guider in request.guiders for one in one_prompt_per_row(guider, request.latent)
        ]
        self._check_latents()
        self._limit = BatchLimit()
        self._fits: list[_Fit] = []

    def _check_latents(self) -> None:
        request, sizes = self._request, 1 + len(self._request.further)
        for each in request.further:
            one, other = packed(request.latent), packed(each)
            if one.ndim != other.ndim or one.shape[1] != other.shape[1]:
                raise DodeError("connect latents of one kind: only their sizes may differ")
        shares = len(self._guiders) * sizes
        what = "prompts" if sizes == 1 and len(self._scales) < 2 else "combinations of prompt, cfg and size"
        if request.latents < max(2, shares):
            raise DodeError(
                f"{shares} {what} need at least {max(2, shares)} latents, not {request.latents}: "
                "some are held out to check λ"
            )

    @property
    def _scales(self) -> list[float]:
        """The guidance of the guiders that say theirs, the request's own first."""
        scales = map(guidance_scale, self._guiders)
        return list(dict.fromkeys(scale for scale in scales if scale is not None))

    def run(self) -> Distilled:
        """All of it, inside ComfyUI's sampling path."""
        self._fits = [self._fit(*each) for each in enumerate(_by_start(self._request.schedules))]
        first = self._fits[0]
        shown = 2 * len(self._shown(first.latents)) * first.pipeline.evaluations(0)
        trials = consistency_cost(first.latents)
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
            if trying.pace is not None:
                seconds = trying.pace * (sum(totals) + shown)
                self._reporter.say(
                    f"at most about {in_words(seconds)} on this machine, with {self._memory()} of memory so far"
                )
            for fit, part in zip(self._fits, fitting, strict=True):
                fit.pipeline.run(part)
            with showing:
                dode, stock, opponent = self._results(first.pipeline.rows, first.latents, showing)
        assert first.pipeline.targets is not None  # noqa: S101  # the pipeline has run
        of_size = torch.cat(list(first.pipeline.targets.ends)[-len(self._guiders) :])
        ends = of_size[[number - len(first.latents) for number in self._shown(first.latents)]]
        table = self.table()
        assert table is not None  # noqa: S101
        teacher, dode, stock = map(self._as_latent, (ends, dode, stock))
        return Distilled(table, teacher, dode, stock, opponent, self._remarks())

    def again(self, table: LambdaTable) -> Distilled:
        """What an earlier run of this request gave out beside its table, sampled again: nothing is fitted."""
        schedules, recipe = _by_start(self._request.schedules)[0], self._recipe()
        latents = self.latents_for(schedules[0].sigmas, self._request.latents)
        sigmas = [each.sigmas.to(latents.groups[0].x.device) for each in schedules]
        teacher = plan_teacher(latents, sigmas, recipe.teacher, solvers=recipe.solvers)
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

    def _memory(self) -> str:
        """The most that was taken of the device's; where it has none of its own, what the process has."""
        device, process = self._request.model.load_device, psutil.Process()
        own = device.type == "cuda"
        most = torch.cuda.max_memory_allocated(device) if own else process.memory_info().rss
        return f"{most / 2**30:.1f} GiB"

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
        shares = len(self._guiders) * (1 + len(request.further))
        latents = self.latents_for(schedules[0].sigmas, request.latents)
        unseen = self.latents_for(schedules[0].sigmas, max(UNSEEN, shares), first=request.latents)
        sigmas = [each.sigmas.to(latents.groups[0].x.device) for each in schedules]
        kept = None if self._kept is None else self._kept.part(str(number))
        return _Fit(latents, Pipeline(latents, sigmas, self._recipe(), unseen, kept), schedules)

    def latents_for(self, sigmas: torch.Tensor, count: int, first: int = 0) -> Latents:
        """So many noises, from number ``first`` on, in equal shares; those of the request's own size come last."""
        request = self._request
        sizes = [*request.further, request.latent]
        shapes = [packed(size).shape for size in sizes]
        at_once = request.micro_batch or micro_batch_that_fits(
            request.model, max(shapes, key=math.prod), request.latents
        )
        at_once = min(at_once, request.latents)
        takers = [(size, guider) for size in sizes for guider in self._guiders]
        shares = torch.arange(count).tensor_split(len(takers))
        noises = {id(size): noise_per_latent(size, request.seed, count, first) for size in sizes}
        groups = [
            GuidedModel(guider, noises[id(size)][share], request.seed, size, at_once).group(sigmas)
            for (size, guider), share in zip(takers, shares, strict=True)
        ]
        return Latents(groups, at_once, self._limit)

    def _shown(self, latents: Latents) -> list[int]:
        """Numbers of the held-out latents of the request's own size."""
        others = sum(len(group.x) for group in latents.groups[: -len(self._guiders)])
        return [number for number in latents.held_out if number >= others]

    def check_model(self, latents: Latents, progress: Progress) -> None:
        """Before the teacher: that one state has one answer."""
        model = self._request.model
        middle = float(model.get_model_object("model_sampling").percent_to_sigma(0.5))
        suspects = ", ".join(attached_names(model))
        check_consistency(latents, middle, computing_dtype(model), progress, suspects=suspects)

    def _recipe(self) -> Recipe:
        """With what is known of the model, and what is kept of the request."""
        recipe, scales = self._request.recipe, self._scales
        facts: dict[str, Any] = {"seed": self._request.seed, "host": "ComfyUI"}
        facts["prompts"] = len(self._guiders) // max(1, len(scales))
        facts["latent_shape"] = list(packed(self._request.latent).shape[1:])
        if guidance_scale(self._guiders[0]) is not None:
            facts["cfg"] = scales[0]
        if len(scales) > 1:
            facts["cfg_range"] = [min(scales), max(scales)]
        return replace(
            recipe,
            teacher=replace(recipe.teacher, flow=is_flow(self._request.model)),
            settings=dict(recipe.settings) | facts,
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


def _best_of_first_schedule(rows: Sequence[LambdaRow]) -> LambdaRow:
    """The greedy row, or its refinement where that is nearer to the teacher on the held-out latents."""
    asked = rows[0].sigmas
    return min((row for row in rows if np.array_equal(row.plain.sigmas, asked)), key=LambdaRow.error_from)
