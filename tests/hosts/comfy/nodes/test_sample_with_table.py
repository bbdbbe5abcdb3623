"""KSampler (D-ODE), D-ODE sampler and D-ODE sigmas: what they sample, and which row they take."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dode_nodes import DodeError, LambdaRow, LambdaTable
from dode_nodes.tables.provenance import HeldOutErrors
from tests.hosts.comfy.node_calls import (
    LATENT_SCALE,
    REFINED,
    by_the_library,
    empty,
    filled,
    ksampler,
    rms,
    sample_custom,
    zero_table,
)

pytestmark = pytest.mark.comfyui


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_ksampler_equals_the_library_without_comfyui(kind, make_model, dode):
    model = make_model(kind)
    table = dode.table(model, scheduler="simple", prediction="noise")
    expected = by_the_library(table.rows[1], kind) / LATENT_SCALE
    torch.testing.assert_close(dode.ksampler(model, table, empty(3)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_2", "dpmpp_2m", "ipndm", "deis", "lms", "res_multistep",
                                    "gradient_estimation", "dpm_fast", "uni_pc"])  # fmt: skip
def test_zero_lambda_is_comfyuis_sampler_bit_for_bit(solver, make_model, dode):
    model = make_model()
    table = zero_table(model, solver)
    stock = ksampler(model, empty(2), sampler=solver)
    assert torch.equal(dode.ksampler(model, table, empty(2)), stock)
    sigmas = dode.sigmas(table, steps=8, solver=solver)
    assert torch.equal(sample_custom(model, dode.sampler(table, solver), sigmas, empty(2)), stock)
    assert torch.equal(ksampler(dode.apply(model, table), empty(2), sampler=solver), stock)


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_a_refined_row_is_sampled_as_the_library_samples_it(kind, make_model, dode):
    """By KSampler (D-ODE), by SamplerCustom, and through the patched model."""
    model = make_model(kind)
    table, *_, teacher, by_dode, by_stock, summary = dode.distil(model, **REFINED | {"scheduler": "simple"})
    greedy, refined = table.rows
    assert (refined.solver, refined.form, refined.is_refined) == ("euler", "history", True)
    assert refined.error_from() < greedy.error_from()
    assert "refined end to end from euler" in summary
    errors = [rms(result["samples"], teacher["samples"]) * LATENT_SCALE for result in (by_stock, by_dode)]
    assert errors == pytest.approx([refined.best_stock.error, refined.error_from()], rel=1e-3)

    result = dode.ksampler(model, table, empty(3), steps=4)
    torch.testing.assert_close(result, by_the_library(refined, kind) / LATENT_SCALE, rtol=1e-4, atol=1e-4)

    sigmas = dode.sigmas(table, steps=4)
    for on, by in ((model, dode.sampler(table)), (dode.apply(model, table), "euler")):
        torch.testing.assert_close(sample_custom(on, by, sigmas, empty(3)), result, rtol=1e-5, atol=1e-5)
    assert dode.ksampler(model, table, empty(3), steps=4, denoise=0.5).isfinite().all()


def test_img2img_runs_the_last_steps_of_the_row(make_model, dode, on_the_node):
    model = make_model()
    table = dode.table(model)
    sigmas = dode.sigmas(table, steps=8, denoise=0.5)
    assert sigmas.tolist() == pytest.approx(table.rows[1].sigmas[4:].tolist(), rel=1e-6)
    plain = dode.ksampler(model, zero_table(model, "euler"), filled(), denoise=0.5)
    for stock_error, shown in ((9.0, 0), (0.0, 1)):
        judged = where_stock_was(stock_error, table)
        half = dode.ksampler(model, judged, filled(), denoise=0.5)
        assert torch.equal(half, plain) == (stock_error == 0)
        assert rms(half, plain) < 1
        assert sum("the stock sampler euler runs: here it is nearer" in line for line in on_the_node) == shown
    assert torch.equal(dode.ksampler(model, table, filled(), denoise=0.0), filled()["samples"])


def where_stock_was(error: float, table: LambdaTable) -> LambdaTable:
    """The table, if the plain solver's error from all later starts were this."""
    rows = [
        dataclasses.replace(
            row, errors=dataclasses.replace(row.errors, later_stock=[error] * (row.steps - 1))
        )
        for row in table.rows
    ]
    return dataclasses.replace(table, rows=rows)


def rivals(model: Any) -> LambdaTable:
    """Two rows of one schedule: the first does better as a whole, the second where four steps are run."""
    plain = zero_table(model, "euler")
    rows = [
        dataclasses.replace(
            plain.rows[0],
            weights=[0.0, *[weight] * 7],
            errors=HeldOutErrors(4, (whole, None, None, None, last_four, None, None, None), 0.3),
        )
        for weight, whole, last_four in ((0.2, 0.1, 0.5), (-0.2, 0.2, 0.4))
    ]
    return dataclasses.replace(plain, rows=rows)


@pytest.mark.parametrize(("denoise", "better"), [(1.0, 0), (0.5, 1)])
def test_the_row_is_taken_that_is_better_over_the_steps_that_are_run(
    denoise, better, make_model, dode, monkeypatch
):
    from dode_nodes.hosts.comfy.nodes import sample_with_table

    model = make_model()
    table = rivals(model)
    by_either = [
        dode.ksampler(model, dataclasses.replace(table, rows=[row]), filled(), denoise=denoise)
        for row in table.rows
    ]
    assert rms(*by_either) > 1e-3

    sigmas = dode.sigmas(table, steps=8, denoise=denoise)
    by_custom = sample_custom(model, dode.sampler(table), sigmas, filled())
    assert torch.equal(by_custom, by_either[better])

    chosen = []
    choose = sample_with_table.part_for_steps
    monkeypatch.setattr(
        sample_with_table,
        "part_for_steps",
        lambda *args, **how: chosen.append(choose(*args, **how)) or chosen[-1],
    )
    monkeypatch.delattr(LambdaTable, "match")  # nothing looks for a row again once it is chosen
    assert torch.equal(dode.ksampler(model, table, filled(), denoise=denoise), by_either[better])
    assert [part.row for part in chosen] == [table.rows[better]]


def test_no_sigma_is_no_step(make_model, dode):
    model = make_model()
    table = zero_table(model, "euler")
    sampler = dode.sampler(table)
    sigmas = dode.sigmas(table, steps=8, denoise=0.0)
    assert len(sigmas) == 0
    assert torch.equal(sample_custom(model, sampler, sigmas, filled()), filled()["samples"])


def test_a_batch_and_its_slices_agree(make_model, dode):
    """What LatentFromBatch hands on carries its place in the batch, and so its noise."""
    model = make_model()
    table = dode.table(model)
    whole = dode.ksampler(model, table, empty(3))
    for i in range(3):
        one = dode.ksampler(model, table, empty() | {"batch_index": [i]})
        torch.testing.assert_close(one, whole[i : i + 1])


def test_a_refined_row_serves_the_solver_it_began_with(make_model, dode, caplog):
    model = make_model()
    table = dode.table(model, solver="dpmpp_2m", **REFINED)
    (refined,) = [row for row in table.rows if row.is_refined]
    assert refined.solver == "euler"
    alone = LambdaTable([refined], model=table.model)
    results = [
        dode.ksampler(model, each, empty(), steps=4, solver=solver)
        for each in (table, alone)
        for solver in ("any", "dpmpp_2m")
    ]
    assert all(torch.equal(result, results[0]) for result in results)

    caplog.clear()
    patched = dode.apply(model, alone, "dpmpp_2m")
    stock = ksampler(model, empty(), sampler="dpmpp_2m", steps=4)
    assert torch.equal(ksampler(patched, empty(), sampler="dpmpp_2m", steps=4), stock)
    assert "Refined rows have their own σ: use KSampler (D-ODE) or D-ODE sigmas" in caplog.text
    caplog.clear()
    ksampler(patched, empty(), sampler="heun", steps=4)
    assert "λ is not applied" in caplog.text
    assert "their own σ" not in caplog.text


def test_no_row_names_what_there_is(make_model, dode):
    model = make_model()
    rows = [zero_table(model, "euler", steps).rows[0] for steps in (5, 8)]
    table = LambdaTable(rows)
    with pytest.raises(DodeError, match="another number of steps than 7: this table has 5 and 8 steps"):
        dode.ksampler(model, table, empty(), steps=7, strict=True)
    with pytest.raises(DodeError, match="no row for the solver 'heun'"):
        dode.ksampler(model, table, empty(), solver="heun")
    with pytest.raises(DodeError, match=r"no row's schedule contains these σ.*5 steps.*8 steps"):
        sample_custom(model, dode.sampler(table), torch.tensor([9.0, 1.0, 0.0]), empty())


def test_the_nearest_row_runs_and_that_is_said(make_model, dode, caplog):
    model = make_model()
    table = LambdaTable([zero_table(model, "euler", steps).rows[0] for steps in (5, 8)])
    by_eight = dode.ksampler(model, table, empty(), steps=8)
    assert not caplog.records
    assert torch.equal(dode.ksampler(model, table, empty(), steps=7), by_eight)
    (line,) = [record.getMessage() for record in caplog.records if "D-ODE" in record.getMessage()]
    assert "8 steps are run, not 7: this table has 5 and 8 steps" in line
    assert len(dode.sigmas(table, 6)) == 6


def test_another_checkpoint_guidance_or_size_is_remarked_once(make_model, dode, caplog):
    table = dode.table(make_model())
    dode.ksampler(make_model(), table, {"samples": torch.zeros(1, 4, 16, 16)}, cfg=6.0)
    (line,) = [record.getMessage() for record in caplog.records if "D-ODE" in record.getMessage()]
    assert "another checkpoint" in line
    assert "distilled at cfg 2, this is cfg 6" in line
    assert "distilled at 32×32, this is 128×128" in line


def test_a_solver_that_this_comfyui_lacks_is_named(make_model, dode):
    model = make_model()
    row = LambdaRow("of_another_pack", [10.0, 1.0, 0.0], (1, 1), [0.0, 0.1])
    with pytest.raises(DodeError, match="of_another_pack"):
        dode.ksampler(model, LambdaTable([row]), empty(), steps=2)
