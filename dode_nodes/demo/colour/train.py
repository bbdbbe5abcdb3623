"""Trains the networks of the colour pictures, on a CPU, in an hour or two in all; each goes on where it stopped.

python -m dode_nodes.demo.colour.train {autoencoder,eps,flow} [--seed 0] [--steps N] [--out DIR]
    [--package FILE.tgz] [--checkpoints DIR]

`flow` needs the autoencoder in OUT; both are trained on landscapes that are drawn for it. `eps` is trained on emoji, out
of npm's package, which is fetched unless FILE.tgz is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models import noise_schedule
from ..networks import UNet
from ..train import LABEL_DROPOUT, optimise, write_weights
from . import emoji, landscapes
from .models import load_autoencoder
from .networks import Autoencoder, plain_unet, words_unet
from .small import shrink
from .vocabulary import Vocabulary

STEPS = {"autoencoder": 4000, "eps": 1600, "flow": 10000}
_PEAK = {"autoencoder": 2e-3, "eps": 2e-3, "flow": 1e-3}
_BATCH = {"autoencoder": 16, "eps": 64, "flow": 32}
_DATASET = {
    "autoencoder": landscapes.DATASET,
    "eps": emoji.DATASET,
    "flow": landscapes.DATASET,
}
_Many = TypeVar("_Many", Tensor, list[tuple[str, ...]])
_LATENT_NOISE = 0.05  # standard deviations that the decoder learns to overlook
_MEASURED, _LANDSCAPES = 512, 16384  # of which the latents' statistics are, and that the flow is trained on


def train_autoencoder(steps: int, checkpoint: Path) -> tuple[Autoencoder, dict[str, str]]:
    """An `Autoencoder` with averaged weights that gives normalised latents, and the facts about it."""
    network = Autoencoder()

    def loss() -> Tensor:
        picture = landscapes.draw(_some_scenes(_BATCH["autoencoder"]))
        latents = _in_bf16(network.encode, picture)
        noisy = latents + _LATENT_NOISE * torch.randn_like(latents)
        difference = _in_bf16(network.decode, noisy) - picture
        spread = latents.std(dim=(0, 2, 3)) - 1
        return (
            _of_all_scales(difference) + 0.1 * (latents.mean(dim=(0, 2, 3)).square() + spread.square()).mean()
        )

    last_loss = optimise(network, loss, steps, peak=_PEAK["autoencoder"], checkpoint=checkpoint)
    network.half().float()  # the statistics are to be those of the weights as they are stored
    with torch.no_grad():
        drawn = landscapes.draw(_some_scenes(_MEASURED))
        latents = torch.cat([network.encode(some) for some in _parts(drawn)])
        deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
        network.mean, network.deviation = mean.view(-1, 1, 1), deviation.view(-1, 1, 1)
        again = torch.cat([network.decode(network.encode(some)).clamp(-1, 1) for some in _parts(drawn)])
    noise_ratio = -10 * (functional.mse_loss(again, drawn) / 4).log10()
    return network, {"loss": f"{last_loss:.5f}", "psnr": f"{noise_ratio:.2f}"}


def _of_all_scales(difference: Tensor) -> Tensor:
    """L1 of a difference of pictures, of its slopes, and of its averages over 4×4: sharp edges and true colours."""
    slopes = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return difference.abs().mean() + slopes + functional.avg_pool2d(difference, 4).abs().mean()


def train_eps(images: Tensor, steps: int, checkpoint: Path) -> tuple[UNet, dict[str, str]]:
    """The U-Net without prompts, which predicts the noise, with averaged weights; and the facts about it."""
    schedule = noise_schedule("eps")
    network = plain_unet()
    batch = _BATCH["eps"]

    def loss() -> Tensor:
        x0 = shrink(emoji.draw(images[torch.randint(len(images), (batch,))]))
        timesteps = len(schedule.sigmas) * (torch.arange(batch) + torch.rand(1)) / batch - 0.5
        timesteps = timesteps.clamp(0, len(schedule.sigmas) - 1)
        sigma = schedule.sigma(timesteps)[:, None, None, None]
        noise = torch.randn_like(x0)
        return functional.mse_loss(network((x0 + sigma * noise) / (1 + sigma**2).sqrt(), timesteps), noise)

    last_loss = optimise(network, loss, steps, peak=_PEAK["eps"], checkpoint=checkpoint)
    return network, {"loss": f"{last_loss:.5f}"}


def train_flow(autoencoder: Autoencoder, steps: int, checkpoint: Path) -> tuple[UNet, dict[str, str]]:
    """The U-Net that draws what words ask for, a rectified flow, with averaged weights; and the facts about it."""
    names = [" ".join(words) for words in landscapes.SCENES]
    vocabulary = Vocabulary.of(landscapes.SCENES)
    scenes = _some_scenes(_LANDSCAPES)
    words = vocabulary.numbers([" ".join(words) for words in scenes])
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(landscapes.draw(some)) for some in _parts(scenes)])
    network = words_unet(len(vocabulary))
    batch = _BATCH["flow"]

    def loss() -> Tensor:
        which = torch.randint(len(latents), (batch,))
        x0 = latents[which]
        # Logit-normal: most is to be learned in the middle (Esser et al. 2024, arXiv:2403.03206).
        sigma = torch.randn(batch).sigmoid()
        noise = torch.randn_like(x0)
        sigma_x = sigma[:, None, None, None]
        x = (1 - sigma_x) * x0 + sigma_x * noise
        predicted = _in_bf16(network, x, 1000 * sigma, _some_words(words[which]))
        return functional.mse_loss(predicted, noise - x0)

    last_loss = optimise(network, loss, steps, peak=_PEAK["flow"], checkpoint=checkpoint)
    return network, {"loss": f"{last_loss:.5f}", "pictures": json.dumps(names)}


def _in_bf16(network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What it gives for its inputs, float32: its products in bfloat16 take a processor two thirds of the time."""
    with torch.autocast("cpu", torch.bfloat16):
        return network(*inputs).float()


def _some_scenes(count: int) -> list[tuple[str, ...]]:
    which = torch.randint(len(landscapes.SCENES), (count,))
    return [landscapes.SCENES[place] for place in which.tolist()]


def _parts(every: _Many) -> list[_Many]:
    """Batches of 64 for what is not trained on."""
    return [every[start : start + 64] for start in range(0, len(every), 64)]


def _some_words(words: Tensor) -> Tensor:
    """A few of the words, (B, W), or all or none: a prompt is to leave something open."""
    share = 0.2 + 0.8 * torch.rand(len(words), 1)
    share[torch.rand(len(words)) < LABEL_DROPOUT] = 0
    return torch.where(torch.rand(words.shape) < share, words, 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one network, or go on with it, and write OUT/colour_NAME.safetensors."""
    parser = argparse.ArgumentParser(
        prog="python -m dode_nodes.demo.colour.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("network", choices=list(STEPS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"in all; by default {STEPS}")
    parser.add_argument("--out", type=Path, default=Path("colour"), help="a folder for weights")
    parser.add_argument(
        "--package", type=Path, default=Path("colour/fluent-emoji-3d.tgz"), help="of emoji, for eps"
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("colour"), help="a folder")
    options = parser.parse_args(arguments)
    steps = options.steps or STEPS[options.network]

    checkpoint = options.checkpoints / f"{options.network}.pt"
    torch.manual_seed(options.seed)
    network: nn.Module
    if options.network == "autoencoder":
        network, facts = train_autoencoder(steps, checkpoint)
    elif options.network == "eps":
        network, facts = train_eps(emoji.load_emoji(emoji.fetch_package(options.package)), steps, checkpoint)
    else:
        network, facts = train_flow(load_autoencoder(options.out), steps, checkpoint)
    command = (
        f"python -m dode_nodes.demo.colour.train {options.network} --seed {options.seed} --steps {steps}"
    )
    where = {
        "seed": str(options.seed),
        "command": command,
        "dataset": _DATASET[options.network],
        "steps": str(steps),
    }
    write_weights(options.out / f"colour_{options.network}.safetensors", network, where | facts)


if __name__ == "__main__":
    main()
