"""Numbers of steps: what is asked for is what a KSampler would do with that number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Subject, ksampler, rms

pytestmark = pytest.mark.comfyui

# --- schedules of another length


def assert_serves(dode: Pack, subject: Subject, table: Any, steps: int) -> None:
    """As many evaluations as KSampler makes of that number with ddim_uniform, and none of λ left out."""
    subject.calls.clear()
    stock = ksampler(subject, steps=steps, scheduler="ddim_uniform")
    asked = len(subject.calls)
    subject.calls.clear()
    sampled = dode.ksampler(subject, table, steps=steps)["samples"]
    assert len(subject.calls) == asked
    assert rms(sampled, stock) > 1e-3
    patched = replace(subject, model=dode.apply(subject.model, table))
    assert rms(ksampler(patched, steps=steps, scheduler="ddim_uniform"), sampled) < 1e-5


def test_a_row_answers_to_the_number_that_was_asked_for(dode):
    subject = dode.demo()
    table = dode.distil(subject, scheduler="ddim_uniform", steps="6")["table"]
    assert_serves(dode, subject, table, 6)


def test_schedules_may_begin_at_different_sigmas(dode):
    subject = dode.demo()
    steps = dode.inputs_of("DODE_DistillLambdas")["steps"].default
    table = dode.distil(subject, scheduler="ddim_uniform", steps=steps, latents=4)["table"]
    for number in map(int, steps.split(",")):
        assert_serves(dode, subject, table, number)


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
    table = dode.shipped("eps")
    sigmas = dode.run("DODE_Sigmas", table=table, steps=5, denoise=denoise, solver="any")["sigmas"]
    assert max(len(sigmas) - 1, 0) == steps


@pytest.mark.parametrize("denoise", [0.05, 0.1])
def test_a_small_denoise_moves_the_picture_and_what_it_became_is_said(denoise, dode, said):
    subject = dode.demo()
    picture = {"samples": ksampler(subject, steps=20, scheduler="simple")}
    moved = dode.ksampler(subject, dode.shipped("eps"), picture, denoise=denoise)["samples"]
    assert rms(moved, picture["samples"]) > 1e-3
    assert "denoise" in said()


def test_a_denoise_that_is_what_it_says_is_not_remarked_on(dode, said):
    subject = dode.demo()
    picture = {"samples": ksampler(subject, steps=20, scheduler="simple")}
    for denoise in (0.4, 1.0):
        dode.ksampler(subject, dode.shipped("eps"), picture, denoise=denoise)
    assert not said()


# --- two tables on one model


def rows_of(dode: Pack, steps: int) -> Any:
    """The shipped table's row of so many steps, alone."""
    table = dode.shipped("eps")
    rows = [row for row in table.rows if row.steps == steps]
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
