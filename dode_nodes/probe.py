"""Which samplers can be distilled, and which σ they ask the network about.

A sampler is run on a tiny latent with a free toy denoiser and the real σ. What it does there
decides, before any network evaluation: it must be deterministic, ask σ that depend on nothing but
the schedule, and be affine in the denoised alone, so that λ can be found by least squares.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser, DenoiserProxy
from .errors import DodeError, IneligibleSampler
from .solvers import Sampler

SIGMA_RTOL = 1e-4
"""Two σ within this are the same one: hosts compute schedules in float32."""

_AFFINE_RTOL = 1e-3
_MAX_QUERIES_PER_SIGMA = 50


@dataclass(frozen=True)
class Queries:
    """What a sampler asks over one schedule.

    Attributes:
        sigmas: the σ of each network evaluation, in order.
        per_step: how many of them belong to each step of the schedule. A step that the sampler
            cannot be started at counts none: its evaluations belong to the step before.
    """

    sigmas: tuple[float, ...]
    per_step: tuple[int, ...]


@dataclass(frozen=True)
class TeacherQueries:
    """What a teacher asks over its schedule.

    Attributes:
        starts: for each of ``sigmas[:-1]``, the number of the evaluation whose input is the state there.
        evaluations: of the network, in all.
    """

    starts: tuple[int, ...]
    evaluations: int


def check_sigmas(sigmas: Tensor) -> None:
    """Refuse what is not a descending schedule of finite σ ≥ 0 with one step at least."""
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or not sigmas.is_floating_point():
        raise DodeError("sigmas must be a one-dimensional tensor of floating-point numbers")
    if len(sigmas) < 2:
        raise DodeError(f"sigmas has {len(sigmas)} entries: that is zero steps; at least two are needed")
    values = sigmas.detach().cpu().double()
    if not values.isfinite().all() or (values < 0).any():
        raise DodeError(f"sigmas must be finite and not negative, got {values.tolist()}")
    for i, (a, b) in enumerate(zip(values[:-1].tolist(), values[1:].tolist(), strict=True)):
        if b >= a:
            what = "is repeated" if a == b else "ascends"
            raise DodeError(f"sigmas must descend, but it {what} at {i} → {i + 1}: {a:.6g}, {b:.6g}")


def solver_name(solver: str | Sampler) -> str:
    """The name that a row keeps: a name as it is, ``<name>`` for a callable, which no file can hold."""
    return solver if isinstance(solver, str) else f"<{_called(solver)}>"


def _called(solver: Sampler) -> str:
    return getattr(solver, "__name__", type(solver).__name__).removeprefix("sample_")


def same_sigma(a: float, b: float) -> bool:
    """Whether two σ are one, to the precision that hosts compute schedules in."""
    return math.isclose(a, b, rel_tol=SIGMA_RTOL)


def probe_student(
    solver: Sampler, sigmas: Tensor, *, model: Denoiser | None = None, options: dict[str, Any] | None = None
) -> Queries:
    """What a sampler asks over ``sigmas``, if it can be distilled.

    Args:
        solver: a sampler in k-diffusion's convention.
        sigmas: the schedule, descending.
        model: the denoiser that the sampler will run on; only its attributes are used.
        options: keyword arguments of the sampler.

    Raises:
        IneligibleSampler: the sampler fails; the message says what at.
    """
    toy = _Toy(solver, sigmas, model, options or {})
    queries = toy.check_queries()
    toy.check_affine(queries)
    return Queries(queries, toy.evaluations_per_step(queries))


def probe_teacher(
    solver: Sampler, sigmas: Tensor, *, model: Denoiser | None = None, options: dict[str, Any] | None = None
) -> tuple[int, ...]:
    """The number of the evaluation whose input is the teacher's state at each of ``sigmas[:-1]``.

    A teacher must be deterministic, ask exactly the σ it is given and end at ``sigmas[-1]``; it need
    not be affine.

    Raises:
        IneligibleSampler: the sampler fails; the message says what at.
    """
    toy = _Toy(solver, sigmas, model, options or {})
    queries = toy.check_queries()
    toy.check_states_exact()
    starts = _first_queries(queries, toy.sigmas)
    if len(queries) > len(starts):  # stages: a step's first query may come after a stage at the same σ
        per_step = toy.evaluations_per_step(queries)
        if not all(per_step):
            raise toy.refuse("it cannot serve as a teacher: it merges steps of the schedule that it is given")
        starts = tuple(accumulate(per_step[:-1], initial=0))
    return TeacherQueries(starts, len(queries))


def _equal_sigma(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)  # both computed here, in float64


def _first_queries(queries: tuple[float, ...], sigmas: list[float]) -> tuple[int, ...]:
    starts = []
    for sigma in sigmas[:-1]:
        at = next((k for k, q in enumerate(queries) if _equal_sigma(q, sigma)), None)
        if at is None:
            raise IneligibleSampler(
                f"this sampler cannot serve as a teacher: it does not ask σ = {sigma:.6g} of the schedule "
                "that it is given. Use a sampler that does, such as dpmpp_2m, heun or euler"
            )
        starts.append(at)
    return tuple(starts)


class _Stop(Exception):
    """How a run ends early; not an error."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class _Toy:
    """Runs one sampler over one schedule on a tiny latent, with toy denoisers."""

    def __init__(
        self, solver: Sampler, sigmas: Tensor, model: Denoiser | None, options: dict[str, Any]
    ) -> None:
        check_sigmas(sigmas)
        self.solver = solver
        self.schedule = sigmas.detach().cpu()
        self.sigmas = self.schedule.double().tolist()
        self.model = model
        self.options = options
        self.name = _called(solver)

    def refuse(self, why: str) -> IneligibleSampler:
        return IneligibleSampler(f"the sampler '{self.name}' {why}")

    def run(self, predict: Callable[[int, Tensor, Tensor], Tensor], *, batch: int = 1, seed: int = 0,
            sigmas: Tensor | None = None) -> tuple[Tensor, list[float]]:  # fmt: skip
        """One run; ``predict(k, x, sigma) -> denoised``. Returns the last state and the σ asked."""
        sigmas = self.schedule if sigmas is None else sigmas
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64) * self.sigmas[0]
        x = x.expand(batch, -1, -1, -1).clone()
        denoiser = _ToyDenoiser(self, predict, limit=_MAX_QUERIES_PER_SIGMA * len(sigmas))
        extra_args = {"seed": seed, "model_options": {}}
        try:
            with _seeded(seed):
                fresh = sigmas.to(torch.float64, copy=True)  # uni_pc writes into the σ it is given
                end = self.solver(denoiser, x, fresh, extra_args=extra_args,
                                  callback=None, disable=True, **self.options)  # fmt: skip
        except _Stop as stop:
            end = stop.x
        except (DodeError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise self.refuse(
                f"fails on this schedule, or reads more than the denoised ({type(error).__name__}: {error})"
            ) from error
        return end[:1], denoiser.asked

    def check_queries(self) -> tuple[float, ...]:
        """Deterministic, and asking σ that depend on the schedule alone."""
        self._check_signature()
        smooth, queries = self.run(_tanh(0.3))
        again, _ = self.run(_tanh(0.3), seed=1)
        if not torch.equal(smooth, again):
            raise self.refuse(
                "is stochastic: its result changes with the seed, so there is nothing to follow"
            )
        _, other = self.run(_tanh(3.0))
        _, batched = self.run(_tanh(0.3), batch=2)
        if not queries == other == batched:
            raise self.refuse("is adaptive: the σ it asks about depend on more than the schedule")
        if not queries or min(queries) <= 0:
            raise self.refuse("asks the network at σ = 0" if queries else "never asks the network")
        return tuple(queries)

    def check_affine(self, queries: tuple[float, ...]) -> None:
        """The next state as a function of one denoised: x(2) − x(0) = 2 (x(1) − x(0))."""
        for k in range(len(queries)):
            x0, x1, x2 = (self._next_state(k, scale) for scale in (0.0, 1.0, 2.0))
            step = x1 - x0
            bend = ((x2 - x0) - 2 * step).norm()
            if not bend <= _AFFINE_RTOL * max(step.norm(), 1e-6 * x0.norm()):
                raise self.refuse(f"is not affine in the denoised latent (at network evaluation {k + 1})")

    def check_states_exact(self) -> None:
        """Over a constant denoised c, every state is c + (x_T − c) σ/σ_T; the last one, too."""
        constant = torch.full((1, 4, 2, 2), 0.5, dtype=torch.float64)
        end, _ = self.run(lambda k, x, sigma: constant.expand_as(x))
        start, _ = self.run(_stop_at_first)
        exact = constant + (start - constant) * self.sigmas[-1] / self.sigmas[0]
        if not torch.allclose(end, exact, rtol=1e-6, atol=1e-6):
            raise self.refuse("cannot serve as a teacher: it does not end at the last σ that it is given")

    def evaluations_per_step(self, queries: tuple[float, ...]) -> tuple[int, ...]:
        """Evaluations between the steps that the sampler can be started at.

        It can be started at step i if, over ``sigmas[i:]``, it asks what it asks there over the whole.
        """
        starts = [0]
        for i in range(1, len(self.sigmas) - 1):
            _, asked = self.run(_tanh(0.3), sigmas=self.schedule[i:])
            rest = queries[len(queries) - len(asked) :]
            can_start = len(rest) == len(asked) and all(map(_equal_sigma, asked, rest))
            starts.append(len(queries) - len(asked) if can_start else starts[-1])
        ends = [*starts[1:], len(queries)]
        merged = [end - start for start, end in zip(starts, ends, strict=True)]
        return _to_the_step_before(merged, starts)

    def _check_signature(self) -> None:
        try:
            inspect.signature(self.solver).bind(None, None, None, extra_args=None, callback=None, disable=True,
                                                **self.options)  # fmt: skip
        except TypeError as error:
            raise self.refuse(
                f"is not called as (model, x, sigmas, …) or not with these options: {error}"
            ) from error
        except ValueError:  # a builtin without a signature: the run itself will tell
            return

    def _next_state(self, k: int, scale: float) -> Tensor:
        """The input of query k + 1 (or the result), with the k-th denoised moved by ``scale``."""
        generator = torch.Generator().manual_seed(11 + k)
        direction = torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64)

        def predict(j: int, x: Tensor, sigma: Tensor) -> Tensor:
            if j > k:
                raise _Stop(x)
            return _tanh(0.3)(j, x, sigma) + (scale * direction if j == k else 0)

        return self.run(predict)[0]


def _to_the_step_before(merged: list[int], starts: list[int]) -> tuple[int, ...]:
    """Where steps share a start (no start of their own), the first of them has the evaluations."""
    per_step = [0] * len(merged)
    owner = 0
    for i, count in enumerate(merged):
        if i == 0 or starts[i] != starts[i - 1]:
            owner = i
        per_step[owner] += count
    return tuple(per_step)


def _tanh(slope: float) -> Callable[[int, Tensor, Tensor], Tensor]:
    return lambda k, x, sigma: torch.tanh(slope * x) * (1 + 0.1 * math.cos(k))


def _stop_at_first(k: int, x: Tensor, sigma: Tensor) -> Tensor:
    raise _Stop(x)


class _ToyDenoiser(DenoiserProxy):
    """Free to evaluate; lends the sampler the real model's attributes, never its network."""

    def __init__(self, toy: _Toy, predict: Callable[[int, Tensor, Tensor], Tensor], limit: int) -> None:
        super().__init__(toy.model)
        self._toy = toy
        self._predict = predict
        self._limit = limit
        self.asked: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        if extra_args.get("model_options"):
            raise self._toy.refuse(
                "reads more than the denoised latent: it hooks into the model's guidance (CFG++ samplers do)"
            )
        if len(self.asked) >= self._limit:
            raise self._toy.refuse(f"does not end: it asked the network {self._limit} times")
        k = len(self.asked)
        self.asked.append(float(sigma.flatten()[0]))
        return self._predict(k, x, sigma)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Another state of the global generator, put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
