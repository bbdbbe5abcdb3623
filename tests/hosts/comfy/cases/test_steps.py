"""Numbers of steps: what is asked for is what a KSampler would do with that number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Subject, ksampler, mixture, rms, small, stock_node

pytestmark = pytest.mark.comfyui

# --- schedules of another length


def assert_serves(
    dode: Pack,
    subject: Subject,
    table: Any,
    steps: int,
    scheduler: str = "ddim_uniform",
    sampler: str = "euler",
) -> None:
    """As many evaluations as KSampler makes of that number, and none of λ left out."""
    as_table = {"steps": steps, "scheduler": scheduler, "sampler_name": sampler}
    subject.calls.clear()
    stock = ksampler(subject, **as_table)
    asked = len(subject.calls)
    subject.calls.clear()
    sampled = dode.ksampler(subject, table, steps=steps)["samples"]
    assert len(subject.calls) == asked
    assert rms(sampled, stock) > 1e-3
    patched = replace(subject, model=dode.apply(subject.model, table))
    assert rms(ksampler(patched, **as_table), sampled) < 1e-5


def test_a_row_answers_to_the_number_that_was_asked_for(dode):
    subject = dode.demo()
    table = dode.distil(subject, scheduler="ddim_uniform", steps="6")["table"]
    assert_serves(dode, subject, table, 6)


def test_schedules_may_begin_at_different_sigmas(dode):
    subject = small()
    steps = "5, 6, 8"
    table = dode.distil(subject, scheduler="ddim_uniform", steps=steps, latents=2, scale=2)["table"]
    for number in map(int, steps.split(",")):
        assert_serves(dode, subject, table, number)


def closed_form(kind: str = "EPS") -> Subject:
    """A model that costs nothing."""
    return mixture(kind, 4, (1, 4, 8, 8))


def beta57(model_sampling: Any, steps: int) -> Any:
    """A scheduler that other packs bring."""
    import comfy.samplers

    return comfy.samplers.beta_scheduler(model_sampling, steps, alpha=0.5, beta=0.7)


def test_every_scheduler_means_what_it_means_in_ksampler(dode, monkeypatch):
    import comfy.samplers

    handlers = comfy.samplers.SCHEDULER_HANDLERS
    monkeypatch.setitem(handlers, "beta57", comfy.samplers.SchedulerHandler(beta57))
    monkeypatch.setattr(comfy.samplers.KSampler, "SCHEDULERS", list(handlers))
    subject = closed_form()
    for scheduler in handlers:
        settings = {"latents": 2, "scale": 2, "prediction": "noise"}
        table = dode.distil(subject, scheduler=scheduler, steps="3, 6", **settings)["table"]
        for steps in (3, 6):
            assert_serves(dode, subject, table, steps, scheduler)


@pytest.mark.parametrize("sampler", ["dpm_2", "uni_pc", "heun"])
def test_a_sampler_that_drops_the_penultimate_sigma_makes_the_steps_of_ksampler(sampler, dode):
    subject = closed_form()
    table = dode.distil(subject, solver=sampler, steps="3, 6", latents=2, scale=2)["table"]
    for steps in (3, 6):
        assert_serves(dode, subject, table, steps, subject.scheduler, sampler)


def test_a_schedule_that_cannot_be_is_refused_in_words(dode):
    subject = closed_form()
    with pytest.raises(dode.library.DodeError, match=r"another scheduler .* for euler and 1, kl_optimal"):
        dode.distil(subject, scheduler="kl_optimal", steps="1")
    assert not subject.calls


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_sigmas_of_a_denoise_below_1_serve_a_ksampler_at_that_denoise(kind, dode, said):
    subject = closed_form(kind)
    picture = {"samples": ksampler(subject, steps=20)}
    settings = {"scheduler": subject.scheduler, "steps": 5, "denoise": 0.5}
    sigmas = stock_node("nodes_custom_sampler", "BasicScheduler", model=subject.model, **settings)
    table = dode.distil(subject, sigmas=sigmas)["table"]
    patched = replace(subject, model=dode.apply(subject.model, table))
    by_model = ksampler(patched, picture, **settings)
    assert rms(by_model, ksampler(subject, picture, **settings)) > 1e-3
    assert rms(by_model, dode.ksampler(subject, table, picture)["samples"]) < 1e-6
    assert not said()


# --- solvers with two evaluations a step


def test_where_steps_and_evaluations_differ_both_are_said(dode, said):
    subject = closed_form()
    made = dode.distil(subject, solver="heun", latents=4)
    assert "heun, 5 steps (9 evaluations" in made["summary"]
    dode.ksampler(subject, made["table"], {"samples": torch.randn(1, 4, 4, 4)}, denoise=0.5)
    assert "the last 3 steps (5 evaluations) of 5 steps, which is denoise 0.6" in said()
    numbers = dode.compare(subject, made["table"])["numbers"]
    assert "D-heun, 5 steps (9 evaluations)" in numbers
    assert numbers.startswith("best stock: ")
    assert "9 evaluations: " in numbers.splitlines()[0]


# --- denoise below 1


@pytest.mark.parametrize(
    ("denoise", "steps"),
    [
        (0.05, 1),
        (0.1, 1),
        (0.3, 2),
        (0.5, 3),
        (0.7, 4),
        (0.9, 5),
        (1.0, 5),
        (0.0, 0),
    ],
)
def test_denoise_rounds_halves_up_and_to_one_step_at_least(denoise, steps, dode):
    sigmas = dode.run("DODE_Sigmas", table=rows_of(dode, 5), steps=5, denoise=denoise, solver="any")["sigmas"]
    assert max(len(sigmas) - 1, 0) == steps


@pytest.mark.parametrize("denoise", [0.05, 0.1])
def test_a_small_denoise_moves_the_picture_and_what_it_became_is_said(denoise, dode, said):
    subject = dode.demo()
    picture = {"samples": ksampler(subject, steps=20, scheduler="simple")}
    table = dode.shipped("eps")
    moved = dode.ksampler(subject, table, picture, denoise=denoise)["samples"]
    assert rms(moved, picture["samples"]) > 1e-3
    assert "denoise 0.2" in said()
    before = said()
    dode.run("DODE_Sigmas", table=table, steps=5, denoise=denoise, solver="any")
    assert "denoise 0.2" in said().removeprefix(before)


def test_a_denoise_that_is_what_it_says_is_not_remarked_on(dode, said):
    subject = dode.demo()
    picture = {"samples": ksampler(subject, steps=20, scheduler="simple")}
    for denoise in (0.4, 1.0):
        dode.ksampler(subject, dode.shipped("eps"), picture, denoise=denoise)
    assert not said()


# --- two tables on one model


def rows_of(dode: Pack, steps: int) -> Any:
    """The shipped table's row of so many steps, alone: that of λ, whose steps are its σ's."""
    table = dode.shipped("eps")
    rows = [row for row in table.rows if row.steps == steps and not row.is_refined]
    return dode.library.LambdaTable(rows, model=table.model)


def test_a_second_table_is_merged_or_said_to_replace_the_first(dode, said):
    subject = dode.demo()
    tables = {steps: rows_of(dode, steps) for steps in (5, 8)}
    model = subject.model
    for table in tables.values():
        model = dode.apply(model, table)
    if not said():
        for steps, table in tables.items():
            by_model = ksampler(replace(subject, model=model), steps=steps)
            by_table = dode.ksampler(subject, table, steps=steps)["samples"]
            assert rms(by_model, by_table) < 1e-5
            assert rms(by_model, ksampler(subject, steps=steps)) > 1e-3
