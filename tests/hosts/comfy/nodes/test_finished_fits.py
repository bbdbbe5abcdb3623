"""Fits that are done are not made again, and fits that were ended go on: in the real ComfyUI, on closed-form models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dode_nodes import LambdaTable
from dode_nodes.tables.kept import SUFFIX
from tests.hosts.comfy.node_calls import empty, names_in
from tests.hosts.comfy.nodes.test_distill_lambdas import cancel_at, full_disk
from tests.hosts.conftest import conditioning

pytestmark = pytest.mark.comfyui

SMALL = {"steps": "3", "latents": 4, "prediction": "noise", "scale": 2}
REFINED = SMALL | {"refine_budget": 20.0}


@pytest.fixture
def model(make_model) -> Any:
    """One checkpoint."""
    return make_model(checkpoint=1)


def evaluations(model: Any, call: Any) -> int:
    """Of the network, by a call."""
    before = model.model.evaluated
    call()
    return model.model.evaluated - before


def same_latents(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two results of Distill λ have the same latents."""
    return all(torch.equal(x["samples"], y["samples"]) for x, y in zip(a[2:5], b[2:5], strict=True))


def restart(make_model: Any) -> Any:
    """The checkpoint of ``model``, loaded by a ComfyUI that remembers nothing but files."""
    return make_model(checkpoint=1)


# --- done ---------------------------------------------------------------------------------------------


def test_a_finished_fit_is_not_made_again(model, make_model, dode, lambdas_folder, on_the_node):
    first = dode.distil(model, **SMALL)
    dode.distil(model, **SMALL | {"seed": 9})  # something else in between
    again = restart(make_model)
    found = dode.distil(again, **SMALL)
    assert again.model.evaluated == 0
    assert found[0] == first[0]
    assert found[0].name == first[0].name
    assert same_latents(found, first)
    assert f"this was fitted before: {first[0].name}.safetensors is used" in on_the_node[-1]
    assert found[-1].startswith(f"Saved before as {lambdas_folder / first[0].name}")
    assert len(names_in(lambdas_folder)) == 2


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"latent": empty(3)}], ids=str)
def test_how_many_are_evaluated_at_a_time_does_not_count(changes, model, key):
    assert key(model, **changes) == key(model)


@pytest.mark.slow_host
def test_another_name_gets_the_same_table(model, dode, lambdas_folder):
    dode.distil(model, **SMALL)
    (first,) = lambdas_folder.iterdir()
    for _ in range(2):
        assert evaluations(model, lambda: dode.distil(model, **SMALL, save_name="sub/other")) == 0
    assert names_in(lambdas_folder) == ["sub/other", "table"]
    first.unlink()
    assert evaluations(model, lambda: dode.distil(model, **SMALL, save_name="sub/other")) == 0


def with_lora(model: Any, strength: float, value: float = 1.0) -> Any:
    """A clone with a patch on its weights."""
    from comfy.weight_adapter.lora import LoRAAdapter

    patched = model.clone()
    patch = LoRAAdapter(set(), (torch.full((16, 2), value), torch.ones(2, 16), 1.0, None, None, None))
    assert patched.add_patches({"diffusion_model.weight": patch}, strength)
    return patched


def with_sigmas(model: Any) -> Any:
    """One of its σ moved, as of a model that was trained with others."""
    sampling = model.model.model_sampling
    sigmas = sampling.sigmas.clone()
    sigmas[500] *= 1.01
    sampling.set_sigmas(sigmas)
    return model


def merged(model: Any, other: Any, share: float) -> Any:
    """As ModelMergeSimple makes it."""
    patched = model.clone()
    for name, patch in other.get_key_patches("diffusion_model.").items():
        patched.add_patches({name: patch}, 1 - share, share)
    return patched


def with_shift(model: Any, shift: float) -> Any:
    """A clone with another σ schedule, as ModelSamplingSD3 makes it."""
    import comfy.model_sampling

    class Shifted(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    Shifted.__module__ = "comfy_extras.nodes_model_advanced"
    sampling = Shifted(model.model.model_config)
    sampling.set_parameters(shift=shift)
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling)
    return patched


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"cfg": 3.0},
        {"positive": conditioning(0.3)},
        {"negative": conditioning(-0.2)},
        {"positive": [[torch.tensor([0.2]).reshape(-1, 1, 1), {"strength": 0.5}]]},
        {"steps": "2, 4"},
        {"steps": "3, 2"},
        {"steps": "2, 3"},
        {"latents": 5},
        {"scale": 3},
        {"scheduler": "normal"},
        {"solver": "dpmpp_2m"},
        {"teacher": "euler"},
        {"prediction": "data"},
        {"refine_budget": 20.0},
        {"latent": {"samples": torch.zeros(1, 4, 4, 6)}},
        {"positive_2": conditioning(0.7)},
        {"cfgs": "3"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_else_is_asked_for_is_another_fit(changes, model, key):
    assert key(model) == key(model) != key(model, **changes)


class _FarEnough(Exception):
    pass


@pytest.fixture
def key(dode, monkeypatch) -> Callable[..., str]:
    """What a fit that Distill λ is asked for is known by; nothing is fitted."""
    from dode_nodes.hosts.comfy import finished_fits

    keys: list[str] = []
    of = finished_fits.key_of_request

    def note(request: Any) -> str:
        keys.append(of(request))
        raise _FarEnough

    monkeypatch.setattr(finished_fits, "key_of_request", note)

    def key(model: Any, **changes: Any) -> str:
        with pytest.raises(_FarEnough):
            dode.distil(model, **SMALL | changes)
        return keys[-1]

    return key


def test_what_is_put_on_the_model_is_another_fit(model, make_model, key):
    flow = make_model("FLOW", checkpoint=1)
    different = [
        model, make_model(checkpoint=2), flow, with_lora(model, 0.5), with_lora(model, 0.6), with_lora(model, 0.5, 2.0),
        with_shift(flow, 2.0), with_shift(flow, 3.0), with_sigmas(make_model(checkpoint=1)),
        merged(model, make_model(checkpoint=2), 0.5), merged(model, make_model(checkpoint=3), 0.5),
    ]  # fmt: skip
    assert len(set(map(key, different))) == len(different)
    assert key(with_lora(make_model(checkpoint=1), 0.5)) == key(with_lora(model, 0.5))
    assert key(with_shift(make_model("FLOW", checkpoint=1), 2.0)) == key(with_shift(flow, 2.0))


@pytest.mark.slow_host
def test_redo_fits_again(model, dode, lambdas_folder):
    cost = evaluations(model, lambda: dode.distil(model, **SMALL))
    assert evaluations(model, lambda: dode.distil(model, **SMALL, redo=True)) == cost
    assert names_in(lambdas_folder) == ["table", "table_00001"]


@pytest.mark.slow_host
def test_a_table_that_is_gone_or_another_is_fitted_again(model, dode, lambdas_folder):
    dode.distil(model, **SMALL)
    (file,) = lambdas_folder.iterdir()
    table = LambdaTable.load(file)
    rows = [replace(row, weights=row.weights / 2) for row in table.rows]
    LambdaTable(rows, model=table.model).save(file, overwrite=True)  # as a stranger's file of the same name
    assert evaluations(model, lambda: dode.distil(model, **SMALL)) > 0
    for each in lambdas_folder.iterdir():
        each.unlink()
    assert evaluations(model, lambda: dode.distil(model, **SMALL)) > 0


def test_latents_that_are_not_kept_any_more_are_sampled_again(model, dode, user_folder):
    made = dode.distil(model, **REFINED)
    cost = model.model.evaluated
    for file in user_folder.rglob(f"*{SUFFIX}"):
        file.unlink()
    found = dode.distil(model, **REFINED)
    assert 0 < model.model.evaluated - cost < cost / 5
    assert found[0] == made[0]
    for mine, theirs in zip(found[2:5], made[2:5], strict=True):
        torch.testing.assert_close(mine["samples"], theirs["samples"])
    assert evaluations(model, lambda: dode.distil(model, **REFINED)) == 0


@pytest.fixture
def user_folder(dode, lambdas_folder) -> Path:
    """Where it is noted which fits are done."""
    from dode_nodes.hosts.comfy import finished_fits

    return finished_fits._folder()


@pytest.mark.slow_host
def test_notes_that_are_damaged_cost_a_fit_and_no_more(model, dode, user_folder):
    dode.distil(model, **SMALL)
    (notes,) = user_folder.glob("*.jsonl")
    notes.write_bytes(notes.read_bytes()[:-5])
    assert evaluations(model, lambda: dode.distil(model, **SMALL)) > 0
    assert evaluations(model, lambda: dode.distil(model, **SMALL)) == 0


# --- what cannot be compared --------------------------------------------------------------------------


def with_function(model: Any) -> Any:
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    return patched


def test_a_function_on_the_model_is_fitted_anew_and_that_is_said(model, dode, on_the_node, caplog):
    patched = with_function(model)
    with caplog.at_level("INFO"):
        dode.distil(patched, **SMALL)
    assert "will not be recognised another time, because of with_function" in caplog.text
    assert "made anew each time" in on_the_node[-1]
    assert evaluations(model, lambda: dode.distil(patched, **SMALL)) > 0


def test_hooks_are_fitted_anew(model, dode, on_the_node):
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    positive = [[torch.tensor([0.2]).reshape(-1, 1, 1), {"hooks": hooks}]]
    dode.distil(model, **SMALL, positive=positive)
    assert "because of hooks: it is made anew each time" in on_the_node[-1]


# --- ended --------------------------------------------------------------------------------------------


def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What evaluations are for, from now on."""
    from dode_nodes.hosts.comfy.reporter import ProgressReporter

    seen: list[str] = []
    tell = ProgressReporter.__call__
    monkeypatch.setattr(
        ProgressReporter,
        "__call__",
        lambda self, progress: seen.append(progress.stage) or tell(self, progress),
    )
    return seen


@pytest.mark.slow_host  # the library's own: what tells fits apart is asked in each host
def test_a_cancelled_fit_goes_on(
    model, make_model, dode, lambdas_folder, user_folder, monkeypatch, on_the_node
):
    import comfy.model_management

    whole = dode.distil(make_model(checkpoint=1), **REFINED)
    for file in [*lambdas_folder.glob("*"), *user_folder.glob("*.jsonl")]:
        file.unlink()
    seen = stages(monkeypatch)
    model.model.on_call = lambda evaluated: cancel_in("refining", seen)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        dode.distil(model, **REFINED)
    assert any(path.suffix == SUFFIX for path in lambdas_folder.iterdir())
    listed = [path.suffix for path in lambdas_folder.iterdir() if path.suffix != SUFFIX]
    assert set(listed) == {".safetensors"}

    seen.clear()
    again = restart(make_model)
    found = dode.distil(again, **REFINED)
    assert any("goes on from there" in line for line in on_the_node)
    before_figures = seen[: seen.index("refining")]
    assert set(before_figures) == {"checking the model"}
    assert [row.sha256 for row in found[0].rows] == [row.sha256 for row in whole[0].rows]
    assert json.dumps(found[0].to_json()) == json.dumps(whole[0].to_json())
    assert same_latents(found, whole)
    assert not [path for path in lambdas_folder.iterdir() if path.suffix == SUFFIX]


def cancel_in(stage: str, seen: list[str]) -> None:
    import comfy.model_management

    if seen and seen[-1] == stage:
        comfy.model_management.interrupt_current_processing()


@pytest.mark.slow_host
def test_redo_does_not_go_on(model, dode, lambdas_folder, monkeypatch):
    import comfy.model_management

    model.model.on_call = cancel_at(200)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        dode.distil(model, **SMALL)
    assert [path.suffix for path in lambdas_folder.iterdir()].count(SUFFIX)
    seen = stages(monkeypatch)
    dode.distil(model, **SMALL, redo=True)
    assert seen.index("teacher") < seen.index("student")


@pytest.mark.slow_host
def test_a_full_disk_does_no_harm(model, dode, lambdas_folder, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        patch.setattr("dode_nodes.hosts.comfy.table_files._folders_of_last_resort", list)
        table = dode.table(model, **SMALL)
    assert len(table.rows) == 1
    assert list(lambdas_folder.iterdir()) == []
    assert dode.ksampler(model, table, empty(), steps=3).isfinite().all()
