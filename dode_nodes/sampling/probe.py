"""Which samplers can be distilled, and at which σ they evaluate the network.

The probe runs a sampler on a tiny latent with a toy denoiser and the real σ, before any network evaluation.
The sampler must be deterministic. Its σ must depend only on the schedule. And it must be affine in the
denoised latent alone, so that λ can be found by least squares.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import IneligibleSampler
from ..sigmas import at_least_float32, check_sigmas, equal_sigma
from ..tables.row import MAX_EVALUATIONS
from .denoiser import Denoiser, DenoiserProxy, EndOfRun
from .solvers import Sampler

Options = Mapping[str, Any]

_MAX_QUERIES_PER_SIGMA = 50
_AFFINE_RTOL = 1e-3
_STATE_TOLERANCE = 0.01
"""How far a teacher's state may be from the exact one over a constant denoised, as a share of σ, of 0.1
at least. ComfyUI's deis and lms miss by 1e-3 at most; its ipndm_v by far more where steps are unequal."""
_END_TOLERANCE = 1e-6
"""How far from the last σ it may end, as a share of the first; uni_pc ends at 0.001 in place of 0."""
_JITTER = 0.2
_LONGEST_WORD = 80


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


def solver_name(solver: str | Sampler) -> str:
    """The name that a row keeps: a name as it is, ``<name>`` for a callable, which no file can hold."""
    return solver if isinstance(solver, str) else f"<{_as_word(_called(solver))}>"


def _called(solver: Sampler) -> str:
    name: str = getattr(solver, "__name__", type(solver).__name__)
    return name.strip("<>").removeprefix("sample_")  # Python calls some <lambda>


def _as_word(name: str) -> str:
    """A name that a row accepts, whatever a function is called."""
    word = "".join(c if f"_{c}".isidentifier() else "_" for c in name[:_LONGEST_WORD])
    return word if word.isidentifier() else f"_{word}"


def probe_student(
    solver: Sampler, sigmas: Tensor, *, model: Denoiser | None = None, options: Options | None = None
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
    if len(queries) > MAX_EVALUATIONS:
        raise toy.refuse(
            f"evaluates the network {len(queries)} times; at most {MAX_EVALUATIONS} can be distilled"
        )
    if len(sigmas) - 1 > MAX_EVALUATIONS:
        raise toy.refuse(f"takes {len(sigmas) - 1} steps; at most {MAX_EVALUATIONS} can be distilled")
    toy.check_affine(len(queries))
    return Queries(queries, toy.evaluations_per_step(queries))


def probe_teacher(
    solver: Sampler, sigmas: Tensor, *, model: Denoiser | None = None, options: Options | None = None
) -> TeacherQueries:
    """Where the teacher's states at ``sigmas[:-1]`` are found.

    A teacher must be deterministic, ask exactly the σ it is given and end at ``sigmas[-1]``; it need
    not be affine.

    Raises:
        IneligibleSampler: the sampler fails; the message says what at.
    """
    toy = _Toy(solver, sigmas, model, options or {})
    queries = toy.check_queries()
    return TeacherQueries(toy.check_states(queries), len(queries))


def probe_repeatable(
    solver: Sampler, sigmas: Tensor, *, model: Denoiser | None = None, options: Options | None = None
) -> None:
    """The least of what a student must be, for a list of many samplers: two runs from one state end at one result.

    Raises:
        IneligibleSampler: the sampler fails; the message says what at.
    """
    _Toy(solver, sigmas, model, options or {}).check_repeatable()


def asked_sigmas(
    solver: Sampler, sigmas: Tensor, *, model: Denoiser | None = None, options: Options | None = None
) -> list[float]:
    """The σ that a sampler, known to be eligible, asks over a schedule or a part of one."""
    return _Toy(solver, sigmas, model, options or {}).run(_smooth()).asked


Predict = Callable[[int, Tensor, Tensor], Tensor]
"""``(number of the evaluation, x, sigma[B]) -> denoised``"""


def _smooth(slope: float = 0.3) -> Predict:
    """Bounded, nonlinear in x, and another function at every evaluation."""
    return lambda k, x, sigma: torch.tanh(slope * x) * (1 + 0.1 * math.cos(k))


@dataclass(frozen=True)
class _Played:
    """A run on the toy: its last state, and the σ and states that it asked about."""

    end: Tensor
    asked: list[float]
    states: list[Tensor]


class _Toy:
    """Runs one sampler over one schedule on a tiny latent, with toy denoisers.

    In the schedule's own precision: uni_pc, for one, fails in any other.
    """

    def __init__(self, solver: Sampler, sigmas: Tensor, model: Denoiser | None, options: Options) -> None:
        check_sigmas(sigmas)
        self.solver = solver
        self.schedule = at_least_float32(sigmas.detach().cpu())
        self.model = model
        self.options = options
        self._check_signature()

    def refuse(self, why: str) -> IneligibleSampler:
        return IneligibleSampler(f"the sampler '{_called(self.solver)}' {why}")

    def run(
        self, predict: Predict, sigmas: Tensor | None = None, *, batch: int = 1, seed: int = 0
    ) -> _Played:
        """One run over ``sigmas``, or over the schedule."""
        sigmas = self.schedule if sigmas is None else sigmas
        x = _noise(7, sigmas) * sigmas[0]
        denoiser = _ToyDenoiser(self, predict, limit=_MAX_QUERIES_PER_SIGMA * len(sigmas))
        try:
            with _seeded(seed):
                end = self.solver(
                    denoiser,
                    x.repeat(batch, 1, 1, 1),
                    sigmas.clone(),  # uni_pc writes into it
                    extra_args={"seed": seed, "model_options": {"transformer_options": {}}},
                    callback=None,
                    disable=True,
                    **self.options,
                )
        except EndOfRun as stop:
            end = stop.x
        except IneligibleSampler:
            raise
        except Exception as error:
            raise self.refuse(
                f"fails on this schedule, or uses more than the denoised latent ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(end, Tensor) or end.shape[1:] != x.shape[1:]:
            raise self.refuse("does not return the latent")
        return _Played(end[:1], denoiser.asked, denoiser.states)

    def check_repeatable(self) -> _Played:
        """The same run, whatever the seed."""
        first, again = self.run(_smooth()), self.run(_smooth(), seed=1)
        if not first.end.isfinite().all():
            raise self.refuse("returns NaN or infinite values on this schedule, whatever the model")
        if not torch.equal(first.end, again.end):
            raise self.refuse(
                "is stochastic: its result changes with the seed, so there is no single result to fit"
            )
        return first

    def check_queries(self) -> tuple[float, ...]:
        """Deterministic, and asking σ that depend on the schedule alone."""
        first = self.check_repeatable()
        other, batched = self.run(_smooth(3.0)), self.run(_smooth(), batch=2)
        if not first.asked == other.asked == batched.asked:
            raise self.refuse("is adaptive: it chooses its σ during the run")
        if not first.asked:
            raise self.refuse("never evaluates the network")
        if min(first.asked) <= 0:
            raise self.refuse("evaluates the network at σ = 0")
        if max(first.asked) > float(self.schedule[0]) * (1 + 1e-5):
            raise self.refuse(f"evaluates the network at σ = {max(first.asked):.6g}, above the schedule")
        return tuple(first.asked)

    def check_affine(self, evaluations: int) -> None:
        """The next state as a function of one denoised: x(2) − x(0) = 2 (x(1) − x(0))."""
        for k in range(evaluations):
            x0, x1, x2 = (self._next_state(k, scale) for scale in (0.0, 1.0, 2.0))
            step, bend = x1 - x0, x2 - 2 * x1 + x0
            rounding = 32 * torch.finfo(x0.dtype).eps * x0.norm()
            if not bend.norm() <= _AFFINE_RTOL * step.norm() + rounding:
                raise self.refuse(f"is not affine in the denoised latent (at network evaluation {k + 1})")

    def _next_state(self, k: int, scale: float) -> Tensor:
        """The input of query k + 1 (or the result), with the k-th denoised moved by ``scale``."""
        smooth = _smooth()

        def predict(j: int, x: Tensor, sigma: Tensor) -> Tensor:
            if j > k:
                raise EndOfRun(x)
            return smooth(j, x, sigma) + (scale * _noise(11 + k, x) if j == k else 0)

        return self.run(predict).end

    def evaluations_per_step(self, queries: Sequence[float]) -> tuple[int, ...]:
        """Evaluations between the steps that the sampler can be started at.

        It can be started at step i if, over ``sigmas[i:]``, it asks what it asks there over the whole.
        """
        for schedule in (_jittered(self.schedule), self.schedule):
            per_step = self._counts(schedule)
            if sum(per_step) == len(queries):  # unless a σ was moved over some threshold of the sampler's
                break
        return per_step

    def _counts(self, schedule: Tensor) -> tuple[int, ...]:
        whole = self.run(_smooth(), schedule).asked
        counts = [0] * (len(schedule) - 1)
        step = start = 0
        for i in range(1, len(counts)):
            asked = self._asked_from(schedule[i:])
            at = len(whole) - len(asked)
            if asked and at > start and all(map(equal_sigma, whole[at:], asked)):
                counts[step], step, start = at - start, i, at
        counts[step] = len(whole) - start
        return tuple(counts)

    def _asked_from(self, sigmas: Tensor) -> list[float]:
        try:
            return self.run(_smooth(), sigmas).asked
        except IneligibleSampler:  # it fails on so few steps: no start
            return []

    def check_states(self, queries: Sequence[float]) -> tuple[int, ...]:
        """A teacher's: the evaluations that ask about its states at the σ of the schedule.

        Over a constant denoised c, every state is c + (x_T − c) σ/σ_T; the last one, too.
        """
        starts = _last_asked(queries, self.schedule)
        jittered = _jittered(self.schedule)
        if starts is None or _last_asked(self.run(_smooth(), jittered).asked, jittered) is None:
            raise self.refuse(
                "cannot be the teacher: it does not evaluate the network at every σ of its schedule. "
                "Use a sampler that does, such as dpmpp_2m, heun or euler"
            )
        constant = torch.full_like(_noise(0, self.schedule), 0.5)
        played = self.run(lambda k, x, sigma: constant.expand_as(x))
        noise = (played.states[0] - constant) / self.schedule[0]

        def missed_by(x: Tensor, sigma: Tensor) -> float:
            return float((x - constant - noise * sigma).norm() / noise.norm())

        for sigma, k in zip(self.schedule, starts, strict=False):
            if not missed_by(played.states[k], sigma) <= _STATE_TOLERANCE * max(float(sigma), 0.1):
                raise self.refuse(
                    f"cannot be the teacher: at σ = {float(sigma):.6g} it is far from the exact solution, "
                    "even if the denoised latent is constant"
                )
        if not missed_by(played.end, self.schedule[-1]) <= _END_TOLERANCE * (1 + float(self.schedule[0])):
            raise self.refuse("cannot be the teacher: it does not end at the last σ of its schedule")
        return starts

    def _check_signature(self) -> None:
        given = {"extra_args": None, "callback": None, "disable": True, **self.options}
        try:
            inspect.signature(self.solver).bind(None, None, None, **given)
        except TypeError as error:
            raise self.refuse(
                f"cannot be called as (model, x, sigmas, …) with these options: {error}"
            ) from error
        except ValueError:  # a builtin without a signature: the run itself will tell
            return


def _last_asked(asked: Sequence[float], schedule: Tensor) -> tuple[int, ...] | None:
    """For each σ but the last: its last query (any others are stages of the steps before). None if one has none."""
    found = [
        next((k for k in reversed(range(len(asked))) if equal_sigma(asked[k], sigma)), None)
        for sigma in schedule[:-1].tolist()
    ]
    known = tuple(k for k in found if k is not None)
    return known if len(known) == len(found) else None


def _noise(seed: int, like: Tensor) -> Tensor:
    """A latent, ``[1, 4, 2, 2]``, of the dtype of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64).to(like.dtype)


def _jittered(schedule: Tensor) -> Tensor:
    """The schedule with its inner σ lowered irregularly, by up to a fifth of the step that follows.

    So no stage of a sampler falls on a σ of the schedule by chance: on an exponential schedule the
    inner stages of single-step third-order solvers do.
    """
    jittered = schedule.clone()
    shares = _JITTER * ((torch.arange(1, len(schedule) - 1) * 0.618034) % 1).to(schedule.dtype)
    jittered[1:-1] += shares * (schedule[2:] - schedule[1:-1])
    return jittered


class _ToyDenoiser(DenoiserProxy):
    """Free to evaluate; lends the sampler the real model's attributes, never its network."""

    def __init__(self, toy: _Toy, predict: Predict, limit: int) -> None:
        super().__init__(toy.model)
        self._toy = toy
        self._predict = predict
        self._limit = limit
        self.asked: list[float] = []
        self.states: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        if _hooks(extra_args.get("model_options") or {}):
            raise self._toy.refuse(
                "uses more than the denoised latent: it changes the model's guidance, as CFG++ samplers do"
            )
        k = len(self.asked)
        if k >= self._limit:
            raise self._toy.refuse(f"does not stop: it evaluated the network {self._limit} times")
        self.asked.append(float(sigma.flatten()[0]))
        self.states.append(x[:1].clone())
        return self._predict(k, x, sigma)


def _hooks(model_options: Mapping[str, Any]) -> bool:
    """Whether there are functions among them, by which a sampler reads or changes the guidance.

    Notes that a sampler keeps there, for itself or for its pack's patches, do no harm. Patches of the network are
    ``transformer_options``: a network that knows of the sampler is a network like any other.
    """
    given = [value for name, value in model_options.items() if name != "transformer_options"]
    return any(callable(each) for value in given for each in (value if isinstance(value, list) else [value]))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Another state of the global CPU generator, put back afterwards. The devices' are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
