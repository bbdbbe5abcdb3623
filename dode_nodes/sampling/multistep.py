"""Every single-stage linear multistep solver as weights over the history of outputs, measured by a probe.

Such a solver's step, over the whole schedule, is

    x_{k+1} = x_k + (σ_{k+1} − σ_k) Σ_j≤k W_kj o_j,    o_j = (x_j − D_j)/σ_j,

which is Eq. 8 of Kim et al. 2024 under Euler in noise space. euler, DPM-Solver++, iPNDM, DEIS and linear
multistep are all of this kind, in noise space and in data space, with λ and without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    for dtype in (torch.float64, torch.float32):  # some samplers of the hosts serve only the latter
        rates = _rates(
            solver, torch.tensor(sigmas, dtype=dtype), corrections, prediction, options or {}, model
        )
        if rates is not None:
            break
    else:
        return None
    weights, drift = np.tril(rates[:, :-1]), rates[:, -1] * np.abs(np.diff(sigmas))
    exact = np.isfinite(rates).all() and np.abs(drift).max() < _TOLERANCE
    return weights if exact else None


def _rates(
    solver: Sampler,
    schedule: Tensor,
    corrections: np.ndarray,
    prediction: str,
    options: Mapping[str, Any],
    model: Denoiser | None,
) -> np.ndarray | None:
    """What each step adds per unit of σ, in terms of the outputs and the first state, ``[E, E + 1]``.

    None where the sampler fails, or asks at other σ.
    """
    evaluations = len(corrections)
    toy = _UnitNoises(model, evaluations)
    x = torch.zeros(1, 1, evaluations + 1, 1, dtype=schedule.dtype)
    x[..., -1, :] = 1
    try:
        denoiser = DodeDenoiser(toy, corrections, prediction)
        end = solver(denoiser, x, schedule.clone(), extra_args={"model_options": {}}, disable=True, **options)
    except Exception:  # a latent that is no picture, or this precision: no probe, no family
        return None
    if len(toy.states) != evaluations or not np.allclose(toy.sigmas, schedule[:-1], rtol=1e-5):
        return None
    states = torch.stack([*toy.states, end.reshape(-1)]).double().numpy()
    rates: np.ndarray = np.diff(states, axis=0) / np.diff(schedule.double().numpy())[:, None]
    return rates


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
