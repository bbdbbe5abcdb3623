"""Latents in groups and micro-batches: nothing is lost, mixed up or shared by mistake."""

from __future__ import annotations

import pytest
import torch

from dode_nodes.errors import DodeError
from dode_nodes.groups import (
    Evaluator,
    Group,
    as_groups,
    count_latents,
    held_out,
    in_order,
    micro_batches,
    root_mean_square,
)
from tests.oracles import two_peaks
from tests.toys import Counting, latents


def groups_of(*sizes):
    return [Group(two_peaks, latents(size, seed=i)) for i, size in enumerate(sizes)]


def test_one_model_is_one_group():
    x = latents(3)
    (group,) = as_groups(two_peaks, x, {"seed": 1})
    assert group.model is two_peaks
    assert group.x is x
    assert group.extra_args == {"seed": 1}


@pytest.mark.parametrize(
    ("model", "x", "extra_args", "why"),
    [
        (two_peaks, None, None, "x is missing"),
        (groups_of(2), latents(2), None, "belong into the groups"),
        (groups_of(2), None, {"seed": 1}, "belong into the groups"),
        ([], None, None, "there are no latents"),
        (None, latents(2), None, "the model must be a function"),
        ([two_peaks], None, None, "the model must be a function"),
        ([*groups_of(2), Group(two_peaks, latents(2, 2, 5, 5))], None, None, "differ in shape"),
        (two_peaks, latents(0), None, r"no elements: its shape is \(0, 2, 3, 3\)"),
        (two_peaks, latents(3)[:, 0, 0, 0], None, r"shape \[batch, channels"),
        (two_peaks, torch.ones(2, 3, dtype=torch.int64), None, "floating-point"),
        (two_peaks, "noise", None, "floating-point tensor"),
        (two_peaks, latents(2) * float("nan"), None, "NaN or infinite"),
    ],
)
def test_what_is_no_batch_of_latents_is_refused(model, x, extra_args, why):
    with pytest.raises(DodeError, match=why):
        as_groups(model, x, extra_args)


@pytest.mark.parametrize("size", [None, 1, 2, 3, 100])
def test_micro_batches_cover_all_latents_in_groups_of_their_own(size):
    groups = groups_of(3, 1, 4)
    batches = micro_batches(groups, size)
    assert all(len(batch.x) <= (size or 4) for batch in batches)
    assert torch.equal(torch.cat([batch.numbers for batch in batches]), torch.arange(8))
    for batch in batches:
        assert torch.equal(batch.x, batch.group.x[batch.indices])
        assert torch.equal(in_order(batches, [b.x for b in batches])[batch.numbers], batch.x)
    assert count_latents(groups) == 8


def test_only_some_latents():
    groups = groups_of(3, 1, 4)
    batches = micro_batches(groups, 2, only=[0, 2, 5, 6, 7])
    assert [batch.numbers.tolist() for batch in batches] == [[0, 2], [5, 6], [7]]
    assert [batch.indices.tolist() for batch in batches] == [[0, 2], [1, 2], [3]]
    assert micro_batches(groups, 2, only=[]) == []


def test_order_is_that_of_the_latents_whatever_the_batches():
    batches = micro_batches(groups_of(3, 1, 4), 2)[::-1]
    assert torch.equal(in_order(batches, [batch.numbers for batch in batches]), torch.arange(8))


@pytest.mark.parametrize("size", [0, -1])
def test_micro_batch_below_one_is_refused(size):
    with pytest.raises(DodeError, match=f"micro_batch must be at least 1, got {size}"):
        micro_batches(groups_of(2), size)


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ([1], []),
        ([2], [1]),
        ([7], [6]),
        ([8], [6, 7]),
        ([16], [12, 13, 14, 15]),
        ([1, 1], [1]),
        ([3, 4], [6]),
        ([4, 4], [3, 7]),
        ([1] * 8, [6, 7]),
        ([2, 6], [1, 7]),
        ([1, 7, 8], [0, 7, 14, 15]),
    ],
)
def test_a_quarter_of_the_latents_is_held_out_spread_over_groups(sizes, held):
    assert held_out(groups_of(*sizes)) == held


def test_extra_args_are_fresh_for_every_run():
    leaf = object()
    group = Group(two_peaks, latents(2), {"model_options": {"hooks": [leaf]}})
    (batch,) = micro_batches([group], None)
    args = batch.extra_args()
    assert args["model_options"]["hooks"][0] is leaf
    args["model_options"]["hooks"].append("mine")
    args["seed"] = 1
    assert batch.extra_args() == {"model_options": {"hooks": [leaf]}} == group.extra_args


def test_extra_args_by_index():
    labels = torch.arange(10, 15)
    group = Group(two_peaks, latents(5), lambda indices: {"labels": labels[indices]})
    batches = micro_batches([Group(two_peaks, latents(2)), group], 2)
    assert [batch.extra_args() for batch in batches[:1]] == [{}]
    assert [batch.extra_args()["labels"].tolist() for batch in batches[1:]] == [[10, 11], [12, 13], [14]]


def test_evaluator_counts_latents_and_tells():
    told = []
    evaluator = Evaluator(told.append, before=10, total=12)
    batches = micro_batches(groups_of(3, 2), None)
    for batch in batches:
        evaluator.on(batch, "student")(batch.x, torch.full((len(batch.x),), 2.0))
    assert [(p.stage, p.done, p.total) for p in told] == [("student", 13, 13), ("student", 15, 15)]
    assert [len(p.denoised) for p in told] == [3, 2]
    assert evaluator.spent() == 5


def test_evaluator_lends_the_models_attributes():
    model = Counting()
    (batch,) = micro_batches([Group(model, latents(2))], None)
    assert Evaluator().on(batch, "teacher").inner_model is model.inner_model


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda x: x * float("nan"), r"NaN or infinite values at σ = 2 \(teacher\).* fp32 or bf16"),
        (lambda x: x / 0, "NaN or infinite"),
        (lambda x: x[:1], r"must return the denoised latents, \(2, 2, 3, 3\); it returned \(1, 2, 3, 3\)"),
        (lambda x: (x, None), "it returned tuple"),
    ],
)
def test_wrong_answer_of_a_model_is_told(answer, why):
    told = []
    (batch,) = micro_batches([Group(lambda x, sigma: answer(x), latents(2))], None)
    with pytest.raises(DodeError, match=why):
        Evaluator(told.append).on(batch, "teacher")(batch.x, torch.full((2,), 2.0))
    assert told == []


def test_root_mean_square():
    assert root_mean_square(torch.tensor([[3.0, -4.0]], dtype=torch.float16)) == pytest.approx(12.5**0.5)
