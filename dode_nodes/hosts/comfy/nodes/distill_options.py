"""What a table is to be good for beside what 'Distill λ' is given: further guidance and sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ....errors import DodeError
from .inputs import CATEGORY

Options = io.Custom("DODE_DISTILL_OPTIONS")


@dataclass(frozen=True)
class Range:
    """Further groups of latents: every prompt at every guidance and size.

    Attributes:
        cfgs: besides the node's own.
        latents: empty ones of further sizes.
    """

    cfgs: tuple[float, ...] = ()
    latents: tuple[dict[str, Any], ...] = ()


NO_RANGE = Range()


def parse_cfgs(text: str) -> tuple[float, ...]:
    """ "4, 7" as numbers, without repetition; nothing for an empty text.

    Raises:
        DodeError: it holds something else.
    """
    parts = [part for part in re.split(r"[,;\s]+", text.strip()) if part]
    if not all(re.fullmatch(r"\d{1,3}(\.\d+)?", part) for part in parts):
        raise DodeError(f"cfgs must be one number or several, such as '4, 7', not '{text}'")
    return tuple(dict.fromkeys(map(float, parts)))


class DistillOptions(io.ComfyNode):
    """For 'Distill λ'."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        sizes = [
            io.Latent.Input(
                f"latent_{i}",
                optional=True,
                tooltip="An empty latent of a further size that you sample at.",
            )
            for i in (2, 3)
        ]
        return io.Schema(
            node_id="DODE_DistillOptions",
            display_name="Distill λ options",
            category=CATEGORY,
            description="For the options input of Distill λ: a table for a range of cfg and sizes. It works over "
            "more of what you do, and a little less well at any one place.",
            inputs=[
                io.String.Input(
                    "cfgs",
                    default="",
                    tooltip="Further guidance scales, such as '4, 7'. The noises are shared out among all of them, "
                    "so raise latents in Distill λ.",
                ),
                *sizes,
            ],
            outputs=[
                Options.Output(
                    "options", display_name="options", tooltip="For the options input of Distill λ."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        cfgs: str,
        latent_2: dict[str, Any] | None = None,
        latent_3: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        """Check and pass on."""
        latents = tuple(each for each in (latent_2, latent_3) if each is not None)
        return io.NodeOutput(Range(parse_cfgs(cfgs), latents))
