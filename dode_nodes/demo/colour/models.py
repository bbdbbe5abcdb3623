"""Loads the colour models.

model = load_colour_model("flow")
sigmas = make_sigmas("simple", 8, model.noise_schedule)
labels = model.labels(["sunset lake", "night sea moon"])
latents = sample_euler(model.denoiser(cfg=4), model.noise(range(2)), sigmas, extra_args={"labels": labels})
pictures = model.decode(latents)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import DodeError
from ..models import KINDS, DemoModel, load_weights, noise_schedule, weights_folder
from .networks import LATENT_CHANNELS, Autoencoder, plain_unet, words_unet
from .small import to_pixels
from .vocabulary import Vocabulary, prompts_of

SUBJECTS = (
    "sunset lake", "night sea moon", "day mountain cloud", "dawn hill", "day forest autumn", "sunset desert sun",
    "night mountain star", "dawn lake fog", "day sea", "sunset forest cloud",
)  # fmt: skip
"""What it is asked for to show it."""

_COMMAND = "python -m dode_nodes.demo.colour.train"


@dataclass(frozen=True, eq=False)
class ColourModel(DemoModel):
    """A diffusion model of coloured pictures. Get one from `load_colour_model`.

    Attributes:
        autoencoder: turns its latents into pictures; None for a model of pictures themselves.
        names: the words of each kind of picture that it was trained on; none for a model without prompts.
    """

    autoencoder: Autoencoder | None = None
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "pictures"

    @property
    def family(self) -> str:
        return "demo-pictures"

    @property
    def subjects(self) -> Sequence[str]:
        return SUBJECTS

    @property
    def fitted_on(self) -> Sequence[str]:
        return self.prompts()[0]

    @property
    def vocabulary(self) -> Vocabulary:
        """The words that it knows."""
        return _vocabulary(self.names)

    def labels(self, texts: Sequence[str]) -> Tensor:
        """What the denoiser's `labels` are for these prompts, (B, W) int64.

        Raises:
            DodeError: there is a word that it does not know.
        """
        for text in set(texts):
            self.vocabulary.check(text)
        return self.vocabulary.numbers(texts)

    def prompts(self, seed: int = 0) -> tuple[list[str], list[str]]:
        """What to ask it for, to fit on and to test on: two halves that share no prompt."""
        return prompts_of(self.names, seed)

    def pictures(self, latents: Tensor) -> Tensor:
        return ((self.decode(latents).clamp(-1, 1) + 1) / 2).movedim(1, -1).cpu()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), float32 in about [−1, 1], of latents; nothing is clamped."""
        if self.autoencoder is None:
            return to_pixels(latents.float())
        pictures: Tensor = self.autoencoder.decode(latents.to(self.autoencoder.mean))
        return pictures


def load_colour_model(
    kind: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> ColourModel:
    """The colour model of this kind.

    Args:
        kind: "flow" draws landscapes of 64×64 pixels that show what a few words ask for, in an autoencoder's latents
            (4, 16, 16); "eps" draws pictures (3, 16, 16), without prompts.
        dtype: of the network's weights (they are stored as float16); the autoencoder stays in float32.
        device: of both.
        folder: where the weights are; by default this package's.

    Raises:
        DodeError: unknown kind, or the weights are missing or unusable.
    """
    if kind not in KINDS:
        raise DodeError(f"no colour model is called {kind!r}; there are {', '.join(KINDS)}")
    folder = folder or Path(str(weights_folder()))
    file, command = folder / f"colour_{kind}.safetensors", f"{_COMMAND} {kind}"
    if kind == "eps":
        plain = load_weights(plain_unet(), file, command).to(device, dtype)
        return ColourModel(kind, plain, noise_schedule(kind), (3, 16, 16), None)
    names = _names(file)
    network = load_weights(words_unet(len(_vocabulary(names))), file, command).to(device, dtype)
    autoencoder = load_autoencoder(folder).to(device)
    return ColourModel(kind, network, noise_schedule(kind), (LATENT_CHANNELS, 16, 16), 0, autoencoder, names)


def load_autoencoder(folder: Path) -> Autoencoder:
    """The autoencoder whose weights are in this folder, float32 on the CPU.

    Raises:
        DodeError: they are missing or unusable.
    """
    file = folder / "colour_autoencoder.safetensors"
    return load_weights(Autoencoder(), file, f"{_COMMAND} autoencoder")


def _names(file: Path) -> tuple[str, ...]:
    """What the pictures were called that these weights are made of; nothing where that is not known."""
    try:
        with safe_open(file, framework="pt") as weights:
            return tuple(json.loads(weights.metadata()["pictures"]))
    except (OSError, SafetensorError, KeyError, TypeError):  # which load_weights explains
        return ()


def _vocabulary(names: Iterable[str]) -> Vocabulary:
    return Vocabulary.of(name.split() for name in names)
