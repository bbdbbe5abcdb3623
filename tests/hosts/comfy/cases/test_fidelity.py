"""Distill λ's stock and teacher latents are those of a KSampler: same model, prompt and noise index.

For every kind of conditioning, hook, patch, scheduler and micro-batch. Which noises are held out is not asked: a
latent may be that of any noise and prompt of the run.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Conditioning, Subject, rms, stock_node

pytestmark = pytest.mark.comfyui

TOLERANCE = 1e-5
LATENTS = 4
"""Of each prompt: one of them is held out."""
SIDE = 4
SCALE = 3
SEED = 1


def distances(
    dode: Pack, subject: Subject, *positives: Conditioning, steps: int = 3, **changes: Any
) -> tuple[float, float]:
    """How far the worst stock latent, and the worst teacher latent, is from every KSampler's.

    Args:
        positives: prompts, of one row each.
        changes: of Distill λ's inputs.
    """
    more = {f"positive_{i}": each for i, each in enumerate(positives[1:], 2)}
    latents = LATENTS * len(positives)
    settings = {"latents": latents, "seed": SEED, "scale": SCALE, "steps": str(steps)}
    given = {"positive": positives[0]} | more | settings | changes
    made = dode.distil(subject, **given)
    solver, scheduler = given.get("solver", "euler"), given.get("scheduler", subject.scheduler)
    sigmas = schedule_of(subject, scheduler, steps)
    runs = (
        ("stock", solver, sigmas),
        ("teacher", "dpmpp_2m", teachers_grid(sigmas, subject.scheduler == "simple")),
    )
    worst = []
    for output, sampler, grid in runs:
        theirs = torch.cat([_sampled(subject, positive, sampler, grid, latents) for positive in positives])
        assert len(made[output]["samples"]) >= len(positives)
        worst.append(max(min(rms(mine, their) for their in theirs) for mine in made[output]["samples"]))
    return worst[0], worst[1]


def schedule_of(subject: Subject, scheduler: str, steps: int) -> Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(subject.model.get_model_object("model_sampling"), scheduler, steps)


def teachers_grid(sigmas: Tensor, flow: bool) -> Tensor:
    """Each step in ``SCALE``: equal in σ to the last, and for flow models; in log σ elsewhere."""
    grid = []
    for a, b in pairwise(sigmas.tolist()):
        for i in range(SCALE):
            share = i / SCALE
            grid.append(a + share * (b - a) if flow or b == 0 else a ** (1 - share) * b**share)
    return torch.tensor([*grid, 0.0])


def _sampled(subject: Subject, positive: Conditioning, sampler: str, sigmas: Tensor, count: int) -> Tensor:
    """Every noise of the run, by ComfyUI's own sampler."""
    import comfy.sample
    import comfy.samplers

    empty = subject.latent["samples"][:1].repeat(count, 1, 1, 1)
    noise = comfy.sample.prepare_noise(empty, SEED, list(range(count)))
    return comfy.sample.sample_custom(
        subject.model, noise, 2.0, comfy.samplers.sampler_object(sampler), sigmas, positive, subject.negative,
        empty, disable_pbar=True, seed=SEED,
    )  # fmt: skip


def assert_faithful(dode: Pack, subject: Subject, *positives: Conditioning, **changes: Any) -> None:
    """Both are a KSampler's."""
    stock, teacher = distances(dode, subject, *positives, **changes)
    assert stock < TOLERANCE
    assert teacher < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("eps", {}),
        ("flow", {}),
        ("eps", {"micro_batch": 3}),
        ("eps", {"solver": "heun", "steps": 6}),
        ("flow", {"solver": "dpmpp_2m", "scheduler": "beta"}),
        ("eps", {"scheduler": "ddim_uniform"}),
    ],
    ids=str,
)
def test_one_prompt(kind, changes, dode):
    subject = dode.demo(kind, SIDE)
    assert_faithful(dode, subject, subject.positive, **changes)


def test_two_prompts(dode):
    subject = dode.demo(side=SIDE)
    assert_faithful(dode, subject, subject.positive, dode.prompt(5))


def _with(positive: Conditioning, **settings: Any) -> Conditioning:
    return [[context, options | settings] for context, options in positive]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"area": (2, 4, 0, 0), "strength": 1.0}, id="area"),
        pytest.param({"mask": torch.eye(SIDE)[None], "mask_strength": 0.7}, id="mask"),
        pytest.param({"start_percent": 0.3, "end_percent": 0.9}, id="part of the run"),
    ],
)
def test_conditionings_that_act_in_part(settings, dode):
    subject = dode.demo(side=SIDE)
    ((context, options),) = dode.prompt(5)
    both = [[context, options | settings], *subject.positive]
    assert_faithful(dode, subject, both, dode.prompt(7))


def random_lora(model: Any, like: str) -> dict[str, Any]:
    """A change of every matrix of the network; ``like`` its form: of ``add_patches``, or of a "file"."""
    generator = torch.Generator().manual_seed(0)
    weights = model.model_state_dict(filter_prefix="diffusion_model.")
    changes = {
        name.removesuffix(".weight"): 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
        if weight.ndim > 1 and name.endswith(".weight")
    }
    if like == "file":
        return {f"{name}.diff": change for name, change in changes.items()}
    return {f"{name}.weight": ("diff", (change,)) for name, change in changes.items()}


def rescaled(model: Any) -> Any:
    return stock_node("nodes_model_advanced", "RescaleCFG", model=model, multiplier=0.7)


def with_a_lora(model: Any) -> Any:
    """One that is loaded for the whole run."""
    patched = model.clone()
    patched.add_patches(random_lora(model, "add_patches"), 0.7)
    return patched


@pytest.mark.parametrize("patch", [rescaled, with_a_lora])
def test_patched_models(patch, dode):
    subject = dode.demo(side=SIDE)
    assert_faithful(dode, replace(subject, model=patch(subject.model)), subject.positive, dode.prompt(5))


def hook(subject: Subject, strength: float = 1.0, later: float | None = None) -> Any:
    """A LoRA that is on for the prompt that it is set on; of strength ``later`` from 40 % of the run on."""
    import comfy.hooks

    group = comfy.hooks.create_hook_lora(random_lora(subject.model, "file"), strength, 0.0)
    if later is not None:
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0, guarantee_steps=1))
        frames.add(comfy.hooks.HookKeyframe(strength=later, start_percent=0.4))
        group.set_keyframes_on_hooks(frames)
    return group


def hooked(positive: Conditioning, group: Any) -> Conditioning:
    import comfy.hooks

    return comfy.hooks.set_hooks_for_conditioning(positive, group)


def assert_faithful_or_refused(dode: Pack, subject: Subject, *positives: Conditioning) -> None:
    """Both are a KSampler's, or an error that names the hooks comes before the first evaluation."""
    refusal = None
    try:
        assert_faithful(dode, subject, *positives)
    except dode.library.DodeError as error:
        refusal = str(error).lower()
    assert refusal is None or ("hook" in refusal and not subject.calls)


def test_a_hook_on_the_only_prompt(dode):
    subject = dode.demo(side=SIDE)
    assert_faithful_or_refused(dode, subject, hooked(subject.positive, hook(subject)))


def test_one_hook_on_both_prompts(dode):
    subject = dode.demo(side=SIDE)
    both = hook(subject)
    assert_faithful_or_refused(dode, subject, hooked(subject.positive, both), hooked(dode.prompt(5), both))


def test_a_hook_on_one_prompt_of_two(dode):
    subject = dode.demo(side=SIDE)
    assert_faithful_or_refused(dode, subject, hooked(subject.positive, hook(subject)), dode.prompt(5))


def test_another_hook_on_each_prompt(dode):
    subject = dode.demo(side=SIDE)
    one, two = hooked(subject.positive, hook(subject)), hooked(dode.prompt(5), hook(subject, -1.0))
    assert_faithful_or_refused(dode, subject, one, two)


def test_a_hook_whose_strength_changes_during_the_run(dode):
    subject = dode.demo(side=SIDE)
    assert_faithful_or_refused(dode, subject, hooked(subject.positive, hook(subject, later=0.2)))


def test_a_changing_hook_where_memory_runs_out(dode):
    """An evaluation that is made in parts counts once."""
    subject = dode.demo(side=SIDE)
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

    prompts = hooked(subject.positive, hook(subject, later=0.2)), dode.prompt(5)
    stock, teacher = distances(LittleMemory(), subject, *prompts)
    assert stock < TOLERANCE
    assert teacher < TOLERANCE
