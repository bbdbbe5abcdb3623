"""Compare samplers: a row between its plain solver and its teacher."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dode_nodes import LambdaTable
from dode_nodes.tables.provenance import Origin
from tests.hosts.comfy.node_calls import REFINED, rms, zero_table

pytestmark = pytest.mark.comfyui


def test_compare_measures_against_the_teacher(make_model, dode, drawn):
    model = make_model()
    table = dode.table(model)
    drawn.clear()
    grid, numbers, stock, by_dode, teacher = dode.compare(model, table, steps=8)
    errors = [rms(result["samples"], teacher["samples"]) for result in (stock, by_dode)]
    assert f"{errors[0]:.4f}" in numbers
    assert f"{errors[1]:.4f}" in numbers
    assert errors[1] < errors[0]
    assert grid.shape[-1] == 3
    assert len(drawn) == 1


def test_a_refined_row_is_compared_with_what_it_began_with(make_model, dode):
    model = make_model()
    table = dode.table(model, **REFINED)
    greedy, refined = (LambdaTable([row], model=table.model) for row in table.rows)
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
    assert "euler, 4 evaluations" in dode.compare(model, odd)[1]


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
