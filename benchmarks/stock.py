"""Stock samplers to compare with: every deterministic one of ComfyUI's where there is one, and this package's.

With the options that make more of them: an order below the default, and eta = 0 where that is what makes a
stochastic sampler deterministic. Each on every schedule with both endings, at the largest number of steps that a
budget of network evaluations pays for.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from common import Bench
from torch import Tensor

from dode_nodes import DodeError
from dode_nodes.errors import IneligibleSampler
from dode_nodes.hosts.comfy.launch import find_comfyui, start_comfyui
from dode_nodes.sampling.denoiser import DenoiserProxy
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.schedules import SCHEDULES, make_sigmas
from dode_nodes.sampling.solvers import SOLVERS, Sampler, use_host

ENDINGS = (("full", False), ("penultimate σ dropped", True))
HEATS = ((12, 8),)
"""Test latents on which all combinations are tried, and how many of them go on; the last are measured on all."""
_FEWER = {"max_order": (2, 3), "order": (2, 3), "eta": (0.0,)}
_SIGMAS = torch.tensor([14.0, 5.0, 2.0, 0.7, 0.0])


@dataclass(frozen=True)
class Stock:
    """A stock sampler on a schedule with an ending.

    Attributes:
        solver: its name and options.
        sampler: the function, options included.
    """

    solver: str
    schedule: str
    ending: str
    sigmas: Tensor = field(repr=False)
    sampler: Sampler = field(repr=False)

    def __str__(self) -> str:
        steps = len(self.sigmas) - 1
        return f"{self.solver}, {self.schedule}, {self.ending}, {steps} step{'s' if steps > 1 else ''}"


class InHost(DenoiserProxy):
    """A denoiser with what ComfyUI's samplers look for behind it."""

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__(model)
        if _host_starts():
            from dode_nodes.hosts.comfy.host_samplers import what_samplers_look_for

            self.inner_model = what_samplers_look_for(flow=kind == "flow").inner_model

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        return self._model(x, sigma, **extra_args)


@cache
def _host_starts() -> bool:
    """Whether there is a ComfyUI; it can be imported then."""
    if find_comfyui() is None:
        return False
    start_comfyui()
    return True


def race_by_hosts_samplers() -> None:
    """Let fits race what they would race in ComfyUI, if there is one."""
    if _host_starts():
        from dode_nodes.hosts.comfy.host_samplers import host_names, host_sampler

        use_host(host_sampler, host_names)


def hosted(bench: Bench) -> Bench:
    """The bench, its model as ComfyUI's samplers want it."""
    model = InHost(bench.test.model, bench.model.kind)
    return replace(bench, test=replace(bench.test, model=model))


@cache
def samplers(kind: str) -> Mapping[str, Sampler]:
    """Every deterministic sampler by name and options; ours where ComfyUI has none of the name."""
    found: dict[str, Sampler] = dict(SOLVERS)
    if _host_starts():
        import comfy.samplers

        for name in comfy.samplers.SAMPLER_NAMES:
            if name.endswith("_gpu") or name == "ddim":  # the same as without, and as euler
                continue
            sampler = getattr(comfy.samplers.sampler_object(name), "sampler_function", None)
            if sampler is not None:
                found[name] = sampler
    with_options = {
        f"{name} {option}={value:g}": partial(sampler, **{option: value})
        for name, sampler in found.items()
        for option, values in _FEWER.items()
        if option in inspect.signature(sampler).parameters
        for value in values
    }
    return {
        name: sampler for name, sampler in (found | with_options).items() if _is_deterministic(sampler, kind)
    }


def _is_deterministic(sampler: Sampler, kind: str) -> bool:
    sigmas = _SIGMAS if kind == "eps" else _SIGMAS / 14
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(probe_student(sampler, sigmas, model=InHost(None, kind)).sigmas)
        except (IneligibleSampler, TypeError):
            return False


def combinations(bench: Bench, budget: int) -> Iterator[Stock]:
    """Every sampler × schedule × ending, each at the largest number of steps that the budget pays."""
    kind = bench.model.kind
    for solver, sampler in samplers(kind).items():
        for schedule in SCHEDULES:
            for ending, discard in ENDINGS:
                for steps in range(budget, 0, -1):
                    try:
                        sigmas = make_sigmas(
                            schedule, steps, bench.model.noise_schedule, discard_penultimate=discard
                        )
                        cost = len(probe_student(sampler, sigmas, model=InHost(None, kind)).sigmas)
                    except (
                        DodeError
                    ):  # a schedule that has no such number of steps, or a sampler that fails on it
                        continue
                    if cost <= budget:
                        yield Stock(solver, schedule, ending, sigmas, sampler)
                        break


def best_stock(
    bench: Bench, among: Iterable[Stock], heats: Sequence[tuple[int, int]] = HEATS
) -> tuple[float, Stock, Tensor]:
    """Error, name and results of the best on the test latents: a choice in stock's favour."""
    bench = hosted(bench)
    for latents, go_on in heats:
        some = bench.first(latents)
        errors = {}
        for candidate in among:
            error = some.error(some.sample(candidate.sigmas.clone(), candidate.sampler))
            if error == error:  # no NaN
                errors[candidate] = error
        among = sorted(errors, key=errors.__getitem__)[:go_on]
    measured = []
    for candidate in among:
        results = bench.sample(candidate.sigmas.clone(), candidate.sampler)
        measured.append((bench.error(results), candidate, results))
    return min(measured, key=lambda result: result[0])
