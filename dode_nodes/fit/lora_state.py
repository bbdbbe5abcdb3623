"""Where the training of a LoRA is, as it is kept: one that was ended goes on with it, and finds the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..tables.kept import Kept

_NOW, _BEST, _NEAREST, _ADAM = "now", "best", "nearest", "adam"


@dataclass(frozen=True, eq=False)
class Chosen:
    """Adapters' numbers, and what they do on the latents held out.

    Attributes:
        numbers: of the adapters' parameters.
        strength: 0 where no strength makes the rows better.
        errors: RMS distance to the teacher's end, row by row.
    """

    numbers: Sequence[Tensor]
    strength: float
    errors: Sequence[float]


@dataclass(frozen=True, eq=False)
class State:
    """Of a training, after so many batches as there are losses.

    Attributes:
        now: the adapters' numbers.
        adam: the optimiser's state, for each of them.
        best, nearest: see ``LoraTraining``.
        losses, errors_without: the same.
        looked: after how many batches the latents held out were last looked at.
    """

    now: Sequence[Tensor]
    adam: Mapping[int, Mapping[str, Tensor]]
    best: Chosen
    nearest: Chosen
    losses: list[float]
    errors_without: Sequence[float]
    looked: int

    def save(self, kept: Kept) -> None:
        """Keep it, in place of the last."""
        of_adapters = {_NOW: self.now, _BEST: self.best.numbers}
        if self.nearest is not self.best:
            of_adapters[_NEAREST] = self.nearest.numbers
        tensors = {f"{name} {i}": x for name, numbers in of_adapters.items() for i, x in enumerate(numbers)}
        tensors |= {f"{_ADAM} {i} {name}": x for i, each in self.adam.items() for name, x in each.items()}
        facts = {
            _BEST: [self.best.strength, list(self.best.errors)],
            _NEAREST: None
            if self.nearest is self.best
            else [self.nearest.strength, list(self.nearest.errors)],
            "losses": self.losses,
            "errors_without": list(self.errors_without),
            "looked": self.looked,
        }
        kept.save({name: x.detach().clone() for name, x in tensors.items()}, facts)

    @classmethod
    def load(cls, kept: Kept, like: Sequence[Tensor]) -> State | None:
        """What was kept; None where there is nothing.

        Args:
            like: the adapters' numbers, for where they are.
        """
        found = kept.load()
        if found is None:
            return None
        tensors, facts = found

        def numbers(name: str) -> list[Tensor]:
            return [tensors[f"{name} {i}"].to(x.device) for i, x in enumerate(like)]

        adam: dict[int, dict[str, Tensor]] = {}
        for key, x in tensors.items():
            kind, i, *name = key.split(" ")
            if kind == _ADAM:
                adam.setdefault(int(i), {})[name[0]] = x
        best = Chosen(numbers(_BEST), *facts[_BEST])
        nearest = best if facts[_NEAREST] is None else Chosen(numbers(_NEAREST), *facts[_NEAREST])
        return cls(
            numbers(_NOW), adam, best, nearest, facts["losses"], facts["errors_without"], facts["looked"]
        )
