"""What to distil, as the tab and the API have it. Imports no numerics."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import DodeError
from ...fit.quality import GOOD, quality_of
from ...fit.steps import parse_steps


@dataclass(frozen=True)
class Request:
    """What to distil.

    Attributes:
        prompts: like those that will be used; each takes an equal share of the noises.
        steps: of the few-step sampler, such as "6" or "5, 6, 8".
        quality: see ``fit.quality``.
        name: of the table.
        for_comfyui: whether it is saved in models/lambdas, where a ComfyUI with this models folder finds it, too.
    """

    prompts: list[str]
    negative_prompt: str = ""
    cfg_scale: float = 7.0
    distilled_cfg_scale: float = 3.5
    width: int = 512
    height: int = 512
    steps: str = "6"
    quality: str = GOOD
    seed: int = 0
    name: str = "table"
    for_comfyui: bool = False

    def __post_init__(self) -> None:
        parse_steps(self.steps)
        quality_of(self.quality)
        if not self.prompts:
            raise DodeError("write a prompt like those that you use")

    @property
    def latents(self) -> int:
        """How many noises to fit on."""
        return quality_of(self.quality).count(len(self.prompts))
