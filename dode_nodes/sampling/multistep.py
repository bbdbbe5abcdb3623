"""Every linear solver as weights over the history of outputs, measured by a probe.

Such a solver goes from the state that one evaluation asks about to the next, stages and all, by

    x_{k+1} = x_k + Σ_j≤k S_kj o_j,    o_j = (x_j − D_j)/σ_j.

With one evaluation a step, that is S_kj = (σ_{k+1} − σ_k) W_kj: Eq. 8 of Kim et al. 2024 under Euler in noise
space. euler, DPM-Solver++, iPNDM, DEIS and linear multistep are all of this kind, in noise space and in data space,
with λ and without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import IneligibleSampler
from .denoiser import Denoiser, DenoiserProxy, DodeDenoiser
from .solvers import Sampler

_TOLERANCE = 1e-3
"""How exactly the weights must say what the sampler does; float32 states lose some 1e-5."""


def as_history(
    solver: Sampler,
    sigmas: np.ndarray,
    corrections: np.ndarray,
    prediction: str,
    *,
    options: Mapping[str, Any] | None = None,
    model: Denoiser | None = None,
) -> np.ndarray | None:
    """W, the lower triangle ``[E, E]`` with which Euler in noise space takes this solver's steps.

    A toy network answers evaluation j with the unit vector e_j for noise, on a latent of E + 1 numbers that
    begins as e_E: in every difference of states, the weights can be read.

    Args:
        solver: known to be eligible (``probe_student``).
        sigmas: its schedule, ``[E + 1]``, descending to 0.
        corrections: the triangle c of its D-variant, ``[E, E]``; zeros for the plain solver.
        prediction: what c corrects, ``"noise"`` or ``"data"``.
        options: keyword arguments of the solver.
        model: lends its attributes.

    Returns:
        None where the solver is no such method: several evaluations a step, other σ, or another step.
    """
    if len(sigmas) != len(corrections) + 1:
        return None
    found = _traced(solver, sigmas, corrections, prediction, options or {}, model)
    if found is None or not np.allclose(found.sigmas, sigmas[:-1], rtol=1e-5):
        return None
    weights: np.ndarray = found.increments / np.diff(sigmas)[:, None]
    return weights


@dataclass(frozen=True)
class Trace:
    """What a solver asks over a schedule, and what it makes of the answers.

    Attributes:
        sigmas: of each evaluation, ``[E]``.
        increments: S, the lower triangle of what each output adds to the state that the next evaluation asks about,
            ``[E, E]``; the last row leads to the result.
    """

    sigmas: tuple[float, ...]
    increments: np.ndarray


def trace(
    solver: Sampler, sigmas: np.ndarray, evaluations: int, options: Mapping[str, Any] | None = None
) -> Trace:
    """How a solver gets from evaluation to evaluation, stages and all.

    Args:
        solver: deterministic and linear in the outputs (``probe_student``).
        sigmas: its schedule, descending.
        evaluations: that it makes over it, E.
        options: keyword arguments of the solver.

    Raises:
        IneligibleSampler: it makes another number of evaluations here, or is not linear in the outputs.
    """
    found = _traced(solver, sigmas, np.zeros((evaluations, evaluations)), "noise", options or {}, None)
    if found is None:
        raise IneligibleSampler(
            f"the sampler cannot be run one evaluation at a time: over these {len(sigmas) - 1} steps it does not make "
            f"{evaluations} evaluations, or is not linear in the network's outputs"
        )
    return found


def _traced(
    solver: Sampler,
    sigmas: np.ndarray,
    corrections: np.ndarray,
    prediction: str,
    options: Mapping[str, Any],
    model: Denoiser | None,
) -> Trace | None:
    """None where the sampler fails, makes another number of evaluations, or is no such method."""
    for dtype in (torch.float64, torch.float32):  # some samplers of the hosts serve only the latter
        found = _trace(solver, torch.tensor(sigmas, dtype=dtype), corrections, prediction, options, model)
        if found is not None:
            return found
    return None


def _trace(
    solver: Sampler,
    schedule: Tensor,
    corrections: np.ndarray,
    prediction: str,
    options: Mapping[str, Any],
    model: Denoiser | None,
) -> Trace | None:
    evaluations = len(corrections)
    toy = _UnitNoises(model, evaluations)
    x = torch.zeros(1, 1, evaluations + 1, 1, dtype=schedule.dtype)
    x[..., -1, :] = 1
    try:
        denoiser = DodeDenoiser(toy, corrections, prediction)
        end = solver(denoiser, x, schedule.clone(), extra_args={"model_options": {}}, disable=True, **options)
    except Exception:  # a latent that is no picture, or this precision: no probe, no family
        return None
    if len(toy.states) != evaluations:
        return None
    states = torch.stack([*toy.states, end.reshape(-1)]).double().numpy()
    added: np.ndarray = np.diff(states, axis=0)
    if not np.isfinite(added).all() or np.abs(added[:, -1]).max() > _TOLERANCE:
        return None
    return Trace(tuple(toy.sigmas), np.tril(added[:, :-1]))


class _UnitNoises(DenoiserProxy):
    """Answers evaluation j with D = x − σ e_j."""

    def __init__(self, model: Denoiser | None, evaluations: int) -> None:
        super().__init__(model)
        self._units = torch.eye(evaluations + 1, dtype=torch.float64)
        self.states: list[Tensor] = []
        self.sigmas: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        unit = self._units[min(len(self.states), len(self._units) - 1)].reshape(x.shape)
        self.states.append(x.reshape(-1).clone())
        self.sigmas.append(float(sigma[0]))
        return x - sigma.reshape(-1, 1, 1, 1) * unit.to(x)
