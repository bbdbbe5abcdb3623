"""D-ODE samplers as ComfyUI runs them: as a SAMPLER, and inside a patched MODEL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...sampling.denoiser import Denoiser, DenoiserProxy, Held
from ...sampling.sample import check_finite, dode_denoiser
from ...sampling.solvers import Sampler, resolve
from ...sigmas import check_sigmas
from ...tables.choice import Part, rows_of
from ...tables.remarks import usage_remarks
from ...tables.row import LambdaRow, Match
from ...tables.table import LambdaTable
from .guiders import Guider, guidance_scale
from .host_samplers import inpaint_options, same_function
from .messages import remark
from .model_facts import check_model, pixels_per_side
from .own_lora import own_lora_remarks
from .usage import check_solver_is_here

_KEY = "dode_nodes"

Choose = Callable[[torch.Tensor], LambdaRow]
"""The row to run over these σ."""
CheckModel = Callable[[ModelPatcher], list[str]]
"""Refuses a model that a row is not for, and remarks on one that it may not be for."""


def row_sampler(
    choose: Choose, check: CheckModel = lambda model: [], node_id: str | None = None, called: str = ""
) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that runs a row, chosen when the σ arrive.

    Args:
        choose: gives the row.
        check: looks at the model first.
        node_id: where remarks are shown.
        called: what people know the row's table by.
    """

    def sample_row(
        model: comfy.samplers.KSamplerX0Inpaint,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None = None,
        **handed: Any,
    ) -> torch.Tensor:
        guider = model.inner_model
        remarks = check(guider.model_patcher)
        if len(sigmas) < 2:
            return x
        check_sigmas(sigmas)
        row = choose(sigmas)
        remark(node_id, [*remarks, *_remarks_on(row, guider, x)])
        solver = resolve(row.solver)
        settings = {"extra_args": extra_args} | handed | dict(row.solver_options)
        held = _held_by((extra_args or {}).get("denoise_mask"), guider, sigmas, extra_args or {})
        if held is None:
            return solver(dode_denoiser(model, sigmas, row, solver), x, sigmas, **settings)
        # The mask is laid over what the row makes of the network's outputs: what it protects stays.
        with _corrected(guider, _Run(model, sigmas, row, held)):
            return solver(model, x, sigmas, **settings)

    return _RowSampler(sample_row, choose, called)


class _RowSampler(comfy.samplers.KSAMPLER):
    """What a mask protects is made noisy as the row's own solver has it: some draw noise of their own for it."""

    brings_lambda = True

    def __init__(self, sample_row: Sampler, choose: Choose, called: str) -> None:
        super().__init__(sample_row, {})
        self._choose = choose
        self._called = called

    def sample(
        self,
        model_wrap: Guider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        row = self._choose(sigmas) if len(sigmas) > 1 else None  # now: uni_pc writes into the σ
        options = inpaint_options(row.solver) if row is not None and denoise_mask is not None else {}
        stock = comfy.samplers.KSAMPLER(self.sampler_function, self.extra_options, options)
        samples: torch.Tensor = stock.sample(
            model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
        )
        return samples if row is None else check_finite(samples, row, self._called)


def part_sampler(
    table: LambdaTable, part: Part, model: ModelPatcher, node_id: str | None, notes: Sequence[str] = ()
) -> comfy.samplers.KSAMPLER:
    """The SAMPLER that runs a part of a row.

    Args:
        notes: what is to be said with the remarks.

    Raises:
        DodeError: the table is for another kind of model, or the row's sampler is not here.
    """
    remarks = [*notes, *check_model(table.model, model)]
    check_solver_is_here(part.row, table)
    return row_sampler(lambda sigmas: part.row, lambda model: remarks, node_id, table.called)


def row_for_sigmas(table: LambdaTable, sigmas: torch.Tensor, solver: str | None) -> LambdaRow:
    """The table's row for these σ.

    Raises:
        DodeError: there is none, or its sampler is not here; says why, what the table has, and what to do.
    """
    match = table.match(sigmas, solver)
    if match.row is None:
        raise DodeError(f"{match.why}. Connect the sigmas of 'D-ODE sigmas', or distil λ for this schedule")
    check_solver_is_here(match.row, table)
    return match.row


def _remarks_on(row: LambdaRow, guider: Guider, latent: torch.Tensor) -> list[str]:
    """On its LoRA, and on what differs from what it was made with."""
    model = guider.model_patcher
    usage = usage_remarks(row, guidance_scale(guider), latent, pixels_per_side(model))
    return [*own_lora_remarks(row, model), *usage]


def apply_to_model(
    model: ModelPatcher,
    table: LambdaTable,
    solver: str | None,
    node_id: str | None,
    notes: Sequence[str] = (),
) -> ModelPatcher:
    """A model on which every sampler that matches a row samples as its D-variant.

    A run's state lives in that run's own options: nothing is global, nothing outlasts the run.

    Args:
        notes: what is said again with the remarks on each run: of a later prompt, only the runs may be new.
    """

    def around_sampler(
        executor: comfy.patcher_extension.WrapperExecutor,
        guider: comfy.samplers.CFGGuider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if getattr(executor.class_obj, "brings_lambda", False):
            remark(
                node_id, ["this D-ODE node uses its own λ table: the one from 'Apply λ to model' is ignored"]
            )
            return executor(guider, sigmas, extra_args, *args, **kwargs)
        match = _match_run(executor.class_obj, sigmas, table, solver)
        if match.row is None:
            remark(node_id, [*notes, f"λ is not applied, the stock sampler runs: {match.why}"])
            return executor(guider, sigmas, extra_args, *args, **kwargs)
        handed = dict(zip(("callback", "noise", "latent_image", "denoise_mask"), args, strict=False)) | kwargs
        remark(node_id, [*notes, *_remarks_on(match.row, guider, handed["noise"])])
        held = _held_by(handed.get("denoise_mask"), guider, sigmas, extra_args)
        run = _Run(comfy.samplers.KSamplerX0Inpaint(guider, sigmas), sigmas, match.row, held)
        with _corrected(guider, run):
            samples = executor(guider, sigmas, extra_args, *args, **kwargs)
        return check_finite(samples, match.row, table.called)

    patched = model.clone()
    if is_applied(model):
        remark(node_id, ["this model already has a λ table: this table replaces it"])
    kind = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE
    patched.remove_wrappers_with_key(kind, _KEY)  # a second Apply replaces the first: λ is applied once
    patched.add_wrapper_with_key(kind, _KEY, around_sampler)
    return patched


def is_applied(model: ModelPatcher) -> bool:
    """Whether 'Apply λ to model' was used on this model."""
    return bool(model.get_wrappers(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, _KEY))


def _held_by(
    mask: torch.Tensor | None, guider: Guider, sigmas: torch.Tensor, extra_args: dict[str, Any]
) -> Held | None:
    """What a run's mask holds, as ``KSamplerX0Inpaint`` lays it on at each evaluation; None without one."""
    if mask is None:
        return None
    at_sigma = extra_args.get("model_options", {}).get("denoise_mask_function")  # differential diffusion's
    options = {"model": guider, "sigmas": sigmas}

    def held(sigma: torch.Tensor) -> torch.Tensor:
        laid_on: torch.Tensor = mask if at_sigma is None else at_sigma(sigma, mask, extra_options=options)
        return laid_on < 1

    return held


@contextmanager
def _corrected(guider: Guider, run: _Run) -> Iterator[None]:
    """Let a guider predict as a run has it: before all that others have put around its predictions.

    A cache among them may not ask what is below it; the run must count every evaluation.

    Raises:
        DodeError: the guider has not predicted as guiders do, and λ has had no effect.
    """
    wrappers = guider.model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    kind = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
    others = wrappers.get(kind, {})
    wrappers[kind] = {_KEY: [run.around_prediction], **others}
    try:
        yield
    finally:
        wrappers[kind] = others
    if not run.asked:
        raise DodeError(
            "use another guider: this one predicts in a way of its own, so λ cannot be applied to it here"
        )


class _Run:
    """One run's corrections, and the outputs that they refer to.

    Attributes:
        asked: whether anything has been predicted.
    """

    def __init__(
        self,
        model: comfy.samplers.KSamplerX0Inpaint,
        sigmas: torch.Tensor,
        row: LambdaRow,
        held: Held | None,
    ) -> None:
        self._below = _Below(model)
        self._denoiser = dode_denoiser(self._below, sigmas, row, resolve(row.solver), held)
        self.asked = False

    def around_prediction(
        self,
        executor: comfy.patcher_extension.WrapperExecutor,
        x: torch.Tensor,
        timestep: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What the sampler is handed in place of what ``executor`` predicts."""
        self.asked = True
        self._below.call = lambda x, sigma: executor(x, sigma, *args, **kwargs)
        return self._denoiser(x, timestep)


class _Below(DenoiserProxy):
    """The prediction that a run stands before: another callable at every evaluation."""

    call: Denoiser

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.call(x, sigma)


def _is_solver_of(row: LambdaRow, function: Sampler, options: dict[str, Any]) -> bool:
    if dict(row.solver_options) != options:
        return False
    try:
        return same_function(resolve(row.solver), function)
    except DodeError:  # a solver that this ComfyUI does not have, or a callable's name
        return False


def _match_run(
    sampler: comfy.samplers.Sampler, sigmas: torch.Tensor, table: LambdaTable, solver: str | None
) -> Match:
    """The row whose solver, options and σ are those of the run that begins."""
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return Match(None, 0, "this sampler is not a plain ComfyUI sampler function")
    candidates = rows_of(table, solver)
    rows = [row for row in candidates if _is_solver_of(row, function, sampler.extra_options)]
    if rows:
        match = LambdaTable(rows).match(sigmas)
    else:
        name = getattr(function, "__name__", "this sampler").removeprefix("sample_")
        why = f"the table has no row for {name} with these options. It has: {table.contents()}"
        match = Match(None, 0, why)
    if match.row is not None:
        return match
    elsewhere = (row.plain for row in candidates if row.has_own_sigmas)
    if any(_is_solver_of(plain, function, sampler.extra_options) for plain in elsewhere):
        why = f"{match.why}. Refined rows have their own σ: use KSampler (D-ODE) or D-ODE sigmas"
        return Match(None, 0, why)
    return match
