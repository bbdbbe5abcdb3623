"""Low-rank adapters beside a network's weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dode_nodes import DodeError
from dode_nodes.fit.low_rank import LowRank


def network() -> nn.Sequential:
    """Of every kind of layer that has an adapter, and two that have none."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 5),
    ]
    return nn.Sequential(*layers).double().requires_grad_(False)


def learned(adapters: LowRank) -> LowRank:
    """As if it had learned something."""
    with torch.no_grad():
        for i, parameter in enumerate(adapters.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return adapters


X = torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_at_first_and_at_strength_0_the_network_is_as_it_was() -> None:
    net = network()
    before, state = net(X), dict(net.state_dict())
    adapters = LowRank(net, 3)
    assert torch.equal(net(X), before)
    learned(adapters)
    assert not torch.allclose(net(X), before)
    adapters.strength = 0
    assert torch.equal(net(X), before)
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("strength", [1.0, 0.25, -0.5])
def test_it_is_the_network_with_its_product_in_the_weights(strength: float) -> None:
    """As every loader merges it: up times down, a kernel flattened."""
    beside, merged = network(), network()
    adapters = learned(LowRank(beside, 3))
    adapters.strength = strength
    factors = adapters.factors()
    assert list(factors) == ["0", "1", "3", "6"]  # no groups
    for name, (up, down, alpha) in factors.items():
        weight = merged.get_submodule(name).weight
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        weight += strength * alpha / len(down) * change.double()
    # Its numbers are float32, those of the merged weights rounded once more.
    assert torch.allclose(beside(X), merged(X), rtol=1e-5, atol=1e-5)


def test_only_the_adapters_learn_in_float32_whatever_the_network_is() -> None:
    net = network().to(torch.bfloat16)
    adapters = LowRank(net, 2)
    net(X.bfloat16()).sum().backward()
    assert all(parameter.dtype == torch.float32 for parameter in adapters.parameters())
    assert (
        sum(bool(parameter.grad.any()) for parameter in adapters.parameters()) == 4
    )  # of up: down is behind 0
    assert all(parameter.grad is None for parameter in net.parameters())


def test_no_rank_is_larger_than_its_layer_and_a_seed_decides_where_it_begins() -> None:
    ranks = {name: len(down) for name, (_, down, _) in LowRank(network(), 16).factors().items()}
    assert ranks == {"0": 8, "1": 8, "3": 4, "6": 5}
    one, same, other = (LowRank(network(), 2, seed).factors()["6"].down for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_part_can_be_left_as_it_is() -> None:
    net = nn.ModuleDict({"label": network(), "labels": nn.Linear(2, 2), "body": network()})
    names = LowRank(net, 1, without="label").factors().keys()
    assert [name.split(".")[0] for name in names] == ["labels", *["body"] * 4]


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_a_rank_is_a_whole_number(rank: int) -> None:
    with pytest.raises(DodeError, match="rank"):
        LowRank(network(), rank)


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(DodeError, match="no linear layer"):
        LowRank(nn.ReLU(), 2)
