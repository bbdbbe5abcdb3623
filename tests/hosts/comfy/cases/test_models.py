"""Models as people load them: weights that cannot be read, other number formats, frames for a batch; and samplers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import FRAMES, Subject, ksampler, video
from tests.import_comfyui import REPOSITORY

pytestmark = pytest.mark.comfyui

# --- weights that cannot be read


def like_gguf(model: Any) -> Any:
    """As ComfyUI-GGUF's layers: for a state dict they hand out tensors without values, to count memory by."""
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module._save_to_state_dict = _without_values(module)
    return model


def _without_values(module: torch.nn.Module) -> Any:
    def save(destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, weight in module._parameters.items():
            if weight is not None:
                destination[prefix + name] = torch.zeros_like(weight, device="meta")

    return save


def use_distill(dode: Pack, subject: Subject) -> None:
    table = dode.distil(subject)["table"]
    dode.ksampler(subject, table)


def use_ksampler(dode: Pack, subject: Subject) -> None:
    dode.ksampler(subject, dode.shipped("eps"))


def use_apply(dode: Pack, subject: Subject) -> None:
    ksampler(replace(subject, model=dode.apply(subject.model, dode.shipped("eps"))))


def use_compare(dode: Pack, subject: Subject) -> None:
    dode.compare(subject, dode.shipped("eps"))


def as_it_is(model: Any) -> Any:
    return model


@pytest.mark.parametrize("use", [use_distill, use_ksampler, use_apply, use_compare])
@pytest.mark.parametrize(
    "change",
    [
        as_it_is,
        like_gguf,
    ],
)
def test_a_model_whose_state_dict_has_no_values(change, use, dode, said):
    """No node fails, and the tables of the model are those of another number format of it: not remarked on."""
    subject = dode.demo()
    change(subject.model)
    use(dode, subject)
    assert not said()


def fail_to_be_read(model: Any) -> None:
    """From now on there is no state dict."""
    model.model_size()  # ComfyUI itself has read it, for this number

    def no_state_dict(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no state dict today")

    model.model.diffusion_model.state_dict = no_state_dict
    model.model.state_dict = no_state_dict


def test_a_model_that_cannot_be_looked_at_costs_no_rows(dode, tables):
    """It may be refused, but first; or the table is saved with what is known."""
    subject = dode.demo(side=4)
    fail_to_be_read(subject.model)
    ksampler(subject)
    subject.calls.clear()
    try:
        dode.distil(subject)
    except dode.library.DodeError:
        assert not subject.calls
    else:
        assert dode.library.LambdaTable.load(tables / "table.safetensors").rows


def test_the_model_is_looked_at_before_the_first_evaluation(dode, tables):
    """Whatever becomes of it meanwhile."""
    subject = dode.demo(side=4)
    evaluate = subject.model.model._apply_model

    def evaluate_and_forget(*args: Any, **kwargs: Any) -> Any:
        fail_to_be_read(subject.model)
        return evaluate(*args, **kwargs)

    subject.model.model._apply_model = evaluate_and_forget
    table = dode.distil(subject)["table"]
    dode.ksampler(dode.demo(side=4), table)
    assert dode.library.LambdaTable.load(tables / "table.safetensors") == table


# --- one checkpoint in several number formats


@pytest.fixture
def weights(checkpoint: Any) -> dict[str, torch.Tensor]:
    """The network's, as a file of it alone has them."""
    import comfy.utils

    prefix = "model.diffusion_model."
    everything = comfy.utils.load_torch_file(str(checkpoint))
    return {name.removeprefix(prefix): each for name, each in everything.items() if name.startswith(prefix)}


def load(weights: dict[str, torch.Tensor], **options: Any) -> Any:
    """As Load Diffusion Model does; ``dtype`` is its weight_dtype."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=options)


def as_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As fp8 files are made: matrices only."""
    return {name: each.to(torch.float8_e4m3fn) if each.ndim > 1 else each for name, each in weights.items()}


@pytest.fixture
def table(sd15: Subject, dode: Pack) -> Any:
    return dode.distil(sd15, steps="2", scale=2, latents=2)["table"]


@pytest.mark.parametrize(
    ("dtype", "file"),
    [
        ("float32", "fp16"),
        ("bfloat16", "fp16"),
        ("float8_e4m3fn", "fp16"),
        ("float8_e5m2", "fp16"),
        (None, "fp8"),
    ],
)
def test_a_checkpoint_is_recognised_in_every_number_format(dtype, file, table, weights, dode, said):
    """Or it is said as it is: the same model in another format."""
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    dode.apply(load(as_fp8(weights) if file == "fp8" else weights, **options), table)
    assert "another checkpoint" not in said()
    assert not said() or "number format" in said()


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_another_checkpoint_is_another_in_every_number_format(dtype, table, weights, dode, said):
    generator = torch.Generator().manual_seed(5)
    other = {
        name: each + each.std() * torch.randn(each.shape, generator=generator).to(each)
        if each.ndim > 1
        else each
        for name, each in weights.items()
    }
    dode.apply(load(other, dtype=getattr(torch, dtype)), table)
    assert "another checkpoint" in said()


# --- a batch that is the frames of one video


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 1}, {"micro_batch": 2}, {"latents": 16}], ids=str)
def test_the_frames_of_one_video_are_one_latent(changes, dode):
    """Or it is refused before the first evaluation."""
    subject = video()
    try:
        made = dode.distil(subject, **({"latents": 2, "steps": "2", "scale": 2} | changes))
    except dode.library.DodeError:
        assert not subject.calls
        return
    assert all(size % FRAMES == 0 for size in subject.calls)
    assert all(len(made[name]["samples"]) % FRAMES == 0 for name in ("stock", "d-ode", "teacher"))
    sampled = dode.ksampler(subject, made["table"], steps=2)["samples"]
    assert len(sampled) == FRAMES


# --- samplers of other packs


def sample_with_notes(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler that keeps its notes where RES4LYF's samplers do, for its own model patches to read."""
    options = extra_args["model_options"].setdefault("transformer_options", {})
    options["sample_sigmas"] = sigmas
    options["regional_conditioning_weight"] = 0.0
    for i in range(len(sigmas) - 1):
        options["row"] = i
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        x = denoised + (x - denoised) * sigmas[options["row"] + 1] / sigmas[i]
    return x


def test_a_sampler_that_keeps_notes_in_its_options_is_offered(dode, monkeypatch):
    """It is deterministic and affine; else the README says which are not, and why."""
    import comfy.k_diffusion.sampling
    import comfy.samplers

    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_notes_ode", sample_with_notes, raising=False)
    monkeypatch.setattr(comfy.samplers, "SAMPLER_NAMES", [*comfy.samplers.SAMPLER_NAMES, "notes_ode"])
    if "RES4LYF" not in (REPOSITORY / "README.md").read_text(encoding="utf-8"):
        assert "notes_ode" in dode.inputs_of("DODE_DistillLambdas")["solver"].options
        by_notes = dode.distil(dode.demo(side=4), solver="notes_ode")["table"].rows[0]
        by_euler = dode.distil(dode.demo(side=4))["table"].rows[0]
        assert by_notes.weights == pytest.approx(by_euler.weights, abs=1e-4)
