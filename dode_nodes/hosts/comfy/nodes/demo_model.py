"""The node with a small built-in model: the examples run without a download."""

from __future__ import annotations

from comfy_api.latest import io

from ..digits import DigitVae, class_conditioning, demo_patcher, unconditional
from .inputs import CATEGORY


class DemoModel(io.ComfyNode):
    """The embedded model of handwritten digits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_DemoModel",
            display_name="D-ODE demo model",
            category=CATEGORY,
            description="A small diffusion model of handwritten digits that comes with the pack. Use it to try "
            "D-ODE in seconds, on a CPU, with no download. Connect a 64×64 Empty Latent Image.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=["eps", "flow"],
                    default="eps",
                    tooltip="eps works like Stable Diffusion 1.5 and SDXL, flow like SD3 and Flux.",
                ),
                io.Int.Input(
                    "digit",
                    default=3,
                    min=0,
                    max=9,
                    tooltip="The digit to draw. It takes the place of a prompt.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The demo model."),
                io.Conditioning.Output("positive", display_name="positive", tooltip="The digit."),
                io.Conditioning.Output("negative", display_name="negative", tooltip="Any digit."),
                io.Vae.Output("vae", display_name="vae", tooltip="Decodes to 64×64 pixels."),
            ],
        )

    @classmethod
    def execute(cls, kind: str, digit: int) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(demo_patcher(kind), class_conditioning(digit), unconditional(), DigitVae())
