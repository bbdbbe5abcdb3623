"""Schedules are checked before anything is run on them; σ are compared to the precision they have."""

from __future__ import annotations

import pytest
import torch

from dode_nodes.errors import DodeError
from dode_nodes.sigmas import check_schedules, check_sigmas, distinct, equal_sigma, is_flow, same_sigma
from tests.toys import karras, uniform


@pytest.mark.parametrize(
    ("sigmas", "why"),
    [
        (torch.tensor([]), r"at least two entries \(one step\), not 0"),
        (torch.tensor([3.0]), r"at least two entries \(one step\), not 1"),
        (torch.tensor([3.0, 1.0, 2.0, 0.0]), r"ascends at 1 → 2: 1, 2"),
        (torch.tensor([3.0, 1.0, 1.0, 0.0]), r"is repeated at 1 → 2: 1, 1"),
        (torch.tensor([3.0, 1.0, -1.0]), "not negative"),
        (torch.tensor([3.0, float("nan"), 0.0]), "finite"),
        (torch.tensor([float("inf"), 1.0, 0.0]), "finite"),
        (torch.tensor([3, 1, 0]), "floating-point"),
        (torch.tensor([[3.0, 1.0]]), "one-dimensional"),
        ([3.0, 1.0], "tensor"),
    ],
)
def test_what_is_no_schedule_is_refused(sigmas, why):
    with pytest.raises(DodeError, match=why):
        check_sigmas(sigmas)


def test_schedules_of_students_end_at_zero_and_begin_together():
    check_schedules([karras(5), karras(8)])
    with pytest.raises(DodeError, match="at least one schedule"):
        check_schedules([])
    with pytest.raises(DodeError, match=r"must end at σ = 0, not at 0\.05"):
        check_schedules([karras(5), karras(5)[:-1]])
    with pytest.raises(DodeError, match="must start at the same σ"):
        check_schedules([karras(5), karras(5, sigma_max=14.0)])


def test_float32_schedules_are_the_same():
    for sigma in karras(20).tolist():
        assert same_sigma(sigma, float(torch.tensor(sigma, dtype=torch.float32)))
    assert not same_sigma(1.0, 1.001)
    assert not same_sigma(0.0, 1e-9)


def test_distinct_sigmas_are_listed_once():
    assert distinct([1.0, 3.0, 0.0, 1.0 + 1e-7, 2.0, 0.0]) == [3.0, 2.0, 1.0 + 1e-7, 0.0]
    assert equal_sigma(1.0, 1.0 + 1e-7)
    assert not equal_sigma(1.0, 1.0 + 1e-4)


def test_flow_schedules_begin_at_one():
    assert is_flow(uniform(5))
    assert not is_flow(karras(5))
