"""Greedy least squares: the student follows the teacher, one network evaluation after the other.

The sampler's next state is affine in the corrections of the evaluation before it.
With x⁰ that state for the fixed part of the corrections, x^p for direction p added, and x* the
teacher's state at the same σ, the coefficients θ minimise ‖x⁰ + Σ_p θ_p (x^p − x⁰) − x*‖² over the
latents. For D-ODE (Kim et al. 2024, Eq. 13 and 14) there is one direction, and θ is λ: the minimum among those that a
table can hold is then the nearest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..sampling.denoiser import Denoiser
from ..sampling.probe import Queries
from ..tables.gate import LARGEST_WEIGHT
from .latents import in_order
from .runs import Recording
from .teacher import Targets

Formulation = Callable[[int], tuple[np.ndarray, list[np.ndarray]]]
"""For evaluation k: the fixed part of row k of c, and the directions to fit, ``[k + 1]`` each."""


def dode(k: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Eq. 10: ô_k = o_k + λ (o_k − o_{k−1}). The first evaluation has no predecessor."""
    unit = np.eye(k + 1)
    return np.zeros(k + 1), [unit[k] - unit[k - 1]] if k else []


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        corrections: the triangle c, ``[E, E]``.
        coefficients: θ of each evaluation, one number per direction.
        standard_errors: of θ, from its scatter over the latents; NaN where one latent was fitted.
        undetermined: evaluations with a direction that does not move the next state; its θ is 0.
    """

    corrections: np.ndarray
    coefficients: list[np.ndarray]
    standard_errors: list[np.ndarray]
    undetermined: list[int]


def fit_greedily(
    recordings: Sequence[Recording],
    denoisers: Sequence[Denoiser],
    queries: Queries,
    targets: Targets,
    formulation: Formulation = dode,
) -> Fit:
    """Fit every evaluation's coefficients in turn, all micro-batches in lockstep.

    Args:
        recordings: the student's runs, one per micro-batch, nothing recorded yet.
        denoisers: to evaluate each micro-batch with.
        queries: what the student asks.
        targets: the teacher's states.
        formulation: what is fitted.
    """
    batches = [recording.batch for recording in recordings]
    fitted = sorted(targets.latents.fitted)
    n = len(queries.sigmas)
    fit = Fit(np.zeros((n, n)), [], [], [])
    for k, sigma_next in enumerate((*queries.sigmas[1:], 0.0)):
        base, directions = formulation(k)
        rows = [base, *(base + direction for direction in directions)]
        sums = [
            _sums(
                recording, denoiser, fit.corrections[: k + 1], rows, targets.of(recording.batch, sigma_next)
            )
            for recording, denoiser in zip(recordings, denoisers, strict=True)
        ]
        columns = list(zip(*sums, strict=True)) or [(), (), ()]  # of a rank that no latent fell to
        gram, right, size = (in_order(batches, parts)[fitted].numpy() for parts in columns)
        rounding = torch.finfo(targets.latents.dtype).eps ** 2 * size.sum()
        theta, errors, determined = _least_squares(gram, right, rounding)
        if len(theta) == 1:
            theta = theta.clip(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        fit.corrections[k, : k + 1] = sum((t * d for t, d in zip(theta, directions, strict=True)), start=base)
        fit.coefficients.append(theta)
        fit.standard_errors.append(errors)
        if not determined:
            fit.undetermined.append(k)
    return fit


def _sums(
    recording: Recording,
    denoiser: Denoiser,
    corrections: np.ndarray,
    rows: Sequence[np.ndarray],
    target: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate once; each latent's part of the normal equations.

    Returns:
        (x^p − x⁰)·(x^q − x⁰), ``[m, P, P]``; (x^p − x⁰)·(x* − x⁰), ``[m, P]``; and ‖x⁰‖², ``[m]``; each as a
        mean over the latent's numbers, so that a large latent weighs no more than a small one.
    """
    k = len(corrections) - 1
    n = corrections.shape[1]
    triangle = np.zeros((n, n))
    triangle[: k + 1] = corrections
    states: list[Tensor] = []
    for row in rows:
        triangle[k, : k + 1] = row
        state = recording.next_state(triangle) if states else recording.evaluate(denoiser, triangle)
        states.append(state.double().flatten(1))
    origin = states[0]
    moved = torch.stack([state - origin for state in states], dim=1)[:, 1:]
    missing = target.double().flatten(1) - origin
    d = origin.shape[1]
    gram = moved @ moved.transpose(1, 2) / d
    return gram, (moved @ missing.unsqueeze(-1)).squeeze(-1) / d, origin.square().mean(1)


def _least_squares(
    gram: np.ndarray, right: np.ndarray, rounding: float
) -> tuple[np.ndarray, np.ndarray, bool]:
    """θ, its standard errors, and whether every direction moves the state by more than rounding.

    Args:
        gram: ``[B, P, P]`` and right: ``[B, P]``, per latent.
        rounding: what the diagonal of the summed gram must exceed.
    """
    theta = np.zeros(right.shape[1])
    errors = np.full_like(theta, np.nan)
    used = np.diagonal(gram.sum(0)) > rounding
    if used.any():
        gram, right = gram[:, used][:, :, used], right[:, used]
        inverse = np.linalg.pinv(gram.sum(0), hermitian=True)
        theta[used] = inverse @ right.sum(0)
        if len(right) > 1:  # each latent is one observation: its residual gradient scatters θ
            gradient = right - gram @ theta[used]
            errors[used] = np.sqrt(np.diagonal(inverse @ (gradient.T @ gradient) @ inverse))
    return theta, errors, bool(used.all())
