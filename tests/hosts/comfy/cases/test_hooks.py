"""Distill λ's runs are a KSampler's, with hooks that come and go from prompt to prompt and from step to step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts.comfy.cases import subjects
from tests.hosts.comfy.cases.fidelity import (
    SEED,
    TOLERANCE,
    assert_faithful,
    distances,
    sampled,
    schedule_of,
    teachers_grid,
)
from tests.hosts.comfy.cases.hooks import LATE, hook, hooked
from tests.hosts.comfy.cases.subjects import Subject, rms, small, unet_prompt
from tests.hosts.conftest import conditioning

pytestmark = pytest.mark.comfyui


def test_a_hook_on_the_only_prompt(dode):
    subject = small()
    assert_faithful(dode, subject, hooked(subject.positive, hook(subject)))


def test_one_hook_on_both_prompts(dode):
    subject = small()
    both = hook(subject)
    assert_faithful(dode, subject, hooked(subject.positive, both), hooked(conditioning(5.0), both))


def test_a_hook_on_one_prompt_of_two(dode):
    subject = small()
    assert_faithful(dode, subject, hooked(subject.positive, hook(subject)), conditioning(5.0))


def test_another_hook_on_each_prompt(dode):
    subject = small()
    one, two = hooked(subject.positive, hook(subject)), hooked(conditioning(5.0), hook(subject, -1.0))
    assert_faithful(dode, subject, one, two)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_hook_whose_strength_changes_during_the_run(solver, dode):
    subject = small()
    changing = hooked(subject.positive, hook(subject, frames=LATE))
    assert_faithful(dode, subject, changing, conditioning(5.0), steps=5, scale=2, solver=solver)


def test_hooks_together_and_on_the_negative_prompt(dode):
    import comfy.hooks

    subject = small()
    one, two = hook(subject, 0.5, ((1.0, 0.0, 1), (0.2, 0.4, 0))), hook(subject, -0.3)
    both = comfy.hooks.HookGroup.combine_all_hooks([one, two])
    negated = replace(subject, negative=hooked(subject.negative, one))
    assert_faithful(dode, negated, hooked(subject.positive, both), conditioning(5.0), scale=2)


def test_a_prompt_for_what_the_others_leave_free(dode):
    """Its hook's steps are those in which something is left."""
    import comfy.hooks

    subject = small()
    early = [[context, options | {"end_percent": 0.2}] for context, options in subject.positive]
    changing = hook(subject, -0.4, ((1.0, 0.05, 3), (0.1, 0.1, 0)))
    (both,) = comfy.hooks.set_default_conds_and_combine([early], [conditioning(5.0)], changing)
    assert_faithful(dode, subject, both, steps=5, scale=2)


def test_options_that_a_hook_gives_one_prompt(dode):
    import comfy.hooks

    def louder(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, 1.3 * v

    group = comfy.hooks.HookGroup()
    only = comfy.hooks.EnumHookScope.HookedOnly
    group.add(comfy.hooks.TransformerOptionsHook({"patches": {"attn1_patch": [louder]}}, hook_scope=only))
    subject = subjects.unet()
    assert_faithful(dode, subject, hooked(subject.positive, group), unet_prompt(3), scale=2)


def test_a_refinement_of_a_prompt_with_a_changing_hook_is_what_ksampler_makes_of_its_row(dode):
    """Its runs begin in the middle, with outputs kept from before."""

    side = 6
    subject = small(side=side)
    positive = hooked(subject.positive, hook(subject, frames=LATE))
    prompted, count, held = replace(subject, positive=positive), 8, 2
    made = dode.distil(prompted, latents=count, seed=SEED, steps="4", scale=2, refine_budget=6.0)
    row = next(row for row in made["table"].rows if row.is_refined)
    stage = next(
        each for each in row.report["refined"]["stages"] if each["stage"] == row.report["refined"]["kept"]
    )
    assert stage["stage"].startswith("Jacobian")
    latent = {"samples": torch.zeros(count, 4, side, side), "batch_index": list(range(count))}
    table = dode.library.LambdaTable([row], model=made["table"].model)
    theirs = dode.ksampler(prompted, table, latent, seed=SEED, steps=4)["samples"]
    assert rms(made["d-ode"]["samples"], theirs[-held:]) < TOLERANCE
    grid = teachers_grid(schedule_of(subject, subject.scheduler, 4), False, 2)
    teacher = sampled(prompted, "dpmpp_2m", grid, count)
    process_in = subject.model.model.process_latent_in
    distances = (process_in(theirs) - process_in(teacher)).flatten(1).square().mean(1)
    assert float(distances[:-held].mean().sqrt()) == pytest.approx(stage["fitted_error"], rel=1e-3)
    assert float(distances[-held:].mean().sqrt()) == pytest.approx(stage["held_out_error"], rel=1e-3)


def test_a_changing_hook_where_memory_runs_out(dode):
    """An evaluation that is made in parts counts once."""
    subject = small()
    evaluate = subject.model.model._apply_model

    def limited(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return evaluate(x, *args, **kwargs)

    class LittleMemory:
        def distil(self, subject: Subject, **inputs: Any) -> dict[str, Any]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(subject.model.model, "_apply_model", limited)
                return dode.distil(subject, **inputs)

    prompts = (
        hooked(subject.positive, hook(subject, frames=((1.0, 0.0, 1), (0.2, 0.4, 0)))),
        conditioning(5.0),
    )
    stock, teacher = distances(LittleMemory(), subject, *prompts)
    assert stock < TOLERANCE
    assert teacher < TOLERANCE
