"""Latents in groups and micro-batches: nothing is lost, mixed up or shared by mistake."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dode_nodes import DodeError, Group, Latents
from dode_nodes.fit.latents import in_order, mean_squares, root_mean_square
from tests.oracles import two_peaks
from tests.toys import latents


def latents_of(*sizes, micro_batch=None):
    return Latents([Group(two_peaks, latents(size, seed=i)) for i, size in enumerate(sizes)], micro_batch)


def test_one_model_is_one_group():
    x = latents(3)
    subject = Latents.of(two_peaks, x, extra_args={"seed": 1}, micro_batch=2)
    (group,) = subject.groups
    assert group.model is subject.lender is two_peaks
    assert group.x is x
    assert group.extra_args == {"seed": 1}
    assert subject.micro_batch == 2


@pytest.mark.parametrize(
    ("model", "x", "why"),
    [
        (two_peaks, None, "floating-point tensor"),
        (None, latents(2), "a function model"),
        (two_peaks, latents(0), r"no elements: its shape is \(0, 2, 3, 3\)"),
        (two_peaks, latents(3)[:, 0, 0, 0], r"shape \[batch, channels"),
        (two_peaks, torch.ones(2, 3, dtype=torch.int64), "floating-point"),
        (two_peaks, "noise", "floating-point tensor"),
        (two_peaks, latents(2) * float("nan"), "NaN or infinite"),
        (two_peaks, latents(2) / 0, "NaN or infinite"),
    ],
)
def test_what_is_no_batch_of_latents_is_refused(model, x, why):
    with pytest.raises(DodeError, match=why):
        Latents.of(model, x)
    with pytest.raises(DodeError, match=why):
        Latents([Group(two_peaks, latents(2)), Group(model, x)])


@pytest.mark.parametrize(
    ("groups", "why"), [([], "the list of groups is empty"), ([two_peaks], "latents come in Groups")]
)
def test_what_are_no_groups_is_refused(groups, why):
    with pytest.raises(DodeError, match=why):
        Latents(groups)


@pytest.mark.parametrize("size", [None, 1, 2, 3, 100])
def test_micro_batches_cover_all_latents_in_groups_of_their_own(size):
    subject = latents_of(3, 1, 4, micro_batch=size)
    batches = subject.batches()
    assert all(len(batch.x) <= (size or 4) for batch in batches)
    assert torch.equal(torch.cat([batch.numbers for batch in batches]), torch.arange(8))
    for batch in batches:
        assert batch.group is subject.groups[batch.place]
        assert torch.equal(batch.x, batch.group.x[batch.indices])
        assert torch.equal(in_order(batches, [b.x for b in batches])[batch.numbers], batch.x)
    assert len(subject) == 8


def test_only_some_latents():
    subject = latents_of(3, 1, 4, micro_batch=2)
    batches = subject.batches(only=[0, 2, 5, 6, 7])
    assert [batch.numbers.tolist() for batch in batches] == [[0, 2], [5, 6], [7]]
    assert [batch.indices.tolist() for batch in batches] == [[0, 2], [1, 2], [3]]
    assert [batch.place for batch in batches] == [0, 2, 2]
    assert subject.batches(only=[]) == []


def test_order_is_that_of_the_latents_whatever_the_batches():
    batches = latents_of(3, 1, 4, micro_batch=2).batches()[::-1]
    assert torch.equal(in_order(batches, [batch.numbers for batch in batches]), torch.arange(8))


@pytest.mark.parametrize("size", [None, 1, 2])
def test_groups_of_different_shapes_come_back_as_they_were(size):
    groups = [Group(two_peaks, latents(n, *shape)) for n, shape in ((3, (2, 8, 8)), (1, (5,)), (2, (4, 6)))]
    subject = Latents(groups, size)
    batches = subject.batches()
    for found, group in zip(subject.by_group(batches, [b.x for b in batches]), groups, strict=True):
        assert torch.equal(found, group.x)


@pytest.mark.parametrize("size", [0, -1])
def test_micro_batch_below_one_is_refused(size):
    with pytest.raises(DodeError, match=f"micro_batch must be at least 1, got {size}"):
        latents_of(2, micro_batch=size)


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
    assert latents_of(*sizes).held_out == held


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_every_latent_is_either_held_out_or_fitted(sizes):
    subject = latents_of(*sizes)
    assert sorted([*subject.held_out, *subject.fitted]) == list(range(len(subject)))


def test_the_first_latents_to_be_fitted_are_of_all_groups():
    subject = latents_of(4, 1, 3)
    assert subject.held_out == [4, 7]
    assert subject.fitted == [0, 5, 1, 6, 2, 3]


def test_extra_args_are_fresh_for_every_run():
    leaf = object()
    extra_args = {"model_options": {"hooks": [leaf]}}
    (batch,) = Latents.of(two_peaks, latents(2), extra_args=extra_args).batches()
    args = batch.extra_args()
    assert args["model_options"]["hooks"][0] is leaf
    args["model_options"]["hooks"].append("mine")
    args["seed"] = 1
    assert batch.extra_args() == {"model_options": {"hooks": [leaf]}} == extra_args


def test_extra_args_by_index():
    labels = torch.arange(10, 15)
    group = Group(two_peaks, latents(5), lambda indices: {"labels": labels[indices]})
    batches = Latents([Group(two_peaks, latents(2)), group], 2).batches()
    assert [batch.extra_args() for batch in batches[:1]] == [{}]
    assert [batch.extra_args()["labels"].tolist() for batch in batches[1:]] == [[10, 11], [12, 13], [14]]


def test_dtype_is_the_widest_of_the_groups():
    narrow, wide = (Group(two_peaks, latents(1).to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert Latents([narrow, wide]).dtype == torch.float32
    assert Latents([narrow]).dtype == torch.bfloat16


def test_root_mean_square():
    x = torch.tensor([[3.0, -4.0]], dtype=torch.float16)
    assert root_mean_square(x) == pytest.approx(12.5**0.5)
    assert mean_squares(x).tolist() == [12.5]
