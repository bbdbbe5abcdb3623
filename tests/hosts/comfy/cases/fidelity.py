"""The oracle of Distill λ's runs: its stock and teacher latents are those of a KSampler with the same model, prompt and
noise. Which noises are held out is not asked: a latent may be that of any noise and prompt of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Conditioning, Subject, rms

TOLERANCE = 1e-5
LATENTS = 4
"""Of each prompt: one of them is held out."""
SIDE = 4
SCALE = 3
SEED = 1


def distances(
    dode: Pack,
    subject: Subject,
    *positives: Conditioning,
    steps: int = 3,
    expected: Sequence[Subject] | None = None,
    **changes: Any,
) -> tuple[float, float]:
    """How far the worst stock latent, and the worst teacher latent, is from every KSampler's.

    Args:
        positives: prompts, of one row each.
        expected: the subject with the prompts to compare with; the positives in turn if they are of one row.
        changes: of Distill λ's inputs.
    """
    more = {f"positive_{i}": each for i, each in enumerate(positives[1:], 2)}
    latents = LATENTS * len(positives)
    settings = {"latents": latents, "seed": SEED, "scale": SCALE, "steps": str(steps)}
    given = {"positive": positives[0]} | more | settings | changes
    made = dode.distil(subject, **given)
    solver, scheduler = given.get("solver", "euler"), given.get("scheduler", subject.scheduler)
    sigmas = schedule_of(subject, scheduler, steps, solver)
    usual = schedule_of(subject, subject.scheduler, steps)
    along = usual if len(usual) == len(sigmas) and math.isclose(usual[0], sigmas[0], rel_tol=1e-4) else sigmas
    grid = teachers_grid(along, subject.scheduler == "simple", given["scale"], sigmas)
    runs = (
        ("stock", *(stock_of(made["table"].rows[0], subject) or (solver, sigmas))),
        ("teacher", "dpmpp_2m", grid),
    )
    each = expected or [replace(subject, positive=positive) for positive in positives]
    alone = given.get("micro_batch") == 1
    worst = []
    for output, sampler, grid in runs:
        theirs = torch.cat([sampled(one, sampler, grid, given["latents"], alone) for one in each])
        assert len(made[output]["samples"]) >= len(positives)
        worst.append(max(min(_error(mine, their) for their in theirs) for mine in made[output]["samples"]))
    return worst[0], worst[1]


def stock_of(row: Any, subject: Subject) -> tuple[Any, Tensor] | None:
    """The sampler and the σ of the best stock setting; None where none begins where the row begins."""
    import comfy.samplers

    if (setting := row.best_stock) is None:
        return None
    solver, options = setting.solver_and_options()
    sampling = subject.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(
        sampling, setting.scheduler, row.nfe + setting.discard_penultimate
    )
    if setting.discard_penultimate:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    return comfy.samplers.ksampler(solver, dict(options)), sigmas


def _error(mine: Tensor, their: Tensor) -> float:
    """Random networks make large numbers of noise."""
    return rms(mine, their) / max(1.0, float(their.square().mean().sqrt()))


def schedule_of(subject: Subject, scheduler: str, steps: int, solver: str = "euler") -> Tensor:
    import comfy.samplers

    return comfy.samplers.KSampler(subject.model, steps, "cpu", sampler=solver, scheduler=scheduler).sigmas


def teachers_grid(
    sigmas: Tensor, flow: bool, scale: int = SCALE, visited: Sequence[Tensor] | Tensor = ()
) -> Tensor:
    """``scale`` steps for each: equal in σ to the last, and for flow models; in log σ elsewhere. Where a σ to be visited
    cuts one in two, each piece has its share, rounded up."""
    grid = []
    for start, end in pairwise(sigmas.tolist()):
        linear = flow or end == 0
        inner = [float(v) for v in visited if end * (1 + 1e-5) < v < start * (1 - 1e-5)]
        for a, b in pairwise([start, *inner, end]):
            share = (a - b) / (start - end) if linear else math.log(a / b) / math.log(start / end)
            parts = math.ceil(scale * share - 1e-4)
            for i in range(parts):
                at = i / parts
                grid.append(a + at * (b - a) if linear else a ** (1 - at) * b**at)
    return torch.tensor([*grid, 0.0])


def sampled(subject: Subject, sampler: Any, sigmas: Tensor, count: int, alone: bool = False) -> Tensor:
    """Every noise of the run, by ComfyUI's own sampler or one of this name, together or one at a time."""
    import comfy.sample
    import comfy.samplers

    empty = subject.latent["samples"][:1].repeat(count, 1, 1, 1)
    noise = comfy.sample.prepare_noise(empty, SEED, list(range(count)))
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    runs = [
        comfy.sample.sample_custom(
            subject.model, part, 2.0, sampler, sigmas, subject.positive,
            subject.negative, torch.zeros_like(part), disable_pbar=True, seed=SEED,
        )
        for part in noise.split(1 if alone else count)
    ]  # fmt: skip
    return torch.cat(runs)


def assert_faithful(dode: Pack, subject: Subject, *positives: Conditioning, **changes: Any) -> None:
    """Both are a KSampler's."""
    stock, teacher = distances(dode, subject, *positives, **changes)
    assert stock < TOLERANCE
    assert teacher < TOLERANCE
