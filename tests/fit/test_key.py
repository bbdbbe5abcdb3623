"""Keys of fits: the same parts have the same key, and whatever differs in content has another one."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dode_nodes.fit import key
from dode_nodes.fit.key import NoKey, key_of

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.floats(width=32), max_size=3).map(lambda numbers: torch.tensor(numbers)),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
PARTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=4)


def shuffled(value: Any) -> Any:
    """The same with every mapping the other way round, lists as tuples and tensors copied."""
    if isinstance(value, dict):
        return {name: shuffled(each) for name, each in reversed(value.items())}
    if isinstance(value, list):
        return tuple(map(shuffled, value))
    return value.clone() if isinstance(value, Tensor) else value


def changed(value: Any) -> Any:
    """Something else, at the deepest first place."""
    if isinstance(value, dict) and value:
        name, *_ = value
        return value | {name: changed(value[name])}
    if isinstance(value, list) and value:
        return [changed(value[0]), *value[1:]]
    if isinstance(value, Tensor) and len(value):
        return torch.cat([torch.where(value[:1] == 1.5, 2.5, 1.5), value[1:]])
    return "another" if value != "another" else "yet another"


@settings(max_examples=150, deadline=None)
@given(PARTS)
def test_the_order_of_entries_does_not_count(parts):
    assert key_of(parts) == key_of(shuffled(parts))


@settings(max_examples=150, deadline=None)
@given(PARTS.filter(bool))
def test_any_change_makes_another_key(parts):
    assert key_of(changed(parts)) != key_of(parts)
    assert key_of(parts | {"more": None}) != key_of(parts)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2], [2, 1]),
        ([[1], 2], [1, [2]]),
        ("1", 1),
        (True, 1),
        (4, 4.0),
        (0.1, math.nextafter(0.1, 1)),
        ({"a": 1}, [["a", 1]]),
        ({"mapping": []}, {}),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.float16, torch.bfloat16),
        (math.inf, "inf"),
        ({1, 2}, [1, 2]),
        (Enum("Kind", "A B").A, Enum("Kind", "A B").B),
    ],
)
def test_what_is_alike_is_told_apart(one, other):
    assert key_of({"it": one}) != key_of({"it": other})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_tensors_count_by_content(dtype):
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).to(dtype)
    same = torch.stack([x, x], dim=-1)[..., 1]  # with other strides
    assert key_of({"x": x}) == key_of({"x": same}) == key_of({"x": torch.nn.Parameter(x, False)})
    assert key_of({"x": x}) != key_of({"x": x.T})


class _Tagged(Tensor):
    pass


@pytest.mark.parametrize(
    "value",
    [
        object(),
        lambda x: x,
        torch.nn.Linear(2, 2),
        torch.empty(2, device="meta"),
        torch.eye(2).to_sparse(),
        torch.zeros(2).as_subclass(_Tagged),
    ],
)
def test_what_cannot_be_compared_has_no_key(value):
    with pytest.raises(NoKey):
        key_of({"deep": [{"in": value}]})


def test_a_circle_has_no_key():
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(NoKey):
        key_of({"it": circle})


def test_a_host_says_what_it_knows():
    thing = object()
    assert key_of({"it": thing}, lambda value: {"a": 1}) == key_of({"it": {"a": 1}})


def test_another_version_of_the_fit_has_other_keys(monkeypatch):
    before = key_of({"it": 1})
    monkeypatch.setattr(key, "FIT_VERSION", key.FIT_VERSION + 1)
    assert key_of({"it": 1}) != before
