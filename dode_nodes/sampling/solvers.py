"""Deterministic samplers in k-diffusion's calling convention, found by name.

Each integrates dx/dσ = (x − D(x; σ)) / σ (Karras et al. 2022, arXiv:2206.00364, Eq. 1 and 3) from
sigmas[0] to sigmas[-1], D being the model's denoised:

    sample_X(model, x, sigmas, extra_args=None, callback=None, disable=None, **options) -> Tensor

model       model(x, sigma, **extra_args) returns denoised, of x's shape; sigma is (batch,), in x's dtype
x           (batch, ...), of any rank and floating-point dtype, at noise level sigmas[0]
sigmas      (steps + 1,), descending, the last may be 0: a step into 0 is of first order and returns
            denoised (to rounding); with fewer than two σ there is no step and x comes back as it is
callback    called once a step, after the step's first evaluation, with a dict of the current x, the step's
            index i, sigma, sigma_hat (equal to sigma: no noise is added) and denoised
disable     True hides the progress bar, None does where there is no terminal, as tqdm has it

The result has x's shape and dtype. euler, heun, dpm_2, dpmpp_2m and ipndm equal ComfyUI 0.3.64's bit for
bit where x and sigmas have the same dtype, dpmpp_3m its sample_dpmpp_3m_sde at eta=0 to rounding, and deis
its sample_deis to the error of that function's quadrature: 8e-4 of a step in its weights, on Karras sigmas
6e-5 in the result.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm, trange

from ..errors import DodeError
from ..tables.gate import is_name

Sampler = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], None]
Denoise = Callable[..., Tensor]


# --- What every sampler shares ------------------------------------------------------------------------


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx/dσ at (x, σ), for a scalar σ: the noise ε for EPS and v models, the velocity for flow models."""
    return (x - denoised) / sigma


def _denoiser(
    model: Callable[..., Tensor], x: Tensor, extra_args: dict[str, Any] | None, callback: Callback | None
) -> Denoise:
    """The model as papers write it, D(x; σ) for a scalar σ; naming the step reports it to the callback."""
    extra_args = {} if extra_args is None else extra_args
    s_in = x.new_ones([x.shape[0]])

    def denoise(x: Tensor, sigma: Tensor, step: int | None = None) -> Tensor:
        denoised = model(x, sigma * s_in, **extra_args)
        if step is not None and callback is not None:
            callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return denoised

    return denoise


def _steps(sigmas: Tensor, disable: bool | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(i, σ_i, σ_{i+1}) of every step, behind a progress bar."""
    for i in trange(len(sigmas) - 1, disable=disable):
        yield i, sigmas[i], sigmas[i + 1]


# --- Single-step methods ------------------------------------------------------------------------------


@torch.no_grad()
def sample_euler(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Euler's method, which is DDIM (Song et al. 2021, arXiv:2010.02502, Eq. 13). Order 1."""
    denoise = _denoiser(model, x, extra_args, callback)
    for i, sigma, sigma_next in _steps(sigmas, disable):
        d = to_d(x, sigma, denoise(x, sigma, step=i))
        x = x + d * (sigma_next - sigma)
    return x


@torch.no_grad()
def sample_heun(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """EDM's Heun method, two evaluations a step (Karras et al. 2022, Algorithm 1). Order 2."""
    denoise = _denoiser(model, x, extra_args, callback)
    for i, sigma, sigma_next in _steps(sigmas, disable):
        d = to_d(x, sigma, denoise(x, sigma, step=i))
        dt = sigma_next - sigma
        if sigma_next > 0:
            x_next = x + d * dt
            d_next = to_d(x_next, sigma_next, denoise(x_next, sigma_next))
            d = (d + d_next) / 2
        x = x + d * dt
    return x


@torch.no_grad()
def sample_dpm_2(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver-2, two evaluations a step (Lu et al. 2022a, arXiv:2206.00927, Algorithm 1). Order 2."""
    denoise = _denoiser(model, x, extra_args, callback)
    for i, sigma, sigma_next in _steps(sigmas, disable):
        d = to_d(x, sigma, denoise(x, sigma, step=i))
        step = _dpm_step_2 if sigma_next > 0 else _dpm_step_1
        x = step(denoise, x, d, sigma, sigma_next)
    return x


@torch.no_grad()
def sample_dpm_solver_3(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver-3, one evaluation per interval of `sigmas` (Lu et al. 2022a, Algorithm 2). Order 3.

    A step of order p spans p intervals: it evaluates at its first σ and at inner stages of its own (halfway,
    or at one and two thirds in log σ), not at the σ within. Orders as in the paper: 3 throughout, closed by
    2, 1 where the number of intervals is divisible by 3, else by 1 or 2; but by 1, 1 for 2 where sigmas ends
    at 0, for 0 has no log. A closing step of order 1 leaves an error of order 2. The callback is called once
    a step, so its i, the index of the step's first σ, goes up by the step's order.
    """
    denoise = _denoiser(model, x, extra_args, callback)
    i = 0
    for order in tqdm(_dpm_orders(sigmas), disable=disable):
        sigma, sigma_next = sigmas[i], sigmas[i + order]
        d = to_d(x, sigma, denoise(x, sigma, step=i))
        x = _DPM_STEPS[order](denoise, x, d, sigma, sigma_next)
        i += order
    return x


def _dpm_orders(sigmas: Tensor) -> list[int]:
    """The order of each DPM-Solver-3 step; they sum to the number of intervals."""
    intervals = len(sigmas) - 1
    if intervals < 1:
        return []
    threes, rest = divmod(intervals, 3)
    if rest == 0:
        return [3] * (threes - 1) + [2, 1]
    if rest == 2 and sigmas[-1] == 0:
        return [3] * threes + [1, 1]
    return [3] * threes + [rest]


# The paper's −σ_next·(e^h − 1), h = log(σ / σ_next), is plainly σ_next − σ: DPM-Solver's first-order terms
# are Euler's, and need no log.


def _dpm_step_1(denoise: Denoise, x: Tensor, d: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    return x + d * (sigma_next - sigma)


def _dpm_step_2(denoise: Denoise, x: Tensor, d: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    sigma_mid = _log_lerp(sigma, sigma_next, 1 / 2)
    x_mid = x + d * (sigma_mid - sigma)
    d_mid = to_d(x_mid, sigma_mid, denoise(x_mid, sigma_mid))
    return x + d_mid * (sigma_next - sigma)


def _dpm_step_3(denoise: Denoise, x: Tensor, d: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    r1, r2 = 1 / 3, 2 / 3
    sigma_1, sigma_2 = _log_lerp(sigma, sigma_next, r1), _log_lerp(sigma, sigma_next, r2)

    x_1 = x + d * (sigma_1 - sigma)
    slope = (to_d(x_1, sigma_1, denoise(x_1, sigma_1)) - d) / r1

    x_2 = x + d * (sigma_2 - sigma) + slope * r2 * _slope_weight(sigma, sigma_2)
    slope = (to_d(x_2, sigma_2, denoise(x_2, sigma_2)) - d) / r2

    return x + d * (sigma_next - sigma) + slope * _slope_weight(sigma, sigma_next)


_DPM_STEPS = {1: _dpm_step_1, 2: _dpm_step_2, 3: _dpm_step_3}


def _log_lerp(sigma: Tensor, sigma_next: Tensor, weight: float) -> Tensor:
    return sigma.log().lerp(sigma_next.log(), weight).exp()


def _slope_weight(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """∫ from σ to σ_next of s dσ, where s runs from 0 to 1 in log σ: −σ_next·((e^h − 1) / h − 1)."""
    h = (sigma / sigma_next).log()
    return -sigma_next * (h.expm1() / h - 1)


# --- Multistep methods, over D (DPM-Solver++) ---------------------------------------------------------


@torch.no_grad()
def sample_dpmpp_2m(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, arXiv:2211.01095, Algorithm 2). Order 2."""
    denoise = _denoiser(model, x, extra_args, callback)
    old_denoised: Tensor | None = None
    h_last = sigmas.new_zeros(())
    for i, sigma, sigma_next in _steps(sigmas, disable):
        denoised = denoise(x, sigma, step=i)
        log_sigma, log_sigma_next = sigma.log(), sigma_next.log()
        h = log_sigma - log_sigma_next
        extrapolated = denoised
        if old_denoised is not None and sigma_next > 0:
            r = h_last / h
            extrapolated = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old_denoised
        # exp(log σ) differs from σ by rounding: the hosts have it so, and their bits are what we promise.
        x = (log_sigma_next.exp() / log_sigma.exp()) * x - (-h).expm1() * extrapolated
        old_denoised, h_last = denoised, h
    return x


@torch.no_grad()
def sample_dpmpp_3m(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(3M), k-diffusion's sample_dpmpp_3m_sde without its noise (Lu et al. 2022b).

    Like the authors' code it counts D'' by half, so that it is of order 2, not 3. −log σ is the variable for
    flow models too, where ComfyUI's takes log((1 − σ) / σ).
    """
    denoise = _denoiser(model, x, extra_args, callback)
    outputs: list[Tensor] = []  # D at this σ and at the two before, newest first
    hs: list[Tensor] = []  # the steps that lead on from them, in −log σ
    for i, sigma, sigma_next in _steps(sigmas, disable):
        denoised = denoise(x, sigma, step=i)
        if sigma_next == 0:
            x = denoised
            continue
        h = sigma.log() - sigma_next.log()
        outputs, hs = [denoised, *outputs[:2]], [h, *hs[:2]]

        phi_1 = -(-h).expm1()
        phi_2 = 1 - phi_1 / h
        phi_3 = phi_2 / h - 1 / 2
        x = (sigma_next / sigma) * x + phi_1 * denoised
        if len(outputs) > 1:  # Newton's divided differences of D
            slope = (outputs[0] - outputs[1]) / hs[1]
            if len(outputs) > 2:
                half_curvature = (slope - (outputs[1] - outputs[2]) / hs[2]) / (hs[1] + hs[2])
                slope = slope + half_curvature * hs[1]
                x = x - phi_3 * h**2 * half_curvature  # Taylor's term is twice this
            x = x + phi_2 * h * slope
    return x


# --- Multistep methods, over dx/dσ (Adams–Bashforth) --------------------------------------------------

ADAMS_BASHFORTH = (
    ((1,), 1),
    ((3, -1), 2),
    ((23, -16, 5), 12),
    ((55, -59, 37, -9), 24),
)
"""By order: weights of the newest and the earlier derivatives, and their divisor, for equal steps."""


@torch.no_grad()
def sample_ipndm(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 4,
) -> Tensor:
    """iPNDM: Adams–Bashforth with the weights of equal steps, whatever the steps (Zhang & Chen 2023,
    arXiv:2204.13902, after Liu et al. 2022, arXiv:2202.09778). Starts at order 1, ends at max_order, 1 to 4.
    """
    _check_max_order(max_order)
    denoise = _denoiser(model, x, extra_args, callback)
    ds: list[Tensor] = []  # newest first
    for i, sigma, sigma_next in _steps(sigmas, disable):
        denoised = denoise(x, sigma, step=i)
        if sigma_next == 0:
            x = denoised
            continue
        ds = [to_d(x, sigma, denoised), *ds[: max_order - 1]]
        weights, divisor = ADAMS_BASHFORTH[len(ds) - 1]
        x = x + (sigma_next - sigma) * _weighted_sum(weights, ds) / divisor
    return x


@torch.no_grad()
def sample_deis(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 3,
) -> Tensor:
    """tAB-DEIS: Adams–Bashforth for unequal steps, polynomial in the time t of a VP process (Zhang & Chen
    2023, arXiv:2204.13902). Starts at order 1, ends at max_order, 1 to 4.
    """
    _check_max_order(max_order)
    denoise = _denoiser(model, x, extra_args, callback)
    weights = _deis_weights(sigmas, max_order)
    ds: list[Tensor] = []  # newest first
    for i, sigma, _ in _steps(sigmas, disable):
        d = to_d(x, sigma, denoise(x, sigma, step=i))
        ds = [d, *ds[: max_order - 1]]
        x = x + _weighted_sum(weights[i], ds)
    return x


def _check_max_order(max_order: int) -> None:
    if max_order not in (1, 2, 3, 4):
        raise DodeError(f"max_order must be 1, 2, 3 or 4, not {max_order!r}")


def _weighted_sum(weights: Sequence[float], ds: list[Tensor]) -> Tensor:
    """Σ weight·d over as many of `ds`, newest first, as there are weights."""
    total: Tensor = sum(weight * d for weight, d in zip(weights, ds, strict=False))  # type: ignore[assignment]
    return total


def _deis_weights(sigmas: Tensor, max_order: int) -> list[list[float]]:
    """For every step the weights of its derivatives, newest first: w_j = ∫ L_j(t(σ)) dσ over the step.

    L_j is the Lagrange polynomial in t that is 1 at the j-th σ back and 0 at the others. Gauss–Legendre takes
    the integral to 1e-8, even for a step from σ = 80 to 0.002.
    """
    sigma = sigmas.detach().double().cpu().numpy()
    t = _vp_time(sigma)
    nodes, node_weights = np.polynomial.legendre.leggauss(64)  # on −1 … 1

    weights = []
    for i in range(len(sigma) - 1):
        half = (sigma[i + 1] - sigma[i]) / 2
        # A step into 0 is of first order, for it is to return the denoised.
        order = min(i + 1, max_order) if sigma[i + 1] > 0 else 1
        t_nodes = _vp_time(sigma[i] + half * (nodes + 1))
        t_known = t[i - np.arange(order)]
        weights.append([half * float(node_weights @ _lagrange(t_known, j, t_nodes)) for j in range(order)])
    return weights


def _lagrange(t_known: np.ndarray, j: int, t: np.ndarray) -> np.ndarray:
    """The polynomial that is 1 at t_known[j] and 0 at the others, at `t`."""
    others = np.delete(t_known, j)
    values: np.ndarray = np.prod((t[:, None] - others) / (t_known[j] - others), axis=1)
    return values


def _vp_time(sigma: np.ndarray) -> np.ndarray:
    """t of the VP process σ² = exp(β_d t²/2 + β_min t) − 1 with the hosts' σ(1) = 80 and σ(0.001) = 0.002."""
    log_end, log_start = np.log1p(80.0**2), np.log1p(0.002**2)
    beta_d = 2 * (log_end - log_start / 1e-3) / (1 - 1e-3)
    beta_min = log_end - beta_d / 2
    t: np.ndarray = (np.sqrt(beta_min**2 + 2 * beta_d * np.log1p(sigma**2)) - beta_min) / beta_d
    return t


# --- Names ------------------------------------------------------------------------------------------------

SOLVERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "euler": sample_euler,
        "heun": sample_heun,
        "dpm_2": sample_dpm_2,
        "dpm_solver_3": sample_dpm_solver_3,
        "dpmpp_2m": sample_dpmpp_2m,
        "dpmpp_3m": sample_dpmpp_3m,
        "ipndm": sample_ipndm,
        "deis": sample_deis,
    }
)

_host_lookup: Callable[[str], Sampler | None] | None = None
_host_names: Callable[[], Sequence[str]] = tuple


def use_host(
    lookup: Callable[[str], Sampler | None] | None, names: Callable[[], Sequence[str]] = tuple
) -> None:
    """Let a host resolve names first: lookup(name) returns its sampler, or None where it has none.

    It is asked at every `resolve`, so it finds what other packs have replaced since. None removes it.

    Args:
        lookup: the host's.
        names: lists what it has, for the error where a name is not known.
    """
    global _host_lookup, _host_names
    _host_lookup, _host_names = lookup, names


def identity(sampler: Sampler) -> object:
    """What a sampler is known by from one look to the next: its code. ComfyUI makes some functions anew at every look."""
    return getattr(sampler, "__code__", sampler)


def resolve(solver: str | Sampler) -> Sampler:
    """The sampler of that name, the host's before ours; a callable is returned as it is.

    Resolve when sampling and keep no reference: packs reload the host's samplers.

    Raises:
        DodeError: nobody has a sampler of that name, or no row could keep the name.
    """
    if callable(solver):
        return solver
    if not is_name(solver):
        raise DodeError(f"a table cannot store this solver's name: {solver!r}")
    sampler = None if _host_lookup is None else _host_lookup(solver)
    if sampler is None:
        sampler = SOLVERS.get(solver)
    if sampler is None:
        names = list(dict.fromkeys([*_host_names(), *SOLVERS]))
        close = difflib.get_close_matches(solver, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise DodeError(f"no solver is called {solver!r}{hint}; there are {', '.join(names)}")
    return sampler
