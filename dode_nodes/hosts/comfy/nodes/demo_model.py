"""The nodes with small built-in models: the examples run without a download."""

from __future__ import annotations

from comfy_api.latest import io

from ..colour import load_colour
from ..digits import DigitVae, class_conditioning, demo_patcher, unconditional
from .inputs import CATEGORY


class DemoPictures(io.ComfyNode):
    """The embedded model of landscapes, with outputs as a checkpoint loader has them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Outputs; there is nothing to choose."""
        return io.Schema(
            node_id="DODE_DemoPictures",
            display_name="D-ODE demo model",
            category=CATEGORY,
            description="A small diffusion model of landscapes that comes with the pack. Use it to try D-ODE in "
            "minutes, on a CPU, with no download. Connect it like Load Checkpoint: write prompts of a few simple words, "
            "such as sunset over a lake, in CLIP Text Encode, and use a 128×128 Empty Latent Image.",
            inputs=[],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="The demo model, a rectified flow like SD3 and Flux.",
                ),
                io.Clip.Output(
                    "clip",
                    display_name="clip",
                    tooltip="For CLIP Text Encode. It knows 17 words: see its help.",
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="Decodes to 128×128 pixels."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(*load_colour())


class DemoModel(io.ComfyNode):
    """The embedded models of handwritten digits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_DemoModel",
            display_name="D-ODE demo digits",
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
