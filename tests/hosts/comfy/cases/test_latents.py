"""Latents and pictures of other kinds than an image's, and pictures that cannot be made."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Subject, ksampler, mixture, rms

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


def test_sound_and_pictures_together_are_refused_in_words_or_distilled(dode):
    try:
        from comfy.nested_tensor import NestedTensor
    except ImportError:
        NestedTensor = Together
    subject = dode.demo()
    together = NestedTensor([torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 40)])
    try:
        made = dode.distil(subject, latent={"samples": together})
    except dode.library.DodeError:
        assert not subject.calls
    else:
        assert made["table"].rows


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
def test_a_broken_matplotlib_costs_distill_its_picture_only(dode_with_pictures, tables):
    dode = dode_with_pictures
    made = dode.distil(dode.demo(), steps="2", scale=2, latents=2)
    assert dode.library.LambdaTable.load(tables / "table.safetensors") == made["table"]
    assert made["report"].ndim == 4
    assert "euler" in made["summary"]


@pytest.mark.usefixtures("broken_matplotlib")
def test_a_broken_matplotlib_costs_compare_its_picture_only(dode_with_pictures):
    dode = dode_with_pictures
    vae = dode.run("DODE_DemoModel", kind="eps", digit=3)["vae"]
    assert_numbers(dode.compare(dode.demo(), dode.shipped("eps"), vae=vae))


@pytest.mark.usefixtures("broken_matplotlib")
def test_a_broken_matplotlib_costs_inspect_its_picture_only(dode_with_pictures):
    dode = dode_with_pictures
    assert "euler" in dode.run("DODE_InspectLambdas", table=dode.shipped("eps"))["summary"]


@pytest.mark.usefixtures("broken_matplotlib")
def test_sampling_does_not_need_matplotlib(dode_with_pictures):
    dode = dode_with_pictures
    assert dode.ksampler(dode.demo(), dode.shipped("eps"))["samples"].isfinite().all()
