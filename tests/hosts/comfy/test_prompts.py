"""A guider's network as the fits ask it: from the middle of a run as from its beginning, in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dode_nodes import Latents
from dode_nodes.fit.runs import Recording, Run
from dode_nodes.fit.student import Student
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.solvers import resolve
from tests.hosts.comfy.cases import subjects
from tests.hosts.comfy.cases.fidelity import SEED, sampled, schedule_of
from tests.hosts.comfy.cases.hooks import LATE, hook, hooked
from tests.hosts.comfy.cases.subjects import Subject, ksampler

pytestmark = pytest.mark.comfyui

COUNT = 3


@pytest.fixture
def demo(pack) -> Subject:
    """The embedded EPS model, on a small latent."""
    from dode_nodes.hosts.comfy.digits import class_conditioning, demo_patcher, unconditional

    model, latent = demo_patcher("eps"), subjects.empty(4)
    return Subject(model, class_conditioning(3), unconditional(), latent, "karras", subjects.watch(model))


def _latents(subject: Subject, sigmas: torch.Tensor, micro_batch: int = COUNT) -> Latents:
    import comfy.sample

    from dode_nodes.hosts.comfy.guiders import cfg_guider
    from dode_nodes.hosts.comfy.prompts import GuidedModel

    guider = cfg_guider(subject.model, subject.positive, subject.negative, 2.0)
    empty = subject.latent["samples"].repeat(COUNT, 1, 1, 1)
    noise = comfy.sample.prepare_noise(empty, SEED, list(range(COUNT)))
    model = GuidedModel(guider, noise, SEED, empty[:1], micro_batch)
    return Latents([model.group(sigmas)], micro_batch)


def _guider(kind: str, subject: Subject) -> Any:
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG

    positive, negative, model = subject.positive, subject.negative, subject.model
    if kind == "basic":
        guider = Guider_Basic(model)
        guider.set_conds(positive)
        return guider
    if kind == "dual":
        guider = Guider_DualCFG(model)
        guider.set_conds(positive, positive, negative)
        return guider
    if kind == "kept at 1":
        model = model.clone()
        model.model_options["disable_cfg1_optimization"] = True
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive * 3 if kind == "three areas" else positive, negative)
    guider.set_cfg(1.0 if "1" in kind else 2.0)
    return guider


@pytest.mark.slow_host
@pytest.mark.parametrize(
    ("kind", "each"),
    [("cfg 2", 2), ("cfg 1", 1), ("kept at 1", 2), ("three areas", 4), ("basic", 1), ("dual", 3)],
)
def test_what_is_evaluated_for_a_latent_is_counted_when_memory_is_short(demo, monkeypatch, kind, each):
    """Every conditioning of every kind, but for the negative at cfg 1, which ComfyUI leaves out."""
    import comfy.model_management

    from dode_nodes.hosts.comfy import prompts

    guider, shape = _guider(kind, demo), demo.latent["samples"].shape
    room_for = 8 * demo.model.model.memory_required(shape)
    total = (demo.model.model_size() + room_for) / prompts._MEMORY_SHARE * 1.0001
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: total)
    size = prompts.micro_batch_that_fits(guider, shape, 64)
    assert size * each <= 8 < 2 * size * each
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: 0)
    assert prompts.micro_batch_that_fits(guider, shape, 64) == 1


def _late(subject: Subject) -> Subject:
    return replace(subject, positive=hooked(subject.positive, hook(subject, frames=LATE)))


def _later_than_the_others(subject: Subject) -> Subject:
    """A prompt for what others leave free, with a hook whose steps are those in which something is free."""
    import comfy.hooks

    early = [[context, options | {"end_percent": 0.2}] for context, options in subject.positive]
    changing = hook(subject, -0.4, ((1.0, 0.05, 3), (0.1, 0.1, 0)))
    (both,) = comfy.hooks.set_default_conds_and_combine([early], [subject.negative], changing)
    return replace(subject, positive=both)


def _windows(subject: Subject) -> Subject:
    """They move from step to step."""
    return replace(subject, model=subjects.windows(subject.model, "looped_uniform"))


@pytest.mark.parametrize(
    ("change", "solver", "micro_batch"),
    [
        pytest.param(_late, "euler", COUNT, id="a hook that changes"),
        pytest.param(_late, "heun", COUNT, id="a hook that changes, two evaluations a step"),
        pytest.param(_later_than_the_others, "euler", COUNT, id="a hook for what is left"),
        pytest.param(_windows, "heun", 1, id="context windows"),
        pytest.param(_windows, "dpm_2", 1, id="context windows, σ between the schedule's"),
    ],
)
def test_a_run_from_the_middle_is_the_run_from_the_beginning(
    change: Callable[[Subject], Subject], solver: str, micro_batch: int, demo: Subject
):
    subject = change(demo)
    sigmas = schedule_of(subject, "karras", 5, solver)
    try:
        expected = sampled(subject, solver, sigmas, COUNT, alone=micro_batch == 1)
    except Exception as error:
        if "sample_sigmas" not in str(error):
            raise
        pytest.skip("context windows of this ComfyUI know no σ between the schedule's")
    queries = len(probe_student(resolve(solver), sigmas).sigmas)
    student = Student(resolve(solver), "noise", sigmas.double().numpy(), np.zeros((queries, queries)))
    latents = _latents(subject, sigmas, micro_batch)
    random = np.random.default_rng(0)
    batch = latents.batches()[-1]
    whole, outputs = student.run(batch.group.model, batch)
    theirs = expected[batch.indices]
    assert subjects.rms(subject.model.model.process_latent_out(whole), theirs) < 1e-6 * theirs.std()
    for known in random.permutation(queries + 1):
        end, _ = student.run(batch.group.model, batch, outputs[:known])
        assert subjects.rms(end, whole) < 1e-6 * whole.std(), known
    recording = Recording(Run(student.solver, sigmas), batch, "noise")
    for output in outputs:
        recording.evaluate(batch.group.model, student.corrections)
        assert subjects.rms(recording.denoised[-1], output) < 1e-6 * output.std()


def test_runs_begin_where_a_ksampler_begins(demo):
    sigmas = schedule_of(demo, "karras", 3)
    (group,) = _latents(demo, sigmas, 2).groups
    began = []

    def watch(step: int, denoised: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        began.append(x.clone())

    empty = {"samples": torch.zeros(COUNT, 4, 4, 4), "batch_index": list(range(COUNT))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latent_preview.prepare_callback", lambda *args: watch)
        ksampler(demo, empty, seed=SEED, steps=3)
    torch.testing.assert_close(group.x, began[0], rtol=0, atol=0)


def test_weights_are_loaded_once_and_room_is_made_for_a_whole_micro_batch(demo, monkeypatch):
    """For fewer latents, a GPU with little memory would take weights up that it must give back for more."""
    import comfy.model_management
    import comfy.model_patcher

    rooms, loads = [], []
    make_room, load = comfy.model_management.load_models_gpu, comfy.model_patcher.ModelPatcher.load
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda *args, **kwargs: (rooms.append(kwargs["memory_required"]), make_room(*args, **kwargs))[1],
    )
    monkeypatch.setattr(
        comfy.model_patcher.ModelPatcher,
        "load",
        lambda *args, **kwargs: (loads.append(1), load(*args, **kwargs))[1],
    )
    sigmas = schedule_of(demo, "karras", 3)
    latents = _latents(demo, sigmas, 2)
    student = Student(resolve("euler"), "noise", sigmas.double().numpy(), np.zeros((3, 3)))
    for batch in latents.batches():  # of two, and of one
        student.run(batch.group.model, batch)
    assert len(rooms) == 4
    assert len(set(rooms)) == 1
    assert len(loads) == 1
