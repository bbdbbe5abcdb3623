"""Low-rank adapters beside the frozen weights of a network (LoRA, Hu et al. 2022, arXiv:2106.09685).

By forward hooks, on whatever is a plain module: also on networks that a host loads and patches in ways of its own.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import DodeError
from ..tables.lora_file import Factors


class LowRank:
    """Every linear layer and convolution adds ``strength`` · up(down(x)) to what it gives: W + strength · up·down.

    At first up is 0, so nothing changes. The network's own weights, names and state_dict stay as they are.

    Args:
        network: whose layers.
        rank: of each product; a layer with fewer inputs or outputs gets no more than those.
        seed: of the first numbers of down.
        without: the name of a part whose layers stay as they are; none where it is empty.
        device: where the adapters learn; None for where the network is.

    Raises:
        DodeError: the rank is no whole number of at least 1, or no layer can have an adapter.

    Attributes:
        strength: 0 for the network as it was.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        seed: int = 0,
        *,
        without: str = "",
        device: torch.device | None = None,
    ) -> None:
        if type(rank) is not int or rank < 1:
            raise DodeError(f"the rank of a LoRA must be a whole number of at least 1, not {rank}")
        self.strength = 1.0
        generator = torch.Generator().manual_seed(seed)
        self._layers = {
            name: _Layer(module, rank, generator, device or module.weight.device)
            for name, module in network.named_modules()
            if _can_be_adapted(module) and not (without and name.startswith(f"{without}."))
        }
        if not self._layers:
            raise DodeError("this network has no linear layer and no convolution that a LoRA could change")
        self._hooks = [
            layer.module.register_forward_hook(self._hook(layer)) for layer in self._layers.values()
        ]

    def remove(self) -> None:
        """Take the adapters off the network; their numbers stay."""
        for hook in self._hooks:
            hook.remove()

    def parameters(self) -> list[nn.Parameter]:
        """Of all adapters, float32."""
        return [parameter for layer in self._layers.values() for parameter in (layer.up, layer.down)]

    def factors(self) -> dict[str, Factors]:
        """The adapters by the names of their layers."""
        return {
            name: Factors(layer.up.detach(), layer.down.detach(), float(len(layer.down)))
            for name, layer in self._layers.items()
        }

    def _hook(self, layer: _Layer):  # type: ignore[no-untyped-def]  # what torch types as Any
        def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return output if self.strength == 0 else output + self.strength * layer(inputs[0])

        return add


def _can_be_adapted(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


class _Layer:
    """The adapter of one layer.

    Attributes:
        down: ``[rank, in, *kernel]``.
        up: ``[out, rank]``, for a convolution ``[out, rank, 1, 1]``.
    """

    def __init__(
        self, module: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator, device: torch.device
    ) -> None:
        # By what the layer says: a quantised weight may have another shape than the one that it stands for.
        inputs, outputs, kernel = (
            (module.in_features, module.out_features, ())
            if isinstance(module, nn.Linear)
            else (module.in_channels, module.out_channels, module.kernel_size)
        )
        rank = min(rank, inputs * math.prod(kernel), outputs)
        bound = 1 / math.sqrt(inputs * math.prod(kernel))  # as torch begins a linear layer
        first = torch.rand(rank, inputs, *kernel, generator=generator) * 2 * bound - bound
        last = torch.zeros(outputs, rank, *[1] * len(kernel))
        self.module = module
        self.down = nn.Parameter(first.to(device))
        self.up = nn.Parameter(last.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x), self.up.to(x)
        if isinstance(self.module, nn.Linear):
            return functional.linear(functional.linear(x, down), up)
        convolution = self.module
        inner = functional.conv2d(
            x, down, None, convolution.stride, convolution.padding, convolution.dilation
        )
        return functional.conv2d(inner, up)
