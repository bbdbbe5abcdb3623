"""Inpainting: what a mask protects stays as it was, with every kind of row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.hosts.comfy.cases import subjects
from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Latent, Subject, ksampler, rms, small, stock_node

pytestmark = pytest.mark.comfyui


@cache
def _tables(dode: Pack, kind: str) -> dict[bool, Any]:
    """Tables of a greedy row (False), and of its refined row (True)."""
    table = dode.distil(small(kind), scheduler="simple", steps="3", refine_budget=8.0)["table"]
    rows = {refined: [row for row in table.rows if row.is_refined == refined] for refined in (False, True)}
    return {refined: dode.library.LambdaTable(each, model=table.model) for refined, each in rows.items()}


def _half_masked(subject: Subject) -> Latent:
    """A picture of the model's, whose right half is kept."""
    picture = ksampler(subject, {"samples": torch.zeros(2, 4, 4, 4)}, steps=20, scheduler="simple")
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    return {"samples": picture, "noise_mask": mask}


@pytest.mark.parametrize("denoise", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("refined", [False, True])
def test_the_kept_half_is_kept(refined, kind, denoise, dode):
    subject = small(kind)
    latent = _half_masked(subject)
    result = dode.ksampler(subject, _tables(dode, kind)[refined], latent, steps=3, denoise=denoise)["samples"]
    assert rms(result[..., 2:], latent["samples"][..., 2:]) <= 1e-6
    assert rms(result[..., :2], latent["samples"][..., :2]) > 1e-2


FEATHERED = torch.tensor([1, 1, 1, 1, 0.7, 0.3, 0, 0]).expand(1, 1, 8, 8)
"""Half of a picture is made anew, and a border between it and what is kept."""


def _differential(subject: Subject) -> Subject:
    """What a mask protects is set free during the run: the less of it there is, the later."""
    return replace(
        subject,
        model=stock_node("nodes_differential_diffusion", "DifferentialDiffusion", model=subject.model),
    )


def _mixture(kind: str) -> Subject:
    """The closed form. It is not kept: ComfyUI collects garbage in every run while a model outlives its patches."""
    return subjects.mixture(kind, 4, (1, 4, 8, 8))


@cache
def _table_and_pictures(dode: Pack, kind: str, solver: str) -> tuple[Any, Latent]:
    """Of the closed form; the pictures have a mask."""
    subject = _mixture(kind)
    table = dode.distil(subject, solver=solver, steps="5", latents=8, scale=4, refine_budget=12.0)["table"]
    pictures = ksampler(subject, {"samples": torch.zeros(8, 4, 8, 8)}, steps=40, seed=9)
    return table, {"samples": pictures, "noise_mask": FEATHERED}


def _sampled(subject: Subject, latent: Latent, sampler: Any, sigmas: Tensor) -> Tensor:
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent["samples"], 5)
    return comfy.sample.sample_custom(
        subject.model, noise, 2.0, sampler, sigmas, subject.positive, subject.negative, latent["samples"],
        noise_mask=latent["noise_mask"], disable_pbar=True, seed=5,
    )  # fmt: skip


def _converged(subject: Subject, latent: Latent, sigmas: Tensor) -> Tensor:
    """With many steps for each, during which what is free stays what it was at the first."""
    import comfy.samplers

    ends = [*sigmas[1:-1].tolist(), float(sigmas[-2]) * 0.01]
    pairs = zip(sigmas[:-1].tolist(), ends, strict=True)
    grid = torch.cat([*(torch.tensor(np.geomspace(a, b, 21)[:-1]).float() for a, b in pairs), torch.zeros(1)])
    at_sigma = subject.model.model_options.get("denoise_mask_function")
    if at_sigma is not None:

        def held(sigma: Tensor, mask: Tensor, extra_options: dict[str, Any]) -> Tensor:
            begun = sigmas[:-1][sigmas[:-1] >= sigma[0].cpu() * (1 - 1e-5)].min()
            return at_sigma(begun.expand(len(sigma)).to(sigma), mask, extra_options | {"sigmas": sigmas})

        model = subject.model.clone()
        model.set_model_denoise_mask_function(held)
        subject = replace(subject, model=model)
    return _sampled(subject, latent, comfy.samplers.sampler_object("dpmpp_2m"), grid)


def _as_it_is(subject: Subject) -> Subject:
    return subject


IN_EVERY_HOST = [("EPS", "euler", _as_it_is), ("FLOW", "dpmpp_2m", _differential)]
"""Each mask, each solver, each kind of model."""


@pytest.mark.parametrize(
    ("kind", "solver", "laid_on"),
    [
        pytest.param(*each, marks=[] if each in IN_EVERY_HOST else pytest.mark.slow_host)
        for each in product(["EPS", "FLOW"], ["euler", "dpmpp_2m"], [_as_it_is, _differential])
    ],
)
def test_a_feathered_mask_leaves_a_row_nearer_than_stock(
    kind: str, solver: str, laid_on: Callable[[Subject], Subject], dode: Pack
):
    """And 'Apply λ to model' makes the same of it."""
    import comfy.samplers

    table, latent = _table_and_pictures(dode, kind, solver)
    subject = laid_on(_mixture(kind))
    for row in table.rows:
        one = dode.library.LambdaTable([row], model=table.model)
        sigmas, plain = (torch.tensor(each.sigmas, dtype=torch.float32) for each in (row, row.plain))
        stock = _sampled(subject, latent, comfy.samplers.sampler_object(row.plain.solver), plain)
        ours = _sampled(subject, latent, dode.run("DODE_Sampler", table=one, solver="any")["sampler"], sigmas)
        error = rms(ours, _converged(subject, latent, sigmas))
        assert error < rms(stock, _converged(subject, latent, plain))
        applied = replace(subject, model=dode.apply(subject.model, one))
        assert rms(_sampled(applied, latent, comfy.samplers.sampler_object(row.solver), sigmas), ours) < 1e-6


def test_a_solver_makes_what_is_kept_noisy_as_it_does_in_ksampler(dode):
    """ComfyUI's ddim draws other noise for it."""
    import comfy.samplers

    subject = small()
    latent = _half_masked(subject)
    sigmas = comfy.samplers.KSampler(subject.model, 4, "cpu", scheduler="karras").sigmas
    for solver in ("ddim", "euler"):
        row = dode.library.LambdaRow(solver, sigmas.double().numpy(), (1,) * 4, np.zeros(4))
        ours = dode.ksampler(subject, dode.library.LambdaTable([row]), latent, steps=4)["samples"]
        theirs = {
            each: ksampler(subject, latent, steps=4, sampler_name=each, scheduler="karras")
            for each in ("ddim", "euler")
        }
        assert rms(ours, theirs.pop(solver)) < 1e-6
        assert rms(ours, *theirs.values()) > 1e-3
