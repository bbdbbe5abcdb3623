"""The nodes on closed-form models, in the real ComfyUI."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dode_nodes import DodeError, LambdaRow, LambdaTable, TableError, sample_dode, solvers
from dode_nodes.table import end_error
from tests.hosts.conftest import conditioning, mixture_denoised

pytestmark = pytest.mark.comfyui

KINDS = ["EPS", "V_PREDICTION", "FLOW"]


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def distil(
    run_node: Any, pack: ModuleType, model: Any, inputs: SimpleNamespace, **changes: Any
) -> tuple[Any, ...]:
    return run_node(pack.DistillLambdas, model=model, **(inputs.distil | changes))


def ksampler(model: Any, latent: dict[str, Any], *, sampler: str = "euler", scheduler: str = "karras",
             steps: int = 8, denoise: float = 1.0, seed: int = 5, mask: Any = None) -> torch.Tensor:  # fmt: skip
    """ComfyUI's own KSampler node's path."""
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent["samples"], seed)
    return comfy.sample.sample(
        model, noise, steps, 2.0, sampler, scheduler, conditioning(0.2), conditioning(-0.1),
        latent["samples"], denoise=denoise, seed=seed, noise_mask=mask,
    )  # fmt: skip


def dode_ksampler(run_node: Any, pack: ModuleType, model: Any, table: LambdaTable, latent: dict[str, Any],
                  **changes: Any) -> torch.Tensor:  # fmt: skip
    settings = {"steps": 8, "cfg": 2.0, "seed": 5, "denoise": 1.0, "solver": "any"} | changes
    (result,) = run_node(
        pack.DodeKSampler, model=model, table=table, latent_image=latent,
        positive=conditioning(0.2), negative=conditioning(-0.1), **settings,
    )  # fmt: skip
    return result["samples"]


def compare(run_node: Any, pack: ModuleType, model: Any, inputs: SimpleNamespace, table: LambdaTable,
            **changes: Any) -> tuple[Any, ...]:  # fmt: skip
    settings = {"steps": 4, "solver": "any", "pictures": 3, "seed": 99, "scale": 10} | changes
    return run_node(
        pack.CompareSamplers, model=model, positive=inputs.positive, negative=inputs.negative, cfg=2.0,
        latent=inputs.latent, table=table, **settings,
    )  # fmt: skip


def by_the_library(row: LambdaRow, kind: str) -> torch.Tensor:
    """Three latents of seed 5 at cfg 2, with our own solver, a hand-written guidance and the closed form."""
    import comfy.sample

    flow = kind == "FLOW"
    noise = comfy.sample.prepare_noise(torch.zeros(3, 4, 4, 4), 5)
    x = noise if flow else noise * torch.sqrt(1 + torch.tensor(row.sigmas[0]) ** 2).float()

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = (mixture_denoised(x, sigma, offset, flow) for offset in (0.2, -0.1))
        return unconditional + 2.0 * (conditional - unconditional)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "_host_lookup", None)
        return sample_dode(denoiser, x, row.sigmas, row=row, disable=True)


def zero_table(model: Any, solver: str, steps: int = 8, scheduler: str = "karras") -> LambdaTable:
    """λ = 0 on the schedule of a KSampler."""
    from dode_nodes.hosts.comfy.distilling import schedule
    from dode_nodes.hosts.comfy.facts import model_facts
    from dode_nodes.probe import probe_student

    sigmas = schedule(model, solver, scheduler, steps)
    queries = probe_student(solvers.resolve(solver), sigmas)
    row = LambdaRow(solver, sigmas.double().numpy(), queries.per_step, [0.0] * len(queries.sigmas))
    return LambdaTable([row], model=model_facts(model))


@pytest.mark.parametrize("kind", KINDS)
def test_distil_then_sample_beats_the_stock_solver(kind, make_model, run_node, pack, inputs, lambdas_folder):
    scheduler = "simple" if kind == "FLOW" else "karras"
    model = make_model(kind)
    table, report, *_, summary = distil(run_node, pack, model, inputs, scheduler=scheduler)
    assert LambdaTable.load(lambdas_folder / "table.safetensors") == table
    assert [row.steps for row in table.rows] == [5, 8]
    assert report.shape[0] == 1
    assert report.std() > 0.01
    assert "euler" in summary
    assert table.model["prediction_type"] == {"EPS": "eps", "V_PREDICTION": "v", "FLOW": "flow"}[kind]

    latent = {"samples": torch.zeros(6, 4, 4, 4)}
    converged = ksampler(model, latent, sampler="dpmpp_2m", scheduler=scheduler, steps=200)
    stock = rms(ksampler(model, latent, scheduler=scheduler), converged)
    dode = rms(dode_ksampler(run_node, pack, model, table, latent), converged)
    assert dode < 0.8 * stock


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_ksampler_equals_the_library_without_comfyui(kind, make_model, run_node, pack, inputs):
    model = make_model(kind)
    table = distil(run_node, pack, model, inputs, scheduler="simple", prediction="noise")[0]
    result = dode_ksampler(run_node, pack, model, table, {"samples": torch.zeros(3, 4, 4, 4)})
    expected = by_the_library(table.rows[1], kind) / 0.5  # the format's scale_factor
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_2", "dpmpp_2m", "ipndm", "deis", "lms", "res_multistep",
                                    "gradient_estimation", "dpm_fast", "uni_pc"])  # fmt: skip
def test_zero_lambda_is_comfyuis_sampler_bit_for_bit(solver, make_model, run_node, pack, inputs):
    import comfy.sample

    model = make_model()
    table = zero_table(model, solver)
    latent = {"samples": torch.zeros(2, 4, 4, 4)}
    stock = ksampler(model, latent, sampler=solver)
    assert torch.equal(dode_ksampler(run_node, pack, model, table, latent), stock)

    (sampler,) = run_node(pack.DodeSampler, table=table, solver=solver)
    (sigmas,) = run_node(pack.DodeSigmas, table=table, steps=8, denoise=1.0, solver=solver)
    noise = comfy.sample.prepare_noise(latent["samples"], 5)
    custom = comfy.sample.sample_custom(
        model, noise, 2.0, sampler, sigmas, inputs.positive, inputs.negative, latent["samples"], seed=5
    )
    assert torch.equal(custom, stock)

    (patched,) = run_node(pack.ApplyLambdas, model=model, table=table, solver="any")
    assert torch.equal(ksampler(patched, latent, sampler=solver), stock)


def test_apply_gives_what_the_ksampler_node_gives(make_model, run_node, pack, inputs):
    model = make_model()
    for solver in ("euler", "heun"):
        table = distil(run_node, pack, model, inputs, solver=solver, steps="8")[0]
        (patched,) = run_node(pack.ApplyLambdas, model=model, table=table, solver="any")
        latent = {"samples": torch.zeros(2, 4, 4, 4)}
        by_model = ksampler(patched, latent, sampler=solver)
        torch.testing.assert_close(by_model, dode_ksampler(run_node, pack, model, table, latent))
        assert rms(by_model, ksampler(model, latent, sampler=solver)) > 1e-3


def test_apply_leaves_other_runs_alone_and_says_why(make_model, run_node, pack, inputs, caplog):
    model = make_model()
    table = distil(run_node, pack, model, inputs)[0]
    (patched,) = run_node(pack.ApplyLambdas, model=model, table=table, solver="any")
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    for changes in ({"sampler": "dpmpp_2m"}, {"steps": 7}, {"scheduler": "simple"}):
        caplog.clear()
        assert torch.equal(ksampler(patched, latent, **changes), ksampler(model, latent, **changes))
        assert "λ is not applied" in caplog.text


def test_lambda_is_never_applied_twice(make_model, run_node, pack, inputs, caplog):
    model = make_model()
    table = distil(run_node, pack, model, inputs)[0]
    (patched,) = run_node(pack.ApplyLambdas, model=model, table=table, solver="any")
    (twice,) = run_node(pack.ApplyLambdas, model=patched, table=table, solver="any")
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    once = dode_ksampler(run_node, pack, model, table, latent)
    assert torch.equal(dode_ksampler(run_node, pack, patched, table, latent), once)
    torch.testing.assert_close(ksampler(twice, latent), once)
    again = distil(run_node, pack, patched, inputs)[0]
    for row, same in zip(again.rows, table.rows, strict=True):
        assert (row.weights == same.weights).all()
    assert "left out" in caplog.text


def test_a_part_where_the_solver_takes_other_steps_is_refused(make_model, run_node, pack, inputs):
    """heunpp2 looks ahead: stopped early, it asks other σ than over the whole schedule."""
    import comfy.samplers

    model = make_model()
    table = distil(run_node, pack, model, inputs, solver="heunpp2", steps="6")[0]
    sigmas = torch.tensor(table.rows[0].sigmas[:4], dtype=torch.float32)
    (patched,) = run_node(pack.ApplyLambdas, model=model, table=table, solver="any")
    (sampler,) = run_node(pack.DodeSampler, table=table, solver="any")
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for used, on in ((comfy.samplers.sampler_object("heunpp2"), patched), (sampler, model)):
        with pytest.raises(DodeError, match="cannot be stopped"):
            comfy.sample.sample_custom(
                on,
                noise,
                2.0,
                used,
                sigmas,
                inputs.positive,
                inputs.negative,
                torch.zeros_like(noise),
                seed=5,
            )


def test_a_run_that_fails_leaves_the_patched_model_clean(make_model, run_node, pack, inputs):
    model = make_model()
    table = distil(run_node, pack, model, inputs)[0]
    (patched,) = run_node(pack.ApplyLambdas, model=model, table=table, solver="any")
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    good = ksampler(patched, latent)

    def fail(evaluated: int) -> None:
        raise torch.OutOfMemoryError("no memory")

    model.model.on_call = fail
    with pytest.raises(torch.OutOfMemoryError):
        ksampler(patched, latent)
    model.model.on_call = None
    assert torch.equal(ksampler(patched, latent), good)


def test_img2img_runs_the_last_steps_of_the_row(make_model, run_node, pack, inputs):
    model = make_model()
    table = distil(run_node, pack, model, inputs)[0]
    (sigmas,) = run_node(pack.DodeSigmas, table=table, steps=8, denoise=0.5, solver="any")
    assert sigmas.tolist() == pytest.approx(table.rows[1].sigmas[4:].tolist(), rel=1e-6)
    latent = {"samples": torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))}
    zeroed = zero_table(model, "euler")
    half = dode_ksampler(run_node, pack, model, table, latent, denoise=0.5)
    assert 0 < rms(half, dode_ksampler(run_node, pack, model, zeroed, latent, denoise=0.5)) < 1
    assert torch.equal(dode_ksampler(run_node, pack, model, table, latent, denoise=0.0), latent["samples"])


@pytest.mark.parametrize("by", ["sampler", "model"])
@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_a_mask_keeps_what_the_stock_sampler_keeps(kind, by, make_model, run_node, pack, inputs):
    scheduler = "simple"
    model = make_model(kind)
    table = distil(run_node, pack, model, inputs, scheduler=scheduler)[0]
    picture = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    latent = {"samples": picture, "noise_mask": mask}
    stock = ksampler(model, latent, scheduler=scheduler, mask=mask)
    if by == "sampler":
        result = dode_ksampler(run_node, pack, model, table, latent)
    else:
        (patched,) = run_node(pack.ApplyLambdas, model=model, table=table, solver="any")
        result = ksampler(patched, latent, scheduler=scheduler, mask=mask)
    torch.testing.assert_close(result[..., 2:], stock[..., 2:], rtol=1e-4, atol=1e-4)
    assert rms(result[..., :2], stock[..., :2]) > 1e-3


@pytest.mark.parametrize(
    ("channels", "shape", "dimensions"), [(16, (1, 16, 4, 4), 2), (4, (1, 4, 3, 4, 4), 3)]
)
def test_other_latents(channels, shape, dimensions, make_model, run_node, pack, inputs):
    model = make_model("FLOW", channels, dimensions)
    latent = {"samples": torch.zeros(shape)}
    table = distil(run_node, pack, model, inputs, scheduler="simple", latent=latent)[0]
    assert table.model["channels"] == channels
    assert dode_ksampler(run_node, pack, model, table, latent).shape == shape


def test_a_batch_and_its_slices_agree(make_model, run_node, pack, inputs):
    """What LatentFromBatch hands on carries its place in the batch, and so its noise."""
    model = make_model()
    table = distil(run_node, pack, model, inputs)[0]
    whole = dode_ksampler(run_node, pack, model, table, {"samples": torch.zeros(3, 4, 4, 4)})
    for i in range(3):
        one = {"samples": torch.zeros(1, 4, 4, 4), "batch_index": [i]}
        torch.testing.assert_close(dode_ksampler(run_node, pack, model, table, one), whole[i : i + 1])


def test_micro_batches_and_prompts(make_model, run_node, pack, inputs):
    model = make_model()
    split = distil(run_node, pack, model, inputs, micro_batch=3, positive_2=conditioning(0.7), steps="6")[0]
    whole = distil(run_node, pack, model, inputs, micro_batch=8, positive_2=conditioning(0.7), steps="6")[0]
    torch.testing.assert_close(torch.tensor(split.rows[0].weights), torch.tensor(whole.rows[0].weights),
                               rtol=1e-3, atol=1e-3)  # fmt: skip
    assert split.rows[0].settings["prompts"] == 2
    batched = distil(
        run_node, pack, model, inputs, positive=conditioning(0.2, 0.7), steps="6", micro_batch=3
    )[0]
    torch.testing.assert_close(torch.tensor(batched.rows[0].weights), torch.tensor(whole.rows[0].weights),
                               rtol=1e-3, atol=1e-3)  # fmt: skip


REFINED = {"steps": "4", "latents": 6, "prediction": "noise", "refine_budget": 30.0}
"""Changes for a quick distillation with refinement."""


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
    [(0.1, []), (0.3, ["greedy"]), (0.5, ["greedy", "interrupted"]), (0.99, ["greedy", "whole"])],
)
def test_cancel_saves_what_was_found_and_the_next_run_works(
    part, saved, make_model, run_node, pack, inputs, lambdas_folder, caplog
):
    """In the teacher, before the first Jacobian, between Jacobians, in the results to look at."""
    import comfy.model_management

    counted = make_model()
    distil(run_node, pack, counted, inputs, save_name="sub/first", **REFINED)
    total = counted.model.evaluated

    model = make_model(on_call=cancel_at(int(part * total)))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        distil(run_node, pack, model, inputs, save_name="sub/cancelled", **REFINED)
    assert 0 < model.model.evaluated < total
    names = {path.name for path in (lambdas_folder / "sub").iterdir()}
    assert names == {"first.safetensors"} | ({"cancelled-partial.safetensors"} if saved else set())
    assert ("saved as cancelled-partial.safetensors" in caplog.text) == bool(saved)
    if saved:
        rows = LambdaTable.load(lambdas_folder / "sub" / "cancelled-partial.safetensors").rows
        assert [kind_of(row) for row in rows] == saved
    model.model.on_call = None
    distil(run_node, pack, model, inputs, save_name="next", **REFINED)


def kind_of(row: LambdaRow) -> str:
    if not row.is_refined:
        return "greedy"
    return "interrupted" if row.report["refined"].get("interrupted") else "whole"


def test_a_cancel_is_not_hidden_by_a_full_disk(
    make_model, run_node, pack, inputs, lambdas_folder, monkeypatch, caplog
):
    import comfy.model_management

    counted = make_model()
    distil(run_node, pack, counted, inputs, save_name="first", **REFINED)
    monkeypatch.setattr("os.fsync", full_disk)
    model = make_model(on_call=cancel_at(counted.model.evaluated * 2 // 3))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        distil(run_node, pack, model, inputs, save_name="second", **REFINED)
    assert [path.name for path in lambdas_folder.iterdir()] == ["first.safetensors"]
    assert "could not be saved" in caplog.text


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_and_leaves_no_part(
    make_model, run_node, pack, inputs, lambdas_folder, monkeypatch
):
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(TableError, match="No space left"):
        distil(run_node, pack, make_model(), inputs)
    assert list(lambdas_folder.iterdir()) == []


def test_an_unwritable_folder_is_found_before_sampling(make_model, run_node, pack, inputs, monkeypatch):
    def read_only(**kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    model = make_model()
    with pytest.raises(TableError, match="Read-only"):
        distil(run_node, pack, model, inputs)
    assert model.model.evaluated == 0


def test_a_taken_name_gets_a_number(make_model, run_node, pack, inputs, lambdas_folder):
    model = make_model()
    for _ in range(3):
        distil(run_node, pack, model, inputs, save_name="sub/name", steps="4")
    names = sorted(path.name for path in (lambdas_folder / "sub").iterdir())
    assert names == ["name.safetensors", "name_00001.safetensors", "name_00002.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": {"samples": torch.ones(1, 4, 4, 4)}}, "Empty Latent"),
        ({"latent": {"samples": torch.zeros(1, 4, 4, 4), "noise_mask": torch.ones(1, 4, 4)}}, "mask"),
        ({"steps": "eight"}, "steps must be"),
        ({"steps": "0"}, "steps must be"),
        ({"save_name": "../../escape"}, "not a name"),
        ({"save_name": "  "}, "not a name"),
        ({"latents": 2, "positive": conditioning(0.1, 0.2, 0.3)}, "at least 3 latents"),
        ({"sigmas": torch.tensor([1.0, 2.0, 0.0])}, "descend"),
        ({"sigmas": torch.tensor([5.0, 2.0, 1.0])}, "ends at σ = 0"),
        ({"solver": "euler_ancestral"}, "stochastic"),
        ({"teacher": "uni_pc"}, "teacher"),
        ({"refine_budget": 0.01}, "too small"),
        ({"refine_budget": 4.0, "steps": "1, 4"}, "no history to weigh"),
    ],
)
def test_bad_input_is_refused_before_any_evaluation(
    changes, message, make_model, run_node, pack, inputs, lambdas_folder
):
    model = make_model()
    with pytest.raises(DodeError, match=message):
        distil(run_node, pack, model, inputs, **changes)
    assert model.model.evaluated == 0
    assert not [path for path in lambdas_folder.rglob("*") if path.is_file()]


def test_no_row_names_what_there_is(make_model, run_node, pack, inputs):
    model = make_model()
    table = distil(run_node, pack, model, inputs)[0]
    with pytest.raises(DodeError, match=r"no row of 7 steps.*5 steps.*8 steps"):
        dode_ksampler(run_node, pack, model, table, inputs.latent, steps=7)
    with pytest.raises(DodeError, match="no row for the solver 'heun'"):
        dode_ksampler(run_node, pack, model, table, inputs.latent, solver="heun")


def test_another_familys_table_is_refused(make_model, run_node, pack, inputs):
    table = distil(run_node, pack, make_model("EPS"), inputs)[0]
    for other in (make_model("FLOW"), make_model("EPS", channels=16)):
        for call in (
            lambda other=other: dode_ksampler(
                run_node, pack, other, table, {"samples": torch.zeros(1, 4, 4, 4)}
            ),
            lambda other=other: run_node(pack.ApplyLambdas, model=other, table=table, solver="any"),
        ):
            with pytest.raises(DodeError, match="another kind of model"):
                call()


def test_another_checkpoint_guidance_or_size_is_remarked_once(make_model, run_node, pack, inputs, caplog):
    table = distil(run_node, pack, make_model(), inputs)[0]
    dode_ksampler(run_node, pack, make_model(), table, {"samples": torch.zeros(1, 4, 16, 16)}, cfg=6.0)
    (line,) = [record.getMessage() for record in caplog.records if "D-ODE" in record.getMessage()]
    assert "another checkpoint" in line
    assert "distilled at cfg 2, this is cfg 6" in line
    assert "latent size 4×4, this is 16×16" in line


def test_fingerprint_ignores_patches_and_number_format(make_model, pack):
    from dode_nodes.hosts.comfy.facts import fingerprint, model_facts, same_fingerprint

    with torch.inference_mode(False):
        model = make_model()
        original = fingerprint(model)
        weight = "diffusion_model.weight"
        patched = model.clone()
        patched.add_patches({weight: (torch.ones(16, 16),)}, 0.5)
        patched.patch_model(torch.device("cpu"))
        try:
            assert same_fingerprint(fingerprint(patched), original)
            assert model_facts(patched)["patches"] == {"weights": 1, "strengths": [0.5]}
        finally:
            patched.unpatch_model(torch.device("cpu"))
        model.model.diffusion_model.to(torch.bfloat16)
        assert same_fingerprint(fingerprint(model), original)
    assert not same_fingerprint(fingerprint(make_model()), original)


def test_compare_measures_against_the_teacher(make_model, run_node, pack, inputs):
    model = make_model()
    table = distil(run_node, pack, model, inputs)[0]
    grid, numbers, stock, dode, teacher = compare(run_node, pack, model, inputs, table, steps=8)
    errors = [rms(result["samples"], teacher["samples"]) for result in (stock, dode)]
    assert f"{errors[0]:.4f}" in numbers
    assert f"{errors[1]:.4f}" in numbers
    assert errors[1] < errors[0]
    assert grid.shape[-1] == 3


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_a_refined_row_is_sampled_as_the_library_samples_it(kind, make_model, run_node, pack, inputs):
    """By KSampler (D-ODE), by SamplerCustom, and through the patched model."""
    import comfy.sample
    import comfy.samplers

    model = make_model(kind)
    changes = REFINED | {"scheduler": "simple"}
    table, *_, teacher, dode, stock, summary = distil(run_node, pack, model, inputs, **changes)
    greedy, refined = table.rows
    assert (refined.solver, refined.form, refined.is_refined) == ("euler", "history", True)
    assert end_error(refined) < end_error(greedy)
    assert "refined end to end from euler" in summary
    errors = [rms(result["samples"], teacher["samples"]) for result in (stock, dode)]
    scale = 0.5  # the format's scale_factor
    assert errors == pytest.approx(
        [refined.report["error"][name] / scale for name in ("stock_end", "dode_end")], rel=1e-3
    )

    latent = {"samples": torch.zeros(3, 4, 4, 4)}
    result = dode_ksampler(run_node, pack, model, table, latent, steps=4)
    torch.testing.assert_close(result, by_the_library(refined, kind) / scale, rtol=1e-4, atol=1e-4)

    noise = comfy.sample.prepare_noise(latent["samples"], 5)
    (sigmas,) = run_node(pack.DodeSigmas, table=table, steps=4, denoise=1.0, solver="any")
    (sampler,) = run_node(pack.DodeSampler, table=table, solver="any")
    (patched,) = run_node(pack.ApplyLambdas, model=model, table=table, solver="any")
    for on, by in ((model, sampler), (patched, comfy.samplers.sampler_object("euler"))):
        custom = comfy.sample.sample_custom(
            on, noise, 2.0, by, sigmas, inputs.positive, inputs.negative, latent["samples"], seed=5
        )
        torch.testing.assert_close(custom, result, rtol=1e-5, atol=1e-5)
    half = dode_ksampler(run_node, pack, model, table, latent, steps=4, denoise=0.5)
    assert half.isfinite().all()


def test_the_cost_is_said_before_and_counted_down(make_model, run_node, pack, inputs, monkeypatch, caplog):
    import comfy.utils

    said, told = [], []
    model = make_model()

    def show(node_id: str, text: str) -> None:
        said.append((model.model.evaluated, text))

    monkeypatch.setattr("dode_nodes.hosts.comfy.session.show_text", show)
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, done, total, preview: told.append((done, total)),
    )
    with caplog.at_level("INFO"):
        distil(run_node, pack, model, inputs, **REFINED)
    evaluated, cost = said[0]
    assert evaluated == 0
    assert cost in caplog.text
    numbers = re.fullmatch(
        r"(\d+) evaluations: teacher \d+, students \d+, refining at most \d+ .*; then (\d+) for the results.*",
        cost,
    )
    assert said[1][0] > 0
    assert re.search(r"teacher: \d+ of \d+ evaluations, .* left", said[1][1])
    totals = {total for _, total in told}
    assert totals == {sum(map(int, numbers.groups()))}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] <= told[-1][1]


def test_a_time_is_said_in_words_that_suit_it(pack):
    from dode_nodes.hosts.comfy.messages import in_words

    assert [in_words(seconds) for seconds in (0.2, 99, 100, 3599, 11100)] == [
        "0 s", "99 s", "2 min", "1 h 0 min", "3 h 5 min",
    ]  # fmt: skip


def test_a_refined_row_serves_the_solver_it_began_with(make_model, run_node, pack, inputs, caplog):
    model = make_model()
    table = distil(run_node, pack, model, inputs, solver="dpmpp_2m", **REFINED)[0]
    (refined,) = [row for row in table.rows if row.is_refined]
    assert refined.solver == "euler"
    alone = LambdaTable([refined], model=table.model)
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    results = [
        dode_ksampler(run_node, pack, model, each, latent, steps=4, solver=solver)
        for each in (table, alone)
        for solver in ("any", "dpmpp_2m")
    ]
    assert all(torch.equal(result, results[0]) for result in results)

    caplog.clear()
    (patched,) = run_node(pack.ApplyLambdas, model=model, table=alone, solver="dpmpp_2m")
    stock = ksampler(model, latent, sampler="dpmpp_2m", steps=4)
    assert torch.equal(ksampler(patched, latent, sampler="dpmpp_2m", steps=4), stock)
    assert "Refined rows have σ of their own: use KSampler (D-ODE) or D-ODE sigmas" in caplog.text
    caplog.clear()
    ksampler(patched, latent, sampler="heun", steps=4)
    assert "λ is not applied" in caplog.text
    assert "σ of their own" not in caplog.text


def test_a_refined_row_is_compared_with_what_it_began_with(make_model, run_node, pack, inputs):
    model = make_model()
    table = distil(run_node, pack, model, inputs, **REFINED)[0]
    greedy, refined = (LambdaTable([row], model=table.model) for row in table.rows)
    of_greedy, of_refined = (compare(run_node, pack, model, inputs, each) for each in (greedy, refined))
    assert "D-euler, refined, 4 evaluations" in of_refined[1]
    assert "D-euler, 4 evaluations" in of_greedy[1]
    for stock, same in zip(of_refined[2::2], of_greedy[2::2], strict=True):  # stock and teacher
        assert torch.equal(stock["samples"], same["samples"])
    assert rms(of_refined[3]["samples"], of_refined[4]["samples"]) < rms(
        of_greedy[3]["samples"], of_greedy[4]["samples"]
    )

    unknown = dict(table.rows[1].report)
    unknown["refined"] = unknown["refined"] | {
        "from": {"solver": "<mine>", "solver_options": {}, "sigmas": table.rows[0].sigmas.tolist()}
    }
    odd = LambdaTable([dataclasses.replace(table.rows[1], report=unknown)], model=table.model)
    assert "euler, 4 evaluations" in compare(run_node, pack, model, inputs, odd)[1]


def test_a_two_stage_solver_keeps_its_schedule_when_refined(make_model, run_node, pack, inputs):
    model = make_model()
    table = distil(run_node, pack, model, inputs, solver="heun", **REFINED)[0]
    rows = [row for row in table.rows if row.is_refined]
    assert [(row.solver, row.form, row.has_own_sigmas) for row in rows] == [("heun", "lambda", False)]
    (patched,) = run_node(
        pack.ApplyLambdas, model=model, table=LambdaTable(rows, model=table.model), solver="any"
    )
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    torch.testing.assert_close(
        ksampler(patched, latent, sampler="heun", steps=4),
        dode_ksampler(run_node, pack, model, table, latent, steps=4),
    )


def test_solver_lists_are_what_the_probe_finds(pack):
    from dode_nodes.hosts.comfy import samplers

    students, teachers = samplers.student_names(), samplers.teacher_names()
    assert {"euler", "heun", "dpmpp_2m", "ipndm", "deis", "lms", "uni_pc", "dpm_solver_3"} <= set(students)
    assert not {"euler_ancestral", "dpm_adaptive", "euler_cfg_pp", "dpmpp_sde", "lcm"} & set(students)
    assert {"euler", "heun", "dpmpp_2m"} <= set(teachers)
    assert not {"uni_pc", "dpm_fast", "dpm_adaptive", "ipndm_v"} & set(teachers)


def test_a_sampler_of_another_pack_is_offered_and_distils(make_model, run_node, pack, inputs, monkeypatch):
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
                d = (
                    d / 4
                    + 3 / 4 * (x_middle - model(x_middle, middle * x.new_ones(len(x)), **extra_args)) / middle
                )
            x = x + step * d
        return x

    monkeypatch.setattr(k_diffusion, "sample_ralston", sample_ralston, raising=False)
    monkeypatch.setattr(comfy.samplers, "SAMPLER_NAMES", [*comfy.samplers.SAMPLER_NAMES, "ralston"])
    assert "ralston" in pack.DistillLambdas.INPUT_TYPES()["required"]["solver"][1]["options"]
    table = distil(run_node, pack, make_model(), inputs, solver="ralston", steps="6")[0]
    assert table.rows[0].evaluations == (2, 2, 2, 2, 2, 1)
