"""Distill λ on closed-form models: what it finds, says, saves, refuses, and leaves when it is ended."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dode_nodes import DodeError, LambdaRow, LambdaTable, TableError
from dode_nodes.cli.commands import main
from dode_nodes.tables.choice import part_for_steps
from tests.hosts.comfy.node_calls import REFINED, empty, ksampler, names_in, rms, saved_as
from tests.hosts.conftest import conditioning

pytestmark = pytest.mark.comfyui

KINDS = ["EPS", "V_PREDICTION", "FLOW"]


# --- What it finds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [*KINDS[:1], *(pytest.param(kind, marks=pytest.mark.slow_host) for kind in KINDS[1:])]
)
def test_distil_then_sample_beats_the_stock_solver(kind, make_model, dode, drawn, lambdas_folder):
    scheduler = "simple" if kind == "FLOW" else "karras"
    model = make_model(kind)
    table, report, *_, summary = dode.distil(model, scheduler=scheduler)
    assert LambdaTable.load(saved_as("table", lambdas_folder)) == table
    assert [row.steps for row in table.rows] == [5, 8]
    assert len(drawn) == report.shape[0] == 1
    assert report.std() > 0.01
    assert "euler" in summary
    assert table.model["prediction_type"] == {"EPS": "eps", "V_PREDICTION": "v", "FLOW": "flow"}[kind]

    converged = ksampler(model, empty(6), sampler="dpmpp_2m", scheduler=scheduler, steps=200)
    stock = rms(ksampler(model, empty(6), scheduler=scheduler), converged)
    assert rms(dode.ksampler(model, table, empty(6)), converged) < 0.8 * stock


@pytest.mark.parametrize(
    ("channels", "shape", "dimensions"), [(16, (1, 16, 4, 4), 2), (4, (1, 4, 3, 4, 4), 3)]
)
def test_other_latents(channels, shape, dimensions, make_model, dode):
    model = make_model("FLOW", channels, dimensions)
    latent = {"samples": torch.zeros(shape)}
    table = dode.table(model, scheduler="simple", latent=latent)
    assert table.model["channels"] == channels
    assert dode.ksampler(model, table, latent).shape == shape


@pytest.mark.slow_host
def test_numbers_of_steps_that_share_a_schedule_share_a_row(make_model):
    """ddim_uniform's: it is fitted once, and found by either number."""
    from dode_nodes.hosts.comfy.job import _each_once, _Fit, schedule

    schedules = [schedule(make_model(), "euler", "ddim_uniform", steps) for steps in (5, 42, 43)]
    assert list(map(len, _each_once(schedules))) == [len(each.sigmas) for each in schedules[:2]]
    sigmas = schedules[1].sigmas.double().numpy()
    count = len(sigmas) - 1
    found = [LambdaRow("euler", sigmas, (1,) * count, [0.1] * count, settings={"seed": 3})]
    table = LambdaTable(_Fit(None, SimpleNamespace(found=found), schedules).rows())
    assert [row.settings for row in table.rows] == [{"seed": 3, "steps": steps} for steps in (42, 43)]
    assert [part_for_steps(table, steps).row for steps in (42, 43)] == list(table.rows)


@pytest.mark.slow_host  # batches of every kind of prompt are cases/, in each host
def test_micro_batches_and_prompts(make_model, dode):
    model = make_model()
    split = dode.table(model, micro_batch=3, positive_2=conditioning(0.7), steps="6").rows[0]
    whole = dode.table(model, micro_batch=8, positive_2=conditioning(0.7), steps="6", redo=True).rows[0]
    assert split.weights == pytest.approx(whole.weights, rel=1e-3, abs=1e-3)
    assert split.settings["prompts"] == 2
    batched = dode.table(model, positive=conditioning(0.2, 0.7), steps="6", micro_batch=3).rows[0]
    assert batched.weights == pytest.approx(whole.weights, rel=1e-3, abs=1e-3)


def test_minutes_and_memory_are_said_after_the_first_evaluations(make_model, dode, on_the_node):
    dode.table(make_model(), steps="3")
    said = [i for i, line in enumerate(on_the_node) if re.fullmatch(_EXPECTED, line)]
    teaching = [i for i, line in enumerate(on_the_node) if line.startswith("teacher")]
    assert len(said) == 1
    assert all(said[0] < i for i in teaching)


_EXPECTED = r"at most about \d+ (s|min) on this machine, with \d+\.\d GiB of memory so far"


@pytest.mark.parametrize("own", [False, True], ids=["a scheduler", "σ of the user's own"])
def test_the_stock_latents_say_what_made_them(own, make_model, dode):
    model = make_model()
    chosen = {"sigmas": torch.tensor([8.0, 2.0, 0.5, 0.0])} if own else {"steps": "3"}
    table, *_, summary = dode.distil(model, **chosen)
    setting = table.rows[0].best_stock
    assert (setting is None) == own
    name = "euler, σ 8, 2, 0.5, 0" if own else f"best stock: {setting.sampler}, {setting.scheduler}"
    assert f"\n\nThe stock latents: {name}" in summary
    *_, again = dode.distil(model, **chosen)
    assert f"\n\nThe stock latents: {name}" in again


@pytest.mark.slow_host
def test_one_step_is_the_plain_solver_and_that_is_said(make_model, dode, drawn, on_the_node):
    table, _, _, by_dode, by_stock, summary = dode.distil(make_model(), steps="1")
    (row,) = table.rows
    assert row.weights.tolist() == [0.0]
    torch.testing.assert_close(by_dode["samples"], by_stock["samples"])
    assert sum("with one evaluation there is nothing to fit" in line for line in on_the_node) == 1
    assert "with one evaluation there is nothing to fit" in summary
    (figure,) = drawn
    words = [artist.get_text() for artist in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert "one evaluation: there is no λ to fit" in words


@pytest.mark.slow_host
def test_the_command_line_says_the_same_of_one_step(make_model, dode, on_the_node, capsys, tmp_path):
    dode.distil(make_model(), steps="1")
    arguments = ["distill", "--quality", "quick", "--steps", "1", "--latents", "2", "--scale", "1"]
    assert main([*arguments, "--out", str(tmp_path / "by_command.safetensors")]) == 0
    remark = capsys.readouterr().out.splitlines()[1]
    assert "nothing to fit" in remark
    assert on_the_node[0].endswith(f"; {remark}")


def test_one_evaluation_is_refined_too(make_model, dode):
    model = make_model()
    table = dode.table(model, **REFINED | {"steps": "1, 4", "latents": 16})
    rows = [(row.nfe, row.is_refined) for row in table.rows]
    assert rows == [(1, False), (4, False), (1, True), (4, True)]
    converged = ksampler(model, empty(6), sampler="dpmpp_2m", scheduler="karras", steps=200)
    stock = rms(ksampler(model, empty(6), scheduler="karras", steps=1), converged)
    assert rms(dode.ksampler(model, table, empty(6), steps=1), converged) < 0.9 * stock


def test_a_two_stage_solver_keeps_its_schedule_when_refined(make_model, dode):
    model = make_model()
    table = dode.table(model, solver="heun", **REFINED)
    rows = [row for row in table.rows if row.is_refined]
    assert [(row.solver, row.form, row.has_own_sigmas) for row in rows] == [("heun", "lambda", False)]
    patched = dode.apply(model, LambdaTable(rows, model=table.model))
    by_model = ksampler(patched, empty(), sampler="heun", steps=4)
    torch.testing.assert_close(by_model, dode.ksampler(model, table, empty(), steps=4))


@pytest.mark.slow_host  # the library refines them in each host: see test_host_samplers.py
@pytest.mark.parametrize("solver", ["uni_pc", "uni_pc_bh2"])
def test_solvers_that_need_a_schedule_in_float32_are_refined(solver, make_model, dode):
    model = make_model()
    table = dode.table(model, solver=solver, **REFINED | {"steps": "5"})
    greedy, refined = table.rows
    assert (greedy.solver, refined.is_refined) == (solver, True)
    assert refined.error_from() < greedy.error_from()
    alone = LambdaTable([refined], model=table.model)
    stock = ksampler(model, empty(8), sampler=solver, steps=5)
    converged = ksampler(model, empty(8), sampler="dpmpp_2m", steps=200)
    assert rms(dode.ksampler(model, alone, empty(8), steps=5), converged) < rms(stock, converged)


def test_a_sampler_of_another_pack_is_offered_and_distils(make_model, dode, monkeypatch):
    import comfy.k_diffusion.sampling as k_diffusion
    import comfy.samplers

    def sample_ralston(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            d, step = (x - denoised) / sigmas[i], sigmas[i + 1] - sigmas[i]
            if sigmas[i + 1] > 0:
                middle = sigmas[i] + 2 / 3 * step
                x_middle = x + 2 / 3 * step * d
                d_middle = x_middle - model(x_middle, middle * x.new_ones(len(x)), **extra_args)
                d = d / 4 + 3 / 4 * d_middle / middle
            x = x + step * d
        return x

    monkeypatch.setattr(k_diffusion, "sample_ralston", sample_ralston, raising=False)
    monkeypatch.setattr(comfy.samplers, "SAMPLER_NAMES", [*comfy.samplers.SAMPLER_NAMES, "ralston"])
    offered = dode.pack.DistillOptions.INPUT_TYPES()["required"]["solver"][1]["options"]
    assert "ralston" in offered
    table = dode.table(make_model(), solver="ralston", steps="6")
    assert table.rows[0].evaluations == (2, 2, 2, 2, 2, 1)


# --- What it says -----------------------------------------------------------------------------------------


def test_the_cost_is_said_before_and_counted_down(make_model, dode, monkeypatch, caplog):
    import comfy.utils

    said, told = [], []
    model = make_model()
    monkeypatch.setattr(
        "dode_nodes.hosts.comfy.reporter.show_text",
        lambda node_id, text: said.append((model.model.evaluated, text)),
    )
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, done, total, preview: told.append((done, total)),
    )
    with caplog.at_level("INFO"):
        dode.distil(model, **REFINED)
    evaluated, cost = said[0]
    assert evaluated == 0
    assert cost in caplog.text
    numbers = re.fullmatch(
        r"at most (\d+) evaluations: teacher \d+, students \d+, refining \d+ \(on up to \d+ latents\), "
        r"figures from unseen latents \d+; plus (\d+) to check the model first and (\d+) for the result latents",
        cost,
    )
    assert said[1][0] > 0
    assert re.search(r"[a-z ]+: \d+ of \d+ evaluations, .* left", said[1][1])
    totals = [total for _, total in told]
    assert totals[0] == sum(map(int, numbers.groups()))
    assert all(after <= before for before, after in pairwise(totals))
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert done[-1] == totals[-1] == model.model.evaluated / 2  # positive and negative


# --- What it saves ----------------------------------------------------------------------------------------


def cancel_at(count: int) -> Callable[[int], None]:
    """For a model's ``on_call``: press Cancel at this evaluation, once."""
    import comfy.model_management

    pressed = []

    def on_call(evaluated: int) -> None:
        if evaluated >= count and not pressed:
            pressed.append(evaluated)
            comfy.model_management.interrupt_current_processing()

    return on_call


@pytest.mark.parametrize(
    ("part", "saved"),
    [
        pytest.param(0.025, [], marks=pytest.mark.slow_host),
        pytest.param(0.05, ["greedy"], marks=pytest.mark.slow_host),
        (0.5, ["greedy", "interrupted"]),
        pytest.param(0.99, ["greedy", "whole"], marks=pytest.mark.slow_host),
    ],
)
def test_cancel_saves_what_was_found_and_the_next_run_works(
    part, saved, make_model, dode, lambdas_folder, caplog
):
    """In the teacher, before the first Jacobian, between Jacobians, in the result latents."""
    import comfy.model_management

    counted = make_model()
    dode.distil(counted, save_name="sub/first", **REFINED)
    total = counted.model.evaluated

    model = make_model(on_call=cancel_at(int(part * total)))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        dode.distil(model, save_name="sub/cancelled", **REFINED)
    assert 0 < model.model.evaluated < total
    assert names_in(lambdas_folder / "sub") == [*(["cancelled-partial"] if saved else []), "first"]
    assert ("saved as cancelled-partial-" in caplog.text) == bool(saved)
    if saved:
        rows = LambdaTable.load(saved_as("cancelled-partial", lambdas_folder / "sub")).rows
        assert [kind_of(row) for row in rows] == saved
        errors = [row.error_from() for row in rows]
        assert errors == sorted(set(errors), reverse=True)  # each is nearer to the teacher than the last
    model.model.on_call = None
    dode.distil(model, save_name="next", steps="4")


def kind_of(row: LambdaRow) -> str:
    """How far it had come."""
    if not row.is_refined:
        return "greedy"
    return "interrupted" if row.report["refined"].get("interrupted") else "whole"


@pytest.mark.slow_host
def test_a_cancel_is_not_hidden_by_a_full_disk(make_model, dode, lambdas_folder, monkeypatch, caplog):
    import comfy.model_management

    counted = make_model()
    dode.distil(counted, save_name="first", **REFINED)
    monkeypatch.setattr("dode_nodes.hosts.comfy.table_files._folders_of_last_resort", list)
    monkeypatch.setattr("os.fsync", full_disk)
    model = make_model(on_call=cancel_at(counted.model.evaluated * 2 // 3))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        dode.distil(model, save_name="second", **REFINED)
    assert names_in(lambdas_folder) == ["first"]
    assert "could not be saved" in caplog.text


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow_host
def test_a_full_disk_is_said_costs_no_rows_and_leaves_no_part(make_model, dode, lambdas_folder, monkeypatch):
    from dode_nodes.hosts.comfy import table_files

    monkeypatch.setattr(table_files, "_folders_of_last_resort", list)
    monkeypatch.setattr("os.fsync", full_disk)
    table, *_, summary = dode.distil(make_model())
    assert "No space left" in summary.splitlines()[0]
    assert len(table.rows) == 2
    assert list(lambdas_folder.iterdir()) == []


@pytest.mark.slow_host
def test_a_folder_that_is_gone_at_the_end_is_replaced_by_another(
    make_model, dode, lambdas_folder, monkeypatch
):
    from dode_nodes.hosts.comfy import table_files

    other = lambdas_folder / "other"
    monkeypatch.setattr(table_files, "_folders_of_last_resort", lambda: [other])
    asked = lambdas_folder / "sub"
    model = make_model(
        on_call=lambda evaluated: evaluated > 300 and asked.is_dir() and _becomes_a_file(asked)
    )
    *_, summary = dode.distil(model, save_name="sub/name")
    assert summary.startswith(f"Saved as {saved_as('name', other)}")


def _becomes_a_file(folder: Path) -> None:
    folder.rmdir()
    folder.touch()


@pytest.mark.slow_host
def test_a_taken_name_gets_a_number(make_model, dode, lambdas_folder):
    model = make_model()
    for _ in range(3):
        dode.distil(model, save_name="sub/name", steps="4", redo=True)
    assert names_in(lambdas_folder / "sub") == ["name", "name_00001", "name_00002"]
    dode.distil(model, save_name="sub/name", steps="5")
    assert names_in(lambdas_folder / "sub").count("name") == 2  # other numbers, another name


# --- What it refuses --------------------------------------------------------------------------------------


@pytest.mark.slow_host
def test_an_unwritable_folder_is_found_before_sampling(make_model, dode, monkeypatch):
    def read_only(**kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    model = make_model()
    with pytest.raises(TableError, match="Read-only"):
        dode.distil(model)
    assert model.model.evaluated == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": {"samples": torch.ones(1, 4, 4, 4)}}, "Empty Latent"),
        ({"latent": {"samples": torch.zeros(1, 4, 4, 4), "noise_mask": torch.ones(1, 4, 4)}}, "mask"),
        ({"steps": "eight"}, "steps must be"),
        ({"steps": "0"}, "steps must be"),
        ({"save_name": "../../escape"}, "another name than"),
        ({"save_name": "  "}, "give the table a name"),
        ({"latents": 2, "positive": conditioning(0.1, 0.2, 0.3)}, "at least 3 latents"),
        ({"sigmas": torch.empty(0)}, "at least two entries"),
        ({"sigmas": torch.tensor([5.0])}, "at least two entries"),
        ({"sigmas": torch.tensor([1.0, 2.0, 0.0])}, "descend"),
        ({"sigmas": torch.tensor([5.0, 2.0, 1.0])}, "must end at σ = 0"),
        ({"solver": "euler_ancestral"}, "stochastic"),
        ({"teacher": "uni_pc"}, "teacher"),
        ({"refine_budget": 0.01}, "too small"),
    ],
)
def test_bad_input_is_refused_before_any_evaluation(changes, message, make_model, dode, lambdas_folder):
    model = make_model()
    with pytest.raises(DodeError, match=message):
        dode.distil(model, **changes)
    assert model.model.evaluated == 0
    assert not [path for path in lambdas_folder.rglob("*") if path.is_file()]


# --- Ranges -------------------------------------------------------------------------------------------


@pytest.mark.slow_host  # its groups are the fit's own
def test_a_range_of_cfg_and_sizes_is_fitted_together(make_model, dode):
    model = make_model()
    large = {"samples": torch.zeros(1, 4, 6, 6)}
    table, _, *latents, _ = dode.distil(model, cfgs="4, 7", latent_2=large, latents=12, steps="4", cfg=2.0)
    settings = table.rows[0].settings
    assert (settings["cfg"], settings["cfg_range"]) == (2.0, [2.0, 7.0])
    assert (settings["groups"], settings["prompts"], settings["latents"]) == (6, 1, 12)
    alone = dode.distil(model, latents=12, steps="4", cfg=2.0)[0].rows[0]
    assert settings["latent_shape"] == alone.settings["latent_shape"]
    assert table.rows[0].sha256 != alone.sha256
    shape = latents[0]["samples"].shape
    assert list(shape[1:]) == alone.settings["latent_shape"]
    assert all(each["samples"].shape == shape for each in latents)


@pytest.mark.parametrize(
    ("cfgs", "changes", "why"),
    [
        ("4; x", {}, r"cfgs must be one number or several, such as '4, 7', not '4; x'"),
        ("4, 7", {"latents": 2}, "3 combinations of prompt, cfg and size need at least 3 latents, not 2"),
    ],
)
def test_a_range_that_cannot_be_is_refused(cfgs, changes, why, make_model, dode):
    model = make_model()
    with pytest.raises(DodeError, match=why):
        dode.distil(model, cfgs=cfgs, **changes)
    assert model.model.evaluated == 0


@pytest.mark.parametrize(
    ("text", "steps"), [("5, 6;8", [5, 6, 8]), ("2-5", [2, 3, 4, 5]), ("4, 3-5", [4, 3, 5]), ("7-7", [7])]
)
def test_steps_are_numbers_or_ranges(text, steps, comfyui):
    from dode_nodes.fit.steps import parse_steps

    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "5-", "6-4", "2-3-4", "0-3", "a", "-2", "2-1001"])
def test_steps_that_are_none_are_refused(text, comfyui):
    from dode_nodes.fit.steps import parse_steps

    with pytest.raises(DodeError, match="steps must be numbers such as"):
        parse_steps(text)
