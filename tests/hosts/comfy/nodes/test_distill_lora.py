"""Distill LoRA in the real ComfyUI, on one of its own networks, whose weights a loader node has made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dode_nodes import DodeError, LambdaRow, LambdaTable
from dode_nodes.fit.lora_pipeline import LoraPipeline
from dode_nodes.fit.progress import Progress
from dode_nodes.tables.lora_file import content_hash, factors_of
from tests.hosts.comfy.node_calls import NodeCalls
from tests.hosts.comfy.nodes.conftest import SIDE, prompt, table_of
from tests.hosts.comfy.nodes.test_distill_lambdas import full_disk
from tests.hosts.comfy.tiny_networks import SMALL_UNET, lora_of, real
from tests.toys import Interrupted

pytestmark = pytest.mark.comfyui


@pytest.fixture
def model(pack: SimpleNamespace) -> Any:
    """A small U-Net of SD 1.5's, as a loader node leaves it: in inference mode, and ready to learn."""
    import comfy.supported_models

    patcher = real(comfy.supported_models.SD15, SMALL_UNET)
    for module in patcher.model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.detach().clone()))
    assert all(weight.is_inference() for weight in patcher.model.parameters())
    return patcher


@pytest.fixture
def table(model: Any) -> LambdaTable:
    """Rows of one and two steps."""
    return table_of(model, [0.0], [0.0, 0.2])


def sampled(model: Any, row: LambdaRow, cfg: float = 2.0, positive: Any = None) -> torch.Tensor:
    import comfy.sample

    from dode_nodes.hosts.comfy.run_row import row_sampler

    latent = torch.zeros(4, 4, SIDE, SIDE)
    return comfy.sample.sample_custom(
        model, comfy.sample.prepare_noise(latent, 77), cfg, row_sampler(lambda _: row),
        torch.tensor(row.sigmas, dtype=torch.float32), positive or prompt(1), prompt(2), latent, disable_pbar=True,
    )  # fmt: skip


def by_the_teacher(model: Any, cfg: float = 2.0, positive: Any = None) -> torch.Tensor:
    import comfy.sample
    import comfy.samplers

    from dode_nodes.hosts.comfy.job import schedules_of

    latent = torch.zeros(4, 4, SIDE, SIDE)
    return comfy.sample.sample_custom(
        model, comfy.sample.prepare_noise(latent, 77), cfg, comfy.samplers.sampler_object("dpmpp_2m"),
        schedules_of(model)("karras", 12, False), positive or prompt(1), prompt(2), latent, disable_pbar=True,
    )  # fmt: skip


def nearer(one: torch.Tensor, other: torch.Tensor, goal: torch.Tensor) -> bool:
    return bool((one - goal).square().mean() < (other - goal).square().mean())


def assert_no_hooks(model: Any) -> None:
    assert not any(module._forward_hooks for module in model.model.modules())


def loaded(model: Any, lora: dict[str, torch.Tensor], strength: float) -> Any:
    """By ComfyUI's own loader."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def test_with_the_lora_loaded_rows_end_nearer_to_the_teacher_and_nothing_is_left_on_the_model(
    model: Any, table: LambdaTable, train: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    alone = sampled(model, table.rows[1])
    lora, loss, batches, named, summary, report = train(model=model, table=table, steps="1, 2")
    assert len(loss["loss"]) == batches == 12
    assert sum(loss["loss"][-4:]) < sum(loss["loss"][:4])
    assert [line.split()[0] for line in summary.splitlines()[1:3]] == ["1", "2"]
    row = named.rows[1]
    assert replace(row, trained_lora=None) == table.rows[1]
    assert row.trained_lora.content == content_hash(factors_of(lora))
    assert f"{row.trained_lora.error:#.3g}" in summary
    assert report.ndim == 4

    assert torch.equal(sampled(model, table.rows[1]), alone)
    assert all(torch.equal(model.model.state_dict()[name], weight) for name, weight in before.items())
    assert_no_hooks(model)
    assert model.patches == {}

    on = loaded(model, lora, row.trained_lora.strength)
    assert nearer(sampled(on, row), alone, by_the_teacher(model))
    caplog.clear()
    sampled(on, row)
    assert "LoRA" not in caplog.text
    sampled(model, row)
    assert "is not on the model" in caplog.text


def test_it_is_trained_for_the_model_with_its_other_loras(model: Any, table: LambdaTable, train: Any) -> None:
    styled = loaded(model, lora_of(model), 1.0)
    lora, _, _, named, *_ = train(model=styled, table=table)
    row, goal = named.rows[1], by_the_teacher(styled)
    assert not torch.allclose(goal, by_the_teacher(model), atol=1e-3)
    both = loaded(styled, lora, row.trained_lora.strength)
    assert nearer(sampled(both, row), sampled(styled, row), goal)


@pytest.mark.slow_host  # what ends it is the fit's own, and so are the files
def test_stopped_it_leaves_the_best_so_far_in_files(
    model: Any, table: LambdaTable, train: Any, lambdas_folder: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import folder_paths
    from safetensors.torch import load_file

    from dode_nodes.hosts.comfy.reporter import ProgressReporter

    loras = tmp_path_factory.mktemp("loras")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(loras)])
    tell = ProgressReporter.__call__

    def ending(self: ProgressReporter, progress: Progress) -> None:
        if progress.done > 0.8 * progress.total:
            raise Interrupted
        tell(self, progress)

    monkeypatch.setattr(ProgressReporter, "__call__", ending)
    with pytest.raises(Interrupted):
        train(model=model, table=table)
    (lora,) = loras.iterdir()
    assert lora.name == "mine-partial.safetensors"
    (saved,) = lambdas_folder.glob("mine-partial-*.safetensors")
    trained = LambdaTable.load(saved).rows[1].trained_lora
    assert (trained.content, trained.name) == (content_hash(factors_of(load_file(lora))), lora.name)
    assert_no_hooks(model)


def test_what_cannot_be_is_said_before_anything_is_evaluated(
    model: Any, table: LambdaTable, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(LoraPipeline, "run")
    sigmas = table.rows[1].sigmas * np.array([0.5, 1, 1])
    lower = LambdaTable([LambdaRow("euler", sigmas, (1, 1), np.zeros(2))], model=table.model)
    for changes, words in (
        ({"steps": "3"}, "no row of 3 evaluations"),
        ({"steps": "two"}, "steps must be numbers"),
        ({"latent": {"samples": torch.ones(1, 4, SIDE, SIDE)}}, "Empty Latent"),
        ({"table": replace(table, model={"family": "sdxl"})}, "another kind of model"),
        ({"table": lower}, "begins at σ"),
    ):
        with pytest.raises(DodeError, match=words):
            train(**({"model": model, "table": table} | changes))
    assert_no_hooks(model)


@pytest.mark.slow_host
def test_a_full_disk_costs_no_lora(
    model: Any,
    table: LambdaTable,
    train: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("dode_nodes.hosts.comfy.table_files._folders_of_last_resort", list)
    monkeypatch.setattr("os.fsync", full_disk)
    lora, loss, batches, named, summary, _ = train(model=model, table=table)
    assert len(loss["loss"]) == batches == 6
    assert named.rows[1].trained_lora.content == content_hash(factors_of(lora))
    assert "row with the LoRA" in summary
    assert "not saved, so use the table before you close ComfyUI" in caplog.text


@pytest.mark.slow_host
def test_without_a_table_one_is_made_first_and_found_again(
    model: Any, train: Any, lambdas_folder: Path, dode: NodeCalls, on_the_node: list[str]
) -> None:
    """As Distill λ makes it with the same inputs at quality good."""
    options = dode.run(
        dode.pack.DistillOptions, **dode.inputs.options | {"latents": 4, "refine_budget": 8.0}
    )[0]
    lora, *_, named, _, _ = train(model=model, table=None, steps="2", options=options)
    asked = {"positive": prompt(1), "negative": prompt(2), "latent": {"samples": torch.zeros(1, 4, SIDE, SIDE)},
             "cfg": 2.0, "seed": 3, "steps": "2", "quality": "good", "save_name": "mine"}  # fmt: skip
    found, *_, summary = dode.run(dode.pack.DistillLambdas, model=model, **asked, options=options)
    assert summary.startswith("Saved before as")
    assert [replace(row, trained_lora=None) for row in named.rows] == list(found.rows)
    best = min(named.rows, key=LambdaRow.error_from)
    assert best.trained_lora.content == content_hash(factors_of(lora))
    costs = [line for line in on_the_node if line.startswith("at most") and "evaluations:" in line]
    assert ["training the LoRA" in line for line in costs] == [False, True]


@pytest.mark.slow_host
def test_several_prompts_cfgs_and_a_teacher_of_its_own(
    model: Any, table: LambdaTable, train: Any, dode: NodeCalls
) -> None:
    """At cfg 1 it learns what the model does at cfg 3: half the evaluations for the network."""
    options = dode.run(
        dode.pack.DistillOptions,
        **dode.inputs.options | {"positive_2": prompt(5), "teacher_model": model, "teacher_cfg": 3.0},
    )[0]
    lora, *_, named, _, _ = train(model=model, table=table, cfg=1.0, options=options, batch_size=4)
    row = named.rows[1]
    on = loaded(model, lora, row.trained_lora.strength)
    for positive in (prompt(1), prompt(5)):
        goal = by_the_teacher(model, cfg=3.0, positive=positive)
        with_it, alone = (sampled(each, row, cfg=1.0, positive=positive) for each in (on, model))
        assert nearer(with_it, alone, goal)
    assert_no_hooks(model)


@pytest.mark.slow_host
def test_stopped_it_goes_on_where_it_was_and_done_it_is_not_done_again(
    model: Any, table: LambdaTable, train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any,
    lambdas_folder: Path, on_the_node: list[str],
) -> None:  # fmt: skip
    """And comes to the same LoRA."""
    import folder_paths

    from dode_nodes.hosts.comfy.reporter import ProgressReporter

    loras = tmp_path_factory.mktemp("loras")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(loras)])
    whole, *_ = train(model=model, table=table)
    (done,) = lambdas_folder.glob("*.dode-work")
    done.unlink()
    tell, stages = ProgressReporter.__call__, list[str]()

    def ending(self: ProgressReporter, progress: Progress) -> None:
        stages.append(progress.stage)
        if len(stages) > 1 and progress.done > 0.7 * progress.total:
            raise Interrupted
        tell(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressReporter, "__call__", ending)
        with pytest.raises(Interrupted):
            train(model=model, table=table)
    assert "teacher" in stages
    assert list(lambdas_folder.glob("*.dode-work"))

    stages.clear()
    monkeypatch.setattr(
        ProgressReporter,
        "__call__",
        lambda self, progress: stages.append(progress.stage) or tell(self, progress),
    )
    again, *_ = train(model=model, table=table)
    assert any("this was stopped before" in line for line in on_the_node)
    assert "teacher" not in stages
    assert any(stage.startswith("training") for stage in stages)
    assert list(again) == list(whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)

    stages.clear()
    known, loss, _, named, summary, _ = train(model=model, table=table)
    assert not any(stages)
    assert any("this LoRA was trained before" in line for line in on_the_node)
    assert all(torch.equal(known[name], whole[name]) for name in whole)
    assert len(loss["loss"]) == 6
    assert f"{named.rows[1].trained_lora.error:#.3g}" in summary
    assert len(list(lambdas_folder.glob("*.dode-work"))) == 1


@pytest.mark.slow_host
def test_minutes_memory_and_pictures_are_shown(
    model: Any, table: LambdaTable, train: Any, monkeypatch: pytest.MonkeyPatch, on_the_node: list[str]
) -> None:
    """After one batch, before the teacher; and while it trains, pictures of where the row ends."""
    from dode_nodes.hosts.comfy import reporter

    shown: list[torch.Tensor] = []
    drawn = SimpleNamespace(decode_latent_to_preview_image=lambda kind, x: shown.append(x))
    monkeypatch.setattr(reporter.latent_preview, "get_previewer", lambda *args: drawn)
    monkeypatch.setattr(reporter, "_PREVIEW_SECONDS", -1.0)
    monkeypatch.setattr(reporter, "_READING_SECONDS", -1.0)
    train(model=model, table=table)
    (said,) = [line for line in on_the_node if "GiB of memory so far" in line]
    assert said.startswith("at most about ")
    before = on_the_node[: on_the_node.index(said)]
    assert any("trying a batch" in line for line in before[1:])
    assert not any(line.startswith("teacher") for line in before)
    training = [line for line in on_the_node if line.startswith("training the LoRA, loss")]
    assert training
    assert len(shown) >= len(training)
    assert not any(x.requires_grad for x in shown)
