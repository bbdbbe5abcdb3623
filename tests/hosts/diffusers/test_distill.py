"""Distilling in real pipelines: what a sampler gets there is what the pipeline's own run gives."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
import threading
from dataclasses import replace
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from dode_nodes import DodeError, LambdaTable, Progress, Recipe, Teacher
from dode_nodes.errors import NotFinite
from dode_nodes.fit.latents import Latents
from dode_nodes.fit.quality import QUALITIES
from dode_nodes.fit.runs import Run
from dode_nodes.hosts.diffusers import Distillation, DODEScheduler, Request, check_pipeline, distill_pipeline
from dode_nodes.hosts.diffusers.driven import DrivenPipeline, look
from dode_nodes.hosts.diffusers.host_schedule import HostSchedule
from dode_nodes.hosts.diffusers.prompts import Prompt, arguments_of
from dode_nodes.sampling.solvers import Sampler, resolve
from tests.hosts.diffusers.tiny_pipelines import (
    CFG,
    SIZE,
    call,
    controlled,
    error,
    noise,
    plain_euler,
    prompt_of,
    size_of,
    with_words,
)

QUICK = Recipe(predictions=["noise"], teacher=Teacher("dpmpp_2m", 2))
PICTURE = torch.linspace(0, 1, 3 * SIZE * SIZE).reshape(1, 3, SIZE, SIZE)


def distilled(pipe: Any, steps: int = 3, **how: Any) -> LambdaTable:
    given = {"recipe": QUICK, "latents": 2, "prompts": [prompt_of(pipe)], **size_of(pipe)} | how
    return distill_pipeline(pipe, steps=[steps], cfg=CFG, **given)


def driven(
    pipe: Any,
    sigmas: torch.Tensor,
    batch: int = 2,
    solver: str | Sampler = "euler",
    arguments: dict[str, Any] | None = None,
    **more: Any,
) -> torch.Tensor:
    """Euler by the library, in the pipeline, from the noise that ``call`` begins with."""
    arguments = arguments or arguments_of(pipe, prompt_of(pipe), None, CFG, size_of(pipe) | more)
    host, latent = HostSchedule(pipe.scheduler.config), look(pipe, arguments)
    group = DrivenPipeline(pipe, arguments, latent, flow=host.flow).group(
        noise(pipe, batch), host.init_noise_sigma(float(sigmas[0]))
    )
    (only,) = Latents([group]).batches()
    return Run(resolve(solver), sigmas)(group.model, only).reshape(batch, *latent.shape)


def twice(prompt: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([value, value]) for name, value in prompt.items()}


@pytest.mark.parametrize("name", ["sd", "sd, v", "sdxl", "sd3", "flux", "wan"])
def test_euler_in_the_pipeline_is_the_pipelines_euler(pipeline, name):
    pipe = pipeline(name)
    pipe.scheduler = plain_euler(pipe)
    expected = call(pipe, 5, **twice(prompt_of(pipe)))
    got = driven(pipe, pipe.scheduler.sigmas)
    assert error(got, expected) < 8e-6


def test_with_a_lora_and_a_controlnet(pipeline):
    pipe = controlled(pipeline("sd"))
    pipe.scheduler = plain_euler(pipe)
    plain = call(pipe, 5, **twice(prompt_of(pipe)), image=PICTURE, controlnet_conditioning_scale=0.0)
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    expected = call(pipe, 5, **twice(prompt_of(pipe)), image=PICTURE)
    assert not torch.allclose(plain, expected, rtol=1e-2)
    got = driven(pipe, pipe.scheduler.sigmas, image=PICTURE)
    assert error(got, expected) < 8e-6


class Counting(diffusers.StableDiffusionPipeline):
    """Counts its calls."""

    calls: list[str] = []  # noqa: RUF012

    def check_inputs(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("run")

    @functools.wraps(diffusers.StableDiffusionPipeline.encode_prompt)
    def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        if prompt is not None:
            self.calls.append(f"encode {prompt}")
        return super().encode_prompt(prompt, *args, **kwargs)


def test_every_run_of_a_sampler_is_one_call_and_prompts_are_encoded_once(pipeline):
    pipe = Counting(**pipeline("sd with words").components, requires_safety_checker=False)
    Counting.calls = []
    arguments = arguments_of(pipe, "a cat", "dog", CFG, size_of(pipe))
    assert Counting.calls == ["encode a cat"]
    assert set(arguments) == {"prompt_embeds", "negative_prompt_embeds", "guidance_scale", "height", "width"}
    latent = look(pipe, arguments)
    group = DrivenPipeline(pipe, arguments, latent, flow=False).group(noise(pipe, 3), 14.6)
    batches = Latents([group], micro_batch=2).batches()
    Counting.calls = []
    sigmas = torch.linspace(10, 0, 16)
    for batch in batches:
        Run(resolve("euler"), sigmas)(group.model, batch)
    assert Counting.calls == ["run", "run"]

    Counting.calls = []
    with pytest.raises(Stop):
        distilled(pipe, prompts=["a cat", "a dog"], latents=3, negative_prompt="cat", reporter=Watching(50))
    assert Counting.calls.count("run") > 10
    assert [each for each in Counting.calls if each != "run"] == ["encode a cat", "encode a dog"]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_a_text_is_encoded_as_the_pipeline_does_it(name):
    pipe = with_words(name)
    how = size_of(pipe) | {"latents": noise(pipe, 1), "output_type": "latent", "num_inference_steps": 2}
    negative = None if name == "flux" else "a dog"
    text = {"prompt": "a cat"} | ({} if negative is None else {"negative_prompt": negative})
    arguments = arguments_of(pipe, "a cat", negative, CFG, {})
    assert "prompt" not in arguments
    expected = pipe(**text, **how, guidance_scale=CFG, return_dict=False)[0]
    assert error(pipe(**arguments, **how, return_dict=False)[0], expected) < 1e-5
    other = pipe(**text | {"prompt": "a dog"}, **how, guidance_scale=CFG, return_dict=False)[0]
    assert error(other, expected) > 1e-3


def test_prompts_for_two_encoders_are_left_to_the_pipeline():
    pipe = with_words("sdxl")
    arguments = arguments_of(pipe, "a cat", None, CFG, size_of(pipe) | {"prompt_2": "a dog"})
    assert arguments == {"guidance_scale": CFG, "prompt": "a cat", "prompt_2": "a dog"} | size_of(pipe)
    how = {"latents": noise(pipe, 1), "output_type": "latent", "num_inference_steps": 2}
    assert pipe(**arguments, **how).images.isfinite().all()


def test_a_pipeline_that_encodes_in_a_way_of_its_own_gets_the_text(pipeline):
    pipe = pipeline("sd with words")

    class Own(diffusers.DiffusionPipeline):
        def __init__(self, **components):
            super().__init__()
            self.register_modules(**components)

        def __call__(self, prompt=None, negative_prompt=None, guidance_scale=1.0, latents=None):
            """Of no embeddings."""

    own = Own(**pipe.components)
    assert arguments_of(own, "a cat", "dog", CFG, {}) == {
        "guidance_scale": CFG, "prompt": "a cat", "negative_prompt": "dog",
    }  # fmt: skip
    Own.__call__ = lambda self, prompt=None: None
    with pytest.raises(DodeError, match="Own takes none"):
        arguments_of(own, "a cat", "dog", CFG, {})


def test_a_text_at_every_call_is_the_same_as_its_embeddings(pipeline):
    pipe = pipeline("sd with words")
    sigmas = torch.tensor([10.0, 3.0, 0.5, 0.0])

    def ends(prompt: Prompt, negative: str | None = None) -> torch.Tensor:
        return driven(
            pipe, sigmas, batch=3, arguments=arguments_of(pipe, prompt, negative, CFG, size_of(pipe))
        )

    encoded, as_text = ends("a cat", "a dog"), ends({"prompt": "a cat", "negative_prompt": "a dog"})
    assert error(as_text, encoded) < 1e-5
    assert error(ends({"prompt": "a cat", "negative_prompt": "cat"}), encoded) > 1e-3


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_every_row_of_a_table_runs_in_its_pipeline(pipeline, name):
    pipe = pipeline(name)
    scheduler = pipe.scheduler
    refined = Recipe(predictions=["noise"], teacher=Teacher("dpmpp_2m", 2), refine_budget=float("inf"))
    table = distilled(pipe, steps=2, latents=3, recipe=refined, schedule="simple")
    greedy, best = table.rows
    if name == "flux":  # whose schedule is shifted as the size has it
        call(pipe, 2)
        assert greedy.sigmas == pytest.approx(pipe.scheduler.sigmas.numpy(), rel=1e-3)
    assert pipe.scheduler is scheduler
    assert best.errors.dode[0] < greedy.errors.dode[0]
    tried = [stage["stage"] for stage in best.report["refined"]["stages"]]
    assert any("first step free" in each for each in tried) == (name == "sd")
    assert any("in bands" in each for each in tried) == (name == "sd")
    assert table.model["prediction_type"] == ("eps" if name == "sd" else "flow")
    assert best.settings["cfg"] == CFG
    assert best.settings["host"] == "diffusers"
    assert check_pipeline(table, pipe) == []
    for row in table.rows:
        pipe.scheduler = DODEScheduler.from_table(LambdaTable([row]), scheduler.config, strict=True)
        assert call(pipe, 2).isfinite().all()


def test_what_a_row_promises_its_pipeline_keeps(pipeline):
    """The held-out error, found again by runs of the pipeline itself."""
    pipe = pipeline("sd3")
    (row,) = distilled(
        pipe, steps=4, latents=4, recipe=Recipe(predictions=["noise"], teacher=Teacher("euler", 8))
    ).rows
    begun = torch.randn(4, *noise(pipe).shape[1:], generator=torch.Generator().manual_seed(0))[3:]
    how = {"latents": begun} | prompt_of(pipe)
    pipe.scheduler = DODEScheduler.from_table(LambdaTable([row]), pipe.scheduler.config)
    got = call(pipe, 4, **how)
    grid = np.concatenate(
        [np.linspace(a, b, 8, endpoint=False) for a, b in zip(row.sigmas, row.sigmas[1:], strict=False)]
    )
    plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.scheduler = plain
    teacher = call(pipe, len(grid), **how, sigmas=grid.tolist())
    assert float((got - teacher).square().mean().sqrt()) == pytest.approx(row.errors.dode[0], rel=1e-3)
    assert row.errors.dode[0] < row.errors.stock


def test_an_offloaded_network(pipeline):
    table = distilled(pipeline("sd3"))
    pipe = pipeline("sd3")
    for name in ("transformer", "vae"):
        network = copy.deepcopy(getattr(pipe, name))
        setattr(pipe, name, accelerate.cpu_offload(network, torch.device("cpu")))
    assert next(pipe.transformer.parameters()).is_meta
    assert distilled(pipe, redo=True) == table


def test_a_sampler_may_write_into_what_it_gets_whatever_mode_torch_is_in(pipeline):
    def euler_in_place(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma, following in itertools.pairwise(sigmas):
            denoised = model(x, sigma.expand(len(x)), **extra_args)
            x = denoised.sub_(x).mul_(1 - following / sigma).add_(x)
        return x

    pipe = pipeline("sd3")
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])
    expected = driven(pipe, sigmas)
    with torch.inference_mode():
        assert error(driven(pipe, sigmas, solver=euler_in_place), expected) < 1e-5


def test_a_scheduler_with_a_table_does_not_matter(pipeline):
    pipe = pipeline("sd3")
    table = distilled(pipe)
    pipe.scheduler = DODEScheduler.from_table(table, pipe.scheduler.config)
    assert is_known(pipe)


def test_a_quality_means_what_it_means_in_the_node(pipeline):
    pipe = pipeline("sd3")
    for name, quality in QUALITIES.items():
        request = Request([prompt_of(pipe)], [3, 4], CFG, quality=name, call=size_of(pipe))
        assert request.count == quality.latents
        assert request.wanted.refine_budget == quality.refine_budget
        assert ("refining" in Distillation(pipe, request).remarks[0]) == (name != "quick")
    with pytest.raises(DodeError, match="quality must be one of quick, good, best"):
        distilled(pipe, quality="great", recipe=None)


class Stop(BaseException):
    """A user's."""


class Watching:
    """Is told, and stops the work after so many evaluations."""

    def __init__(self, most: float = math.inf) -> None:
        self.most, self.lines, self.done = most, [], 0

    def begin(self, *lines: str) -> None:
        self.lines += lines

    def __call__(self, progress: Progress) -> None:
        self.done = progress.done
        if progress.done >= self.most:
            raise Stop


def test_it_tells_its_cost_first_and_keeps_what_it_has_when_it_is_stopped(pipeline):
    pipe = pipeline("sd3")
    refined = Recipe(predictions=["noise"], teacher=Teacher("dpmpp_2m", 2), refine_budget=float("inf"))
    request = Request([prompt_of(pipe)], [2], CFG, latents=2, recipe=refined, call=size_of(pipe))
    watching = Watching(80)
    distillation = Distillation(pipe, request, watching)
    threads = threading.active_count()
    with pytest.raises(Stop):
        distillation.run()
    assert watching.lines == distillation.remarks
    assert watching.lines[0].startswith("at most ")
    assert watching.done == 80
    assert threading.active_count() == threads
    assert distillation.table().rows[0].origin.kind == "distilled"

    whole = Watching()
    table = Distillation(pipe, request, whole).run()
    assert whole.lines[1] == "this was stopped before: it goes on from there, and needs less than that"
    assert whole.done < cost_of(distillation) - 60
    again = Watching()
    assert Distillation(pipe, request, again).run() == table
    assert again.lines == ["this was fitted before, and the same table is used. To fit it again, set redo"]
    assert again.done == 0
    with pytest.raises(Stop):
        Distillation(pipe, replace(request, redo=True), Watching(0)).run()


def cost_of(distillation: Distillation) -> int:
    """At most, of the fit."""
    (evaluations,) = re.findall(r"at most (\d+)", distillation.remarks[0])
    return int(evaluations)


def is_known(pipe: Any, **how: Any) -> bool:
    """Whether that fit is not made again."""
    try:
        distilled(pipe, reporter=Watching(0), **how)
    except Stop:
        return False
    return True


ASKED_OTHERWISE = {
    "noises": {"seed": 1}, "more noises": {"latents": 3}, "steps": {"steps": 2}, "size": {"height": 16},
    "recipe": {"recipe": replace(QUICK, or_stock=True)}, "schedule": {"schedule": "normal"},
    "a call's argument": {"clip_skip": 1},
}  # fmt: skip


def with_hook(pipe: Any) -> None:
    pipe.transformer.register_forward_hook(lambda *of: (of[-1][0] * 1.001,))


def with_lora(pipe: Any) -> None:
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def moved(pipe: Any) -> None:
    pipe.transformer.proj_out.bias.data[3] += 1e-3


def with_another_shift(pipe: Any) -> None:
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)


def test_a_fit_is_known_by_all_that_it_depends_on(pipeline):
    pipe = pipeline("sd3")
    prompt = prompt_of(pipe)
    distilled(pipe)
    assert is_known(pipe)
    assert is_known(pipe, micro_batch=1)
    for what, how in ASKED_OTHERWISE.items():
        assert not is_known(pipe, **how), what
    assert not is_known(pipe, prompts=[prompt | {"prompt_embeds": prompt["prompt_embeds"] * 1.01}])
    for change in (with_hook, with_lora, moved, with_another_shift):
        other = pipeline("sd3")
        other.transformer = copy.deepcopy(pipe.transformer)
        assert is_known(other)
        change(other)
        assert not is_known(other), change
    pipe.scheduler = type(pipe.scheduler).from_config(
        dict(pipe.scheduler.config)
    )  # notes its defaults otherwise
    assert is_known(pipe)


def test_what_cannot_be_compared_is_said_and_fitted_each_time(pipeline):
    """A picture can; an object of the user's cannot."""
    pipe = controlled(pipeline("sd"))
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    told = Watching()
    assert np.abs(distilled(pipe, image=picture, reporter=told).rows[0].weights).max() > 1e-3
    assert is_known(pipe, image=picture.copy())
    assert not is_known(pipe, image=Image.new("RGB", (SIZE, SIZE), "black"))
    own = {"joint_attention_kwargs": {"own": object()}}
    distilled(pipeline("sd3"), reporter=told, **own)
    assert told.lines[-1].startswith("this fit will not be recognised another time, because of object")
    assert not is_known(pipeline("sd3"), **own)


def failing(pipe: Any, error: Exception, most: int = 0) -> Any:
    """The same, with a network that fails on more than so many latents."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    network = copy.copy(getattr(pipe, name))

    class Failing(type(network)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            if len(x) > 2 * most:  # guidance doubles them
                raise error
            return super().forward(*args, **kwargs)

    network.__class__ = Failing
    setattr(pipe, name, network)
    return pipe


def test_where_memory_runs_out_it_goes_on_with_fewer_latents(pipeline):
    expected = distilled(pipeline("sd3"))
    short = failing(pipeline("sd3"), torch.OutOfMemoryError("out of memory"), most=1)
    got = distilled(short, redo=True)
    np.testing.assert_allclose(got.rows[0].weights, expected.rows[0].weights, atol=1e-4)


def test_what_fails_in_the_network_ends_it(pipeline):
    with pytest.raises(ZeroDivisionError, match="in the network"):
        distilled(failing(pipeline("sd3"), ZeroDivisionError("in the network")))
    pipe = pipeline("sd3")
    pipe.transformer = copy.deepcopy(pipe.transformer)
    pipe.transformer.proj_out.bias.data.fill_(torch.nan)
    with pytest.raises(NotFinite):
        distilled(pipe)


@pytest.mark.parametrize(("how", "why"), [
    ({"prompts": []}, "0 prompts need at least 2 latents"),
    ({"latents": 1}, "1 prompts need at least 2 latents, not 1"),
    ({"generator": None}, "leave out generator"),
    ({"control_guidance_end": 0.5}, "leave out control_guidance_end"),
    ({"invented": 1}, "StableDiffusionPipeline does not take invented"),
    ({"recipe": Recipe(solvers=[resolve("euler")])}, "name the solvers"),
    ({"schedule": "ddim_uniform", "steps": 6}, "makes 7 steps of 6"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_evaluation(pipeline, how, why):
    pipe = failing(pipeline("sd"), ZeroDivisionError("the network was evaluated"))
    with pytest.raises(DodeError, match=why):
        distilled(pipe, **how)


@pytest.mark.parametrize("name", ["sd img2img", "sd inpaint"])
def test_a_pipeline_that_begins_with_a_picture_is_refused(pipeline, name):
    with pytest.raises(DodeError, match="distil in the text-to-image pipeline"):
        distill_pipeline(pipeline(name), ["a cat"], [4], CFG)
