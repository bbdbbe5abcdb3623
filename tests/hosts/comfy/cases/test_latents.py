"""Latents and pictures of other kinds than an image's, and pictures that cannot be made."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts.comfy.cases.fidelity import schedule_of
from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Subject, ksampler, mixture, rms, small
from tests.hosts.comfy.node_calls import names_in, saved_as

pytestmark = pytest.mark.comfyui

# --- an empty latent that says its pixel ratio


@pytest.fixture
def ratio_is_heeded(comfyui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ComfyUI does since January 2026, where this one does not yet: see its ``fix_empty_latent_channels``."""
    import comfy.sample
    import nodes

    of_this_comfyui = comfy.sample.fix_empty_latent_channels
    if "downscale_ratio_spacial" in inspect.signature(of_this_comfyui).parameters:
        return

    def fix(
        model: Any,
        latent: Tensor,
        downscale_ratio_spacial: float | None = None,
        downscale_ratio_temporal: float | None = None,
    ) -> Tensor:
        fixed = of_this_comfyui(model, latent)
        ratio = model.get_model_object("latent_format").spacial_downscale_ratio
        if downscale_ratio_spacial is None or torch.count_nonzero(fixed):
            return fixed
        sides = [round(side * downscale_ratio_spacial / ratio) for side in fixed.shape[-2:]]
        return fixed.new_zeros(*fixed.shape[:-2], *sides)

    sample = nodes.common_ksampler

    def sample_fixed(model: Any, *args: Any, latent: dict[str, Any], **kwargs: Any) -> Any:
        rest = {key: value for key, value in latent.items() if key != "downscale_ratio_spacial"}
        samples = fix(model, latent["samples"], latent.get("downscale_ratio_spacial"))
        return sample(model, *args, latent=rest | {"samples": samples}, **kwargs)

    monkeypatch.setattr(comfy.sample, "fix_empty_latent_channels", fix)
    monkeypatch.setattr(nodes, "common_ksampler", sample_fixed)


NODES: list[Callable[[Pack, Subject, Any, dict[str, Any]], dict[str, Any]]] = [
    lambda dode, subject, table, latent: dode.distil(subject, latent=latent)["stock"],
    lambda dode, subject, table, latent: dode.ksampler(subject, table, latent),
    lambda dode, subject, table, latent: dode.compare(subject, table, latent=latent)["stock"],
]


@pytest.mark.parametrize("node", NODES, ids=["distill", "ksampler", "compare"])
def test_an_empty_latent_is_brought_to_the_models_ratio(node, ratio_is_heeded, dode):
    """128×128 pixels, for a model of 16 pixels per number."""
    subject = mixture("FLOW", 16, (1, 16, 8, 8), spacial_downscale_ratio=16)
    table = dode.distil(subject)["table"]
    latent = {"samples": torch.zeros(1, 4, 16, 16), "downscale_ratio_spacial": 8}
    assert ksampler(subject, latent).shape == (1, 16, 8, 8)
    made = node(dode, subject, table, latent)
    assert made["samples"].shape[1:] == (16, 8, 8)
    assert "downscale_ratio_spacial" not in made


# --- sound


class AudioVae:
    """Decodes to waveforms, ``[B, samples, channels]``, as ComfyUI's audio VAEs do."""

    def decode(self, samples: Tensor) -> Tensor:
        return torch.rand(len(samples), 40, 2)


def test_a_waveform_is_not_drawn(dode_with_pictures):
    """Compare gives its numbers, and the page that it gives without a VAE."""
    dode = dode_with_pictures
    subject = mixture("FLOW", 8, (1, 8, 40))
    table = dode.distil(subject)["table"]
    plain, heard = (dode.compare(subject, table, vae=vae) for vae in (None, AudioVae()))
    assert heard["numbers"] == plain["numbers"]
    assert max(heard["grid"].shape) <= 2 * max(plain["grid"].shape)


class Together:
    """Sound and pictures in one latent, as ``comfy.nested_tensor.NestedTensor`` of newer ComfyUIs."""

    is_nested = True

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def unbind(self) -> list[Tensor]:
        return self.tensors


def together(pictures: Tensor, sound: Tensor) -> Any:
    """One latent of both."""
    try:
        from comfy.nested_tensor import NestedTensor
    except ImportError:
        return Together([pictures, sound])
    return NestedTensor([pictures, sound])


@pytest.fixture
def with_sound(dode: Pack) -> Subject:
    """A model of both, and a latent of both; refused in words by a ComfyUI that does not know such latents."""
    import comfy.utils

    subject = mixture("FLOW", 4, (1, 4, 4, 6))
    both = replace(subject, latent={"samples": together(torch.zeros(1, 4, 4, 6), torch.zeros(1, 2, 10))})
    if not hasattr(comfy.utils, "pack_latents"):
        for refused in (lambda: dode.distil(both), lambda: dode.compare(both, dode.distil(subject)["table"])):
            with pytest.raises(dode.library.DodeError, match="update ComfyUI"):
                refused()
        pytest.skip("this ComfyUI has no latents of several streams")
    return both


def test_sound_and_pictures_together_are_sampled_as_by_ksampler(with_sound, dode):
    sigmas = schedule_of(with_sound, with_sound.scheduler, 5)  # the user's own: the stock latents are Euler's
    made = dode.distil(with_sound, sigmas=sigmas, seed=1, latents=8)
    for i, mine in enumerate(zip(*(stream for stream in made["stock"]["samples"].unbind()), strict=True)):
        assert [tuple(stream.shape) for stream in mine] == [(4, 4, 6), (2, 10)], i
    every = ksampler(with_sound, with_sound.latent | {"batch_index": list(range(8))}, seed=1)
    for stream, theirs in zip(made["stock"]["samples"].unbind(), every.unbind(), strict=True):
        assert max(min(rms(mine, their) for their in theirs) for mine in stream) < 1e-5

    table = made["table"]
    by_dode = dode.ksampler(with_sound, table)["samples"].unbind()
    applied = replace(with_sound, model=dode.apply(with_sound.model, table))
    for mine, theirs in zip(by_dode, ksampler(applied).unbind(), strict=True):
        assert rms(mine, theirs) < 1e-5
    compared = dode.compare(with_sound, table)
    assert [tuple(stream.shape) for stream in compared["d-ode"]["samples"].unbind()] == [
        (2, 4, 4, 6),
        (2, 2, 10),
    ]


def test_pictures_with_sound_are_drawn_without_it(with_sound, dode_with_pictures):
    dode = dode_with_pictures
    decoded = []

    class Vae:
        def decode(self, samples: Tensor) -> Tensor:
            decoded.append(tuple(samples.shape))
            return torch.rand(len(samples), 8, 8, 3)

    dode.compare(with_sound, dode.distil(with_sound)["table"], vae=Vae())
    assert decoded == [(2, 4, 4, 6)] * 3


# --- a batch that is the frames of one video


def test_a_motion_model_makes_one_video_of_a_batch(dode):
    """As AnimateDiff-Evolved attaches them. Tables of the model without it go on working with it."""
    subject, table = dode.demo(), dode.shipped("eps")
    moving = replace(subject, model=subject.model.clone())
    moving.model.set_additional_models("ADE", [subject.model])
    for refused in (lambda: dode.distil(moving), lambda: dode.compare(moving, table)):
        with pytest.raises(dode.library.DodeError, match="the frames of one video"):
            refused()
    assert not subject.calls
    sampled = dode.ksampler(moving, table)["samples"]
    assert rms(sampled, dode.ksampler(subject, table)["samples"]) < 1e-5


# --- memory that runs out


def with_memory_for(subject: Subject, latents: int) -> Subject:
    """A model that runs out of memory with more at a time, each of them with both prompts."""
    evaluate = subject.model.model._apply_model

    def limited(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) > 2 * latents:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return evaluate(x, *args, **kwargs)

    subject.model.model._apply_model = limited
    return subject


SMALL = {"latents": 8, "steps": "4", "scale": 3}


def test_distilling_goes_on_in_halves(dode, said, tables):
    whole = dode.distil(small(), save_name="whole", **SMALL)
    assert not said()
    subject = with_memory_for(small(), 3)
    halved = dode.distil(subject, save_name="halved", redo=True, **SMALL)
    (one,), (other,) = (made["table"].rows for made in (whole, halved))
    assert other.weights == pytest.approx(one.weights, rel=1e-4, abs=1e-4)
    for name in ("teacher", "d-ode", "stock"):
        assert rms(halved[name]["samples"], whole[name]["samples"]) < 1e-5
    assert said() == (
        f"D-ODE: saved as {saved_as('halved', tables).name}; memory ran out: latents were evaluated 2 at a time. "
        "Set micro_batch to 2 next time"
    )


def test_comparing_goes_on_in_halves(dode, said):
    table = dode.shipped("eps")
    whole = dode.compare(dode.demo(), table, pictures=3, steps=6)
    halved = dode.compare(with_memory_for(dode.demo(), 2), table, pictures=3, steps=6)
    assert halved["numbers"] == whole["numbers"]
    for name in ("teacher", "d-ode", "stock"):
        assert rms(halved[name]["samples"], whole[name]["samples"]) < 1e-5
    assert said() == "D-ODE: memory ran out: latents were evaluated 2 at a time"


def test_a_latent_that_does_not_fit_alone_is_an_error_of_ours(dode):
    for run in (lambda s: dode.distil(s, **SMALL), lambda s: dode.compare(s, dode.shipped("eps"), steps=6)):
        with pytest.raises(dode.library.DodeError, match="make the latent smaller"):
            run(with_memory_for(dode.demo(), 0))


def test_rows_found_before_memory_ran_out_are_kept(dode, tables):
    subject = small()
    evaluate, evaluated = subject.model.model._apply_model, []

    def fills_up(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        evaluated.append(len(x))
        if len(evaluated) > 30:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return evaluate(x, *args, **kwargs)

    subject.model.model._apply_model = fills_up
    with pytest.raises(dode.library.DodeError, match="make the latent smaller"):
        dode.distil(subject, **SMALL | {"steps": "2, 3", "latents": 2, "scale": 1})
    assert [name for name in names_in(tables) if not name.endswith(".dode-work")] == ["table-partial"]


# --- pictures that cannot be made


def assert_numbers(compared: dict[str, Any]) -> None:
    """Both distances to the teacher are there, in words and as latents."""
    stock, dode, teacher = (compared[name]["samples"] for name in ("stock", "d-ode", "teacher"))
    assert f"{rms(stock, teacher):.4f}" in compared["numbers"]
    assert f"{rms(dode, teacher):.4f}" in compared["numbers"]


class FullVae:
    """Runs out of memory."""

    def decode(self, samples: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")


def test_numbers_outlive_a_decode_that_runs_out_of_memory(dode_with_pictures):
    dode = dode_with_pictures
    subject = dode.demo()
    assert_numbers(dode.compare(subject, dode.shipped("eps"), vae=FullVae()))


def test_cancel_while_decoding_is_heard(dode_with_pictures):
    import comfy.model_management

    class Cancelled:
        def decode(self, samples: Tensor) -> Tensor:
            raise comfy.model_management.InterruptProcessingException

    dode = dode_with_pictures
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        dode.compare(dode.demo(), dode.shipped("eps"), vae=Cancelled())


@pytest.fixture(
    params=["AttributeError('_ARRAY_API not found')", "RuntimeError('numpy')", "ImportError('numpy')"]
)
def broken_matplotlib(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that is made for another numpy, and fails as it is imported; what with."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text(f"raise {request.param}\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return request.param


@pytest.mark.usefixtures("broken_matplotlib")
@pytest.mark.slow_host
def test_a_broken_matplotlib_costs_distill_its_picture_only(dode_with_pictures, tables):
    dode = dode_with_pictures
    made = dode.distil(dode.demo(), steps="2", scale=2, latents=2)
    assert dode.library.LambdaTable.load(saved_as("table", tables)) == made["table"]
    assert made["report"].ndim == 4
    assert "euler" in made["summary"]


@pytest.mark.usefixtures("broken_matplotlib")
@pytest.mark.slow_host
def test_a_broken_matplotlib_costs_compare_its_picture_only(dode_with_pictures):
    dode = dode_with_pictures
    vae = dode.run("DODE_DemoModel", kind="eps", digit=3)["vae"]
    assert_numbers(dode.compare(dode.demo(), dode.shipped("eps"), vae=vae))


@pytest.mark.usefixtures("broken_matplotlib")
@pytest.mark.slow_host
def test_a_broken_matplotlib_costs_inspect_its_picture_only(dode_with_pictures):
    dode = dode_with_pictures
    assert "euler" in dode.run("DODE_InspectLambdas", table=dode.shipped("eps"))["summary"]


@pytest.mark.usefixtures("broken_matplotlib")
def test_sampling_does_not_need_matplotlib(dode_with_pictures):
    dode = dode_with_pictures
    assert dode.ksampler(dode.demo(), dode.shipped("eps"))["samples"].isfinite().all()
