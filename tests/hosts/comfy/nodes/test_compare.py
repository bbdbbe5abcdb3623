"""Compare samplers: a row between its plain solver and its teacher."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from dode_nodes import DodeError, LambdaTable
from dode_nodes.sampling.solvers import resolve
from dode_nodes.tables.provenance import Origin
from tests.hosts.comfy.node_calls import REFINED, empty, rms, sample_custom, zero_table

pytestmark = pytest.mark.comfyui


def without_best_stock(table):
    rows = [dataclasses.replace(row, best_stock=None) for row in table.rows]
    return LambdaTable(rows, model=table.model)


@pytest.mark.slow_host  # a choice of the pack's: what it runs is a case of each host
def test_the_best_stock_setting_of_the_table_is_what_a_row_has_to_beat(make_model, dode):
    model = make_model()
    table = dode.table(model, **REFINED)
    setting = table.rows[0].best_stock
    _, numbers, stock, by_dode, teacher = dode.compare(model, table, pictures=6)
    assert numbers.startswith(f"best stock: {setting.sampler}, {setting.scheduler}")
    solver, options = setting.solver_and_options()
    make_sigmas = job().schedules_of(model)
    sigmas = make_sigmas(setting.scheduler, 4, setting.discard_penultimate)
    sampler = comfy_sampler(solver, options)
    by_host = sample_custom(model, sampler, sigmas, empty(6), seed=99)
    assert rms(stock["samples"], by_host) < 1e-5
    near, far = (rms(each["samples"], teacher["samples"]) for each in (by_dode, stock))
    assert near < far
    needed = re.search(
        r"D-ODE with 4 evaluations is as near as the stock sampler with (more than 8|\d)", numbers
    )
    if needed[1] != "more than 8":
        count = int(needed[1])
        for steps, enough in ((count, True), (count - 1, False)):
            sigmas = make_sigmas(setting.scheduler, steps, setting.discard_penultimate)
            made = sample_custom(model, sampler, sigmas, empty(6), seed=99)
            assert (rms(made, teacher["samples"]) <= near) == enough
    assert re.search(r"of 6 previews, \d are nearest to their own finished picture", numbers)


def test_a_chosen_sampler_is_what_a_row_has_to_beat(make_model, dode):
    model = make_model()
    table = dode.table(model)
    sigmas = job().schedule(model, "heun", "simple", 3).sigmas
    chosen = {"stock_sampler": comfy_sampler("heun", {}), "stock_sigmas": sigmas}
    _, numbers, stock, *_ = dode.compare(model, table, steps=5, **chosen)
    assert numbers.startswith("chosen: heun, 3 ")
    assert (
        rms(stock["samples"], sample_custom(model, chosen["stock_sampler"], sigmas, empty(3), seed=99)) < 1e-5
    )
    for name in chosen:
        with pytest.raises(DodeError, match="connect both stock_sampler and stock_sigmas, or neither"):
            dode.compare(model, table, steps=5, **{name: chosen[name]})


def job():
    from dode_nodes.hosts.comfy import job

    return job


def comfy_sampler(solver, options):
    import comfy.samplers

    return comfy.samplers.KSAMPLER(resolve(solver), dict(options))


def test_compare_measures_against_the_teacher(make_model, dode, drawn):
    model = make_model()
    table = without_best_stock(dode.table(model))
    drawn.clear()
    grid, numbers, stock, by_dode, teacher = dode.compare(model, table, steps=8)
    errors = [rms(result["samples"], teacher["samples"]) for result in (stock, by_dode)]
    assert f"{errors[0]:.4f}" in numbers
    assert f"{errors[1]:.4f}" in numbers
    assert errors[1] < errors[0]
    assert grid.shape[-1] == 3
    assert len(drawn) == 1


def test_the_teacher_is_the_same_wherever_a_fit_began(make_model, dode):
    """With as many steps along other schedules it may end far from the converged solution, and be no measure."""
    model = make_model()
    tables = [zero_table(model, "euler", steps=4, scheduler=name) for name in ("karras", "exponential")]
    (*_, stock, _, teacher), (*_, other_stock, _, same) = (dode.compare(model, table) for table in tables)
    assert torch.equal(teacher["samples"], same["samples"])
    assert not torch.equal(stock["samples"], other_stock["samples"])


@pytest.mark.slow_host  # likewise
def test_a_refined_row_is_compared_with_what_it_began_with(make_model, dode):
    model = make_model()
    table = dode.table(model, **REFINED)
    greedy, refined = (without_best_stock(LambdaTable([row], model=table.model)) for row in table.rows)
    of_greedy, of_refined = (dode.compare(model, each) for each in (greedy, refined))
    assert "D-euler, refined, 4 evaluations" in of_refined[1]
    assert "D-euler, 4 evaluations" in of_greedy[1]
    for stock, same in zip(of_refined[2::2], of_greedy[2::2], strict=True):  # stock and teacher
        assert torch.equal(stock["samples"], same["samples"])
    assert rms(of_refined[3]["samples"], of_refined[4]["samples"]) < rms(
        of_greedy[3]["samples"], of_greedy[4]["samples"]
    )

    unknown = Origin("refined", "<mine>", {}, table.rows[0].sigmas)
    odd = LambdaTable([dataclasses.replace(table.rows[1], origin=unknown)], model=table.model)
    assert "euler, 4 evaluations" in dode.compare(model, without_best_stock(odd))[1]


def test_a_teacher_that_this_comfyui_lacks_gives_way_to_the_usual_one(make_model, dode, monkeypatch):
    import comfy.samplers

    model = make_model()
    table = zero_table(model, "euler", steps=4)
    settings = {"teacher": "of_another_pack"}
    row = dataclasses.replace(table.rows[0], settings=settings)
    shown = []
    monkeypatch.setattr(
        "dode_nodes.hosts.comfy.nodes.compare.comparison_figure", lambda labels, *_: shown.append(labels)
    )
    odd, usual = (
        dode.compare(model, dataclasses.replace(table, rows=[each])) for each in (row, table.rows[0])
    )
    assert "of_another_pack" not in comfy.samplers.SAMPLER_NAMES
    assert shown[0] == shown[1]
    assert shown[0][-1] == "teacher: dpmpp_2m, 40 steps"
    for result, same in zip(odd[2:], usual[2:], strict=True):
        assert torch.equal(result["samples"], same["samples"])
