"""D-ODE samplers as ComfyUI runs them: as a SAMPLER, and inside a patched MODEL."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...sampling.denoiser import Denoiser, DenoiserProxy
from ...sampling.sample import dode_denoiser, sample_dode
from ...sampling.solvers import Sampler, resolve
from ...tables.choice import Part, part_for_steps, rows_of
from ...tables.row import LambdaRow, Match
from ...tables.table import LambdaTable
from .guiders import guidance_scale
from .host_samplers import same_function
from .messages import remark
from .model_facts import check_model
from .usage import check_solver_is_here, denoise_remarks, usage_remarks

_KEY = "dode_nodes"
_RUN = "dode_nodes_run"

Choose = Callable[[torch.Tensor], LambdaRow]
"""The row to run over these σ."""
CheckModel = Callable[[ModelPatcher], list[str]]
"""Refuses a model that a row is not for, and remarks on one that it may not be for."""


def row_sampler(
    choose: Choose, check: CheckModel = lambda model: [], node_id: str | None = None
) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that runs a row, chosen when the σ arrive.

    Args:
        choose: gives the row.
        check: looks at the model first.
        node_id: where remarks are shown.
    """

    def sample_row(
        model: comfy.samplers.KSamplerX0Inpaint,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> torch.Tensor:
        guider = model.inner_model
        remarks = check(guider.model_patcher)
        if len(sigmas) < 2:
            return x
        row = choose(sigmas)
        remark(node_id, [*remarks, *usage_remarks(row, guidance_scale(guider), x)])
        if (extra_args or {}).get("denoise_mask") is None:
            return sample_dode(model, x, sigmas, extra_args, callback, disable, row=row)
        # The mask is laid over what the row makes of the network's outputs: what it protects stays.
        run = resolve(row.solver)
        masked = copy.copy(model)
        masked.inner_model = dode_denoiser(guider, sigmas, row, run)
        return run(masked, x, sigmas, extra_args=extra_args, callback=callback, disable=disable,
                   **row.solver_options)  # fmt: skip

    sampler = comfy.samplers.KSAMPLER(sample_row)
    sampler.brings_lambda = True
    return sampler


def part_sampler(
    table: LambdaTable,
    model: ModelPatcher,
    steps: int,
    denoise: float,
    solver: str | None,
    node_id: str | None,
) -> tuple[Part, comfy.samplers.KSAMPLER]:
    """The part of a row that serves these settings, chosen once, and the SAMPLER that runs it.

    Raises:
        DodeError: the table has no such row or is for another kind of model, or the row's sampler is not here.
    """
    remarks = check_model(table.model, model)
    part = part_for_steps(table, steps, denoise, solver)
    check_solver_is_here(part.row, table)
    remarks += denoise_remarks(part, denoise)
    return part, row_sampler(lambda sigmas: part.row, lambda model: remarks, node_id)


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


def apply_to_model(
    model: ModelPatcher, table: LambdaTable, solver: str | None, node_id: str | None
) -> ModelPatcher:
    """A model on which every sampler that matches a row samples as its D-variant.

    A run's state lives in that run's own options: nothing is global, nothing outlasts the run.
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
            remark(node_id, [f"λ is not applied, the stock sampler runs: {match.why}"])
            return executor(guider, sigmas, extra_args, *args, **kwargs)
        noise = args[1] if len(args) > 1 else kwargs["noise"]
        remark(node_id, usage_remarks(match.row, guidance_scale(guider), noise))
        run = _Run(comfy.samplers.KSamplerX0Inpaint(guider, sigmas), sigmas, match.row)
        options = extra_args["model_options"] | {_RUN: run}
        return executor(guider, sigmas, extra_args | {"model_options": options}, *args, **kwargs)

    def around_prediction(
        executor: comfy.patcher_extension.WrapperExecutor,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        model_options = model_options or {}
        run = model_options.get(_RUN)
        if run is None:
            return executor(x, timestep, model_options, seed)
        return run.denoise(lambda x, sigma: executor(x, sigma, model_options, seed), x, timestep)

    patched = model.clone()
    if is_applied(model):
        remark(node_id, ["this model already has a λ table: this table replaces it"])
    for kind, wrapper in (
        (comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, around_sampler),
        (comfy.patcher_extension.WrappersMP.PREDICT_NOISE, around_prediction),
    ):
        patched.remove_wrappers_with_key(kind, _KEY)  # a second Apply replaces the first: λ is applied once
        patched.add_wrapper_with_key(kind, _KEY, wrapper)
    return patched


def is_applied(model: ModelPatcher) -> bool:
    """Whether 'Apply λ to model' was used on this model."""
    return bool(model.get_wrappers(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, _KEY))


class _Run:
    """One run's corrections, and the outputs that they refer to."""

    def __init__(self, model: comfy.samplers.KSamplerX0Inpaint, sigmas: torch.Tensor, row: LambdaRow) -> None:
        self._below = _Below(model)
        self._denoiser = dode_denoiser(self._below, sigmas, row, resolve(row.solver))

    def denoise(self, below: Denoiser, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the sampler is handed in place of what ``below`` predicts."""
        self._below.call = below
        return self._denoiser(x, sigma)


class _Below(DenoiserProxy):
    """The prediction that 'Apply λ to model' stands before: another callable at every evaluation."""

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
