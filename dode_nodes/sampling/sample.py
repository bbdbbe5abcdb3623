"""Sampling with λ: a k-diffusion sampler like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DodeError, NotFinite
from ..sigmas import check_sigmas, is_flow, same_sigma
from ..tables.row import LambdaRow
from .denoiser import Denoiser, DodeDenoiser, Held, row_corrections
from .probe import asked_sigmas, probe_student, solver_name
from .solvers import Sampler, identity, resolve


def sample_dode(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor | np.ndarray,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    row: LambdaRow | None = None,
    solver: str | Sampler | None = None,
) -> Tensor:
    """Run a solver with the weights of a row: its D-variant, at the cost of the solver itself.

    Args:
        model: the denoiser, ``model(x, sigma[B], **extra_args) -> denoised``.
        x: the state at sigmas[0], ``[B, C, *spatial]``.
        sigmas: the row's schedule (``row.sigmas`` will do), or a part of it (img2img): weights are
            found by σ. A part's first evaluation has no predecessor and is not corrected. With one σ or
            none, x is returned.
        callback: called once a step by the solver, with x, i, sigma, sigma_hat and denoised.
        row: the weights; without one, the plain solver runs.
        solver: needed where the row was distilled on a callable (or there is no row; then euler).

    Returns:
        The state at sigmas[-1].

    Raises:
        DodeError: the row does not serve these sigmas or this solver.
        NotFinite: with this row the run ends in NaN or infinite values.
    """
    if len(sigmas) < 2:
        return x
    if isinstance(sigmas, np.ndarray):
        dtype = torch.promote_types(x.dtype, torch.float32)
        sigmas = torch.tensor(sigmas, dtype=dtype, device=x.device)  # a copy: samplers may write into it
    check_sigmas(sigmas)
    options: dict[str, Any] = {}
    denoiser = model
    if row is None:
        run = resolve(solver or "euler")
    else:
        run, options = solver_of(row, solver), dict(row.solver_options)
        denoiser = dode_denoiser(model, sigmas, row, run)
    end = run(denoiser, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)
    return end if row is None else check_finite(end, row)


def dode_denoiser(
    model: Denoiser, sigmas: Tensor, row: LambdaRow, run: Sampler, held: Held | None = None
) -> DodeDenoiser:
    """The model with the row's weights, for one run of the row's solver ``run`` over these sigmas.

    ``held`` tells what a mask holds.

    Raises:
        DodeError: the row does not serve these sigmas.
    """
    match = row.find(sigmas)
    if match.row is None:
        raise DodeError(f"this row does not fit these sigmas: {match.why}")
    check_solver(row, run, model)
    _check_end(row, match.step, sigmas, run, model)
    return corrected(model, row, match.step, held)


def corrected(model: Denoiser, row: LambdaRow, step: int = 0, held: Held | None = None) -> DodeDenoiser:
    """The model with the row's weights, for one run of the row's solver from this step of its schedule."""
    first, flow = row.first_evaluation(step), is_flow(row.sigmas)
    return DodeDenoiser(
        model, row_corrections(row), row.prediction, first=first, free=row.free, flow=flow, held=held
    )


def solver_of(row: LambdaRow, solver: str | Sampler | None) -> Sampler:
    """The sampler of a row; ``solver`` is needed where it is the caller's own, and must be its.

    Raises:
        DodeError: it is missing, or another one.
    """
    if solver is None and row.is_callable:
        raise DodeError(
            f"give your own sampler function as solver=: this row was distilled with {row.solver}"
        )
    if solver is not None and solver_name(solver) != row.solver:
        raise DodeError(f"this row is for the solver '{row.solver}', not '{solver_name(solver)}'")
    return resolve(row.solver if solver is None else solver)


def solver_beside(row: LambdaRow, own: Sampler, name: str) -> Sampler:
    """The sampler of a name, where a row's own is at hand: it may be a function of the caller's, which no name leads to.

    Raises:
        DodeError: it is another one, and nobody has it.
    """
    return own if name == row.solver else resolve(name)


def check_finite(x: Tensor, row: LambdaRow, table: str = "") -> Tensor:
    """A run's last state, if it is one.

    Args:
        table: what people know the row's table by.

    Raises:
        NotFinite: it holds NaN or infinite values; names the table and the row.
    """
    if not bool(torch.isfinite(x).all()):
        whose = f"the λ table '{table}' with " if table else ""
        raise NotFinite(
            f"the latent came out as NaN or infinite values, from {whose}{row.label}. If the stock sampler gives a "
            "picture with this model, do not use this table"
        )
    return x


_passed: set[tuple[str, object]] = set()
_MOST_PASSED = 1000


def check_solver(row: LambdaRow, run: Sampler, model: Denoiser | None = None) -> None:
    """Probe a row once: a file may name any sampler with any numbers, and samplers change with their packs.

    Raises:
        IneligibleSampler: the sampler cannot have been distilled like this.
        DodeError: it asks the network more or less often than there are weights for.
    """
    key = (row.sha256, identity(run))
    if key in _passed:
        return
    sigmas = torch.tensor(row.sigmas, dtype=torch.float32)
    asked = len(probe_student(run, sigmas, model=model, options=row.solver_options).sigmas)
    if asked != sum(row.evaluations):
        raise DodeError(
            f"the sampler '{row.solver}' asks the network {asked} times over this schedule, but {row.label} has weights "
            f"for {sum(row.evaluations)}: it is not the sampler that the row was made with"
        )
    if len(_passed) >= _MOST_PASSED:
        _passed.clear()
    _passed.add(key)


def _check_end(row: LambdaRow, step: int, sigmas: Tensor, run: Sampler, model: Denoiser) -> None:
    """Refuse a part that ends where this solver takes other steps than in the whole.

    Some look ahead: heunpp2 and DPM-Solver-3 step over several σ where there are enough left.
    """
    if sigmas[-1] == 0:
        return  # from its step on, the probe found the solver to take the steps of the whole
    options = dict(row.solver_options)
    whole = torch.tensor(row.sigmas, dtype=sigmas.dtype)
    expected = asked_sigmas(run, whole, model=model, options=options)[row.first_evaluation(step) :]
    asked = asked_sigmas(run, sigmas, model=model, options=options)
    count = sum(row.evaluations[step : step + len(sigmas) - 1])
    if len(asked) != count or not all(map(same_sigma, asked, expected)):
        raise DodeError(
            f"{row.solver} cannot stop at σ = {float(sigmas[-1]):.6g} with the weights of {row.label}: "
            "it would take different steps than over the whole schedule"
        )
