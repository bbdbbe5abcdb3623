"""How many latents the network can be asked about at once: found out on the way, half as many when memory runs out.

Only the network's call is split. What a sampler holds for its batch stays as it is, so nothing that is found
depends on it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import DodeError

_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "could not allocate", "alloc_failed")
"""Of backends that raise a plain RuntimeError: MPS, the CPU, DirectML, cuBLAS and cuDNN."""


class BatchLimit:
    """Asks about as many latents at once as memory allows.

    Attributes:
        size: how many that is; None as long as memory has not run out.
    """

    def __init__(self) -> None:
        self.size: int | None = None

    def evaluate(
        self, x: Tensor, ask: Callable[[slice], Tensor], note: Callable[[Tensor], None] = lambda answer: None
    ) -> Tensor:
        """What the network says about latents.

        Args:
            x: the latents, ``[B, C, *spatial]``.
            ask: evaluates the network on some of them.
            note: told every answer.

        Raises:
            DodeError: memory runs out with a single latent.
        """
        parts: list[Tensor] = []
        done = 0
        while done < len(x):
            part = slice(done, min(len(x), done + (self.size or len(x))))
            try:
                answer = ask(part)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            else:
                note(answer)
                parts.append(answer)
                done = part.stop
                continue
            self._halve(part.stop - done, reason)  # the error is gone, and with it all that its frames held
            _give_back(x.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _halve(self, size: int, reason: str) -> None:
        if size == 1:
            raise DodeError(
                "make the latent smaller, or free some memory: there is not enough to evaluate the model on one "
                f"latent: {reason}"
            )
        self.size = (size + 1) // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on whatever device."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def _give_back(device: torch.device) -> None:
    """What is not in use any more, so that it can be had in other pieces."""
    gc.collect()
    empty_cache = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()
