"""Distill λ for a model that follows another one, such as a checkpoint with a speed LoRA: in the real ComfyUI."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dode_nodes import DodeError
from tests.hosts.comfy.node_calls import NodeCalls
from tests.hosts.comfy.nodes.test_finished_fits import evaluations, key, with_shift  # noqa: F401  # a fixture
from tests.hosts.comfy.tiny_networks import SMALL_UNET, lora_of, real
from tests.hosts.conftest import conditioning

pytestmark = pytest.mark.comfyui

SMALL = {"steps": "2", "latents": 8, "scale": 2, "prediction": "noise"}


def prompt(seed: int) -> list[list[Any]]:
    return [[torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(seed)), {}]]


@pytest.fixture
def base(pack: SimpleNamespace) -> Any:
    """A network whose answers follow from its weights."""
    import comfy.supported_models

    return real(comfy.supported_models.SD15, SMALL_UNET)


def with_speed_lora(model: Any) -> Any:
    """A clone, which shares the weights that the LoRA is patched into whenever it is loaded."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora_of(model), 0.7, 0)[0]


def on_prompts(dode: NodeCalls, model: Any, **changes: Any) -> tuple[Any, ...]:
    asked = {"positive": prompt(1), "negative": prompt(2), "latent": {"samples": torch.zeros(1, 4, 8, 8)}}
    return dode.distil(model, **asked | SMALL | changes)


def test_the_base_at_its_cfg_teaches_the_model_with_the_lora_at_cfg_1(base: Any, dode: NodeCalls) -> None:
    """Each as ComfyUI alone samples it, though both patch the same weights in turns."""
    import comfy.sample

    from dode_nodes.hosts.comfy.model_facts import model_facts
    from dode_nodes.hosts.comfy.run_row import row_sampler

    styled = with_speed_lora(base)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    followed = on_prompts(dode, base, cfg=3.0)
    table, _, teacher, by_dode, _, summary = on_prompts(
        dode, styled, cfg=1.0, teacher_model=base, teacher_cfg=3.0, refine_budget=10.0
    )
    assert torch.equal(teacher["samples"], followed[2]["samples"])

    row = min((row for row in table.rows), key=lambda row: row.error_from())
    latent = torch.zeros(8, 4, 8, 8)
    alone = comfy.sample.sample_custom(
        styled, comfy.sample.prepare_noise(latent, 1, list(range(8))), 1.0, row_sampler(lambda _: row),
        torch.tensor(row.sigmas, dtype=torch.float32), prompt(1), prompt(2), latent, disable_pbar=True,
    )[-2:]  # fmt: skip
    torch.testing.assert_close(by_dode["samples"], alone, rtol=1e-4, atol=1e-4)
    error = (by_dode["samples"] - teacher["samples"]).square().mean().sqrt() * 0.18215  # of SD 1.5's latents
    assert row.errors.dode[0] == pytest.approx(float(error), rel=1e-3)

    assert table.model == model_facts(styled)
    assert {row.settings["cfg"] for row in table.rows} == {1.0}
    assert {row.settings["teacher_cfg"] for row in table.rows} == {3.0}
    assert all(row.unseen.to_others for row in table.rows)
    assert "teacher_cfg 3" in summary
    base.unpatch_model()
    styled.unpatch_model()
    assert all(torch.equal(base.model.state_dict()[name], weight) for name, weight in before.items())


def test_two_checkpoints_and_several_prompts(make_model: Any, dode: NodeCalls) -> None:
    model, teacher = make_model(), make_model()
    prompts = {"positive": conditioning(0.2, 0.4), "positive_2": conditioning(0.6)}
    followed = dode.distil(teacher, cfg=3.0, **SMALL | prompts | {"latents": 24})
    found = dode.distil(
        model,
        cfg=1.0,
        cfgs="1.5",
        teacher_model=teacher,
        teacher_cfg=3.0,
        **SMALL | prompts | {"latents": 24},
    )
    row = found[0].rows[0]
    assert row.settings["prompts"] == 3
    assert row.settings["cfg_range"] == [1.0, 1.5]
    assert row.unseen.latents == 12
    assert row.unseen.to_others is not None
    assert sum(row.report["evaluations"].values()) <= model.model.evaluated
    assert torch.equal(found[2]["samples"][-1], followed[2]["samples"][-1])  # of the last prompt's last noise


@pytest.mark.slow_host
def test_where_noise_and_picture_do_not_belong_together_nothing_is_claimed(
    make_model: Any, dode: NodeCalls, monkeypatch: pytest.MonkeyPatch, on_the_node: list[str]
) -> None:
    """A student as DMD makes them: of each noise it draws what the teacher draws of another."""
    from dode_nodes.hosts.comfy.prompts import GuidedModel

    model, teacher = make_model(), make_model()
    group = GuidedModel.group

    def permuted(self: GuidedModel, sigmas: torch.Tensor) -> Any:
        if self._guider.model_patcher is teacher:
            self._noise = self._noise.roll(1, 0)
        return group(self, sigmas)

    monkeypatch.setattr(GuidedModel, "group", permuted)
    table, *_, summary = dode.distil(model, cfg=2.0, teacher_model=teacher, teacher_cfg=2.0, **SMALL)
    (row,) = table.rows[:1]
    assert row.errors.dode[0] > 0.8 * row.unseen.to_others
    for said in (summary, on_the_node[-1]):
        assert "other pictures than its teacher" in said
        assert "times nearer" not in said


def test_what_cannot_be_followed_is_said_before_anything_is_evaluated(
    make_model: Any, dode: NodeCalls
) -> None:
    import comfy.latent_formats

    model, flow = make_model(), make_model("FLOW")
    other = make_model()
    other.model.latent_format = comfy.latent_formats.SDXL()
    short = make_model()
    short.model.model_sampling.set_sigmas(short.model.model_sampling.sigmas * 0.5)
    guider = SimpleNamespace()
    for student, changes, words in (
        (model, {"teacher_model": flow}, "predicts 'flow', the model 'eps'"),
        (model, {"teacher_model": other}, "latents are SDXL"),
        (model, {"teacher_model": short}, "same shift"),
        (flow, {"teacher_model": with_shift(flow, 3.0)}, "same shift"),
        (None, {"teacher_model": model, "guider": guider}, "in place of the guider"),
    ):
        with pytest.raises(DodeError, match=words):
            dode.distil(student, **SMALL | changes)
    assert sum(each.model.evaluated for each in (model, flow, other, short)) == 0


@pytest.mark.slow_host
def test_the_teacher_is_a_part_of_what_a_fit_is_known_by(make_model: Any, key: Any) -> None:  # noqa: F811
    model, teacher = make_model(checkpoint=1), make_model(checkpoint=2)
    keys = [
        key(model),
        key(model, teacher_model=teacher),
        key(model, teacher_model=teacher, teacher_cfg=3.0),
        key(model, teacher_model=make_model(checkpoint=3)),
        key(model, teacher_model=model),
        key(teacher, teacher_model=model),
    ]
    assert len(set(keys)) == len(keys)
    assert key(model, teacher_cfg=3.0) == keys[0]
    assert key(model, teacher_model=make_model(checkpoint=2)) == keys[1]


@pytest.mark.slow_host
def test_a_finished_fit_is_found_again_and_its_latents_are_the_teachers(
    make_model: Any, dode: NodeCalls, lambdas_folder: Any
) -> None:
    from dode_nodes.hosts.comfy import finished_fits

    model, teacher = make_model(checkpoint=1), make_model(checkpoint=2)
    asked = SMALL | {"cfg": 1.0, "teacher_model": teacher, "teacher_cfg": 3.0}
    first = dode.distil(model, **asked)
    assert evaluations(model, lambda: dode.distil(model, **asked)) == 0
    for path in (finished_fits._folder() / "finished").iterdir():
        path.unlink()
    again = dode.distil(model, **asked)
    for a, b in zip(first[2:5], again[2:5], strict=True):
        torch.testing.assert_close(a["samples"], b["samples"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(first[0].rows[0].sigmas, again[0].rows[0].sigmas)


def test_compare_says_that_its_teacher_is_another_one(
    make_model: Any, dode: NodeCalls, caplog: pytest.LogCaptureFixture
) -> None:
    model, teacher = make_model(), make_model()
    table = dode.table(model, cfg=2.0, teacher_model=teacher, teacher_cfg=3.0, **SMALL)
    caplog.clear()
    dode.compare(model, table, steps=2)
    assert "this table follows another model" in caplog.text
