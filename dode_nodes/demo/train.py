"""Trains the demo's networks on scikit-learn's handwritten digits, each in minutes on a CPU.

python -m dode_nodes.demo.train {eps,flow,classifier} [--seed 0] [--steps N] [--out DIR]
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import trange

from ..tables import publish
from .frechet import mean_and_covariance
from .models import KINDS, noise_schedule
from .networks import UNCONDITIONAL, DigitClassifier, DigitUNet
from .vae import encode

STEPS = {"eps": 4000, "flow": 4000, "classifier": 4000}
DESCRIPTION = "Train one of the demo's networks and write its weights."
DATASET = "sklearn.datasets.load_digits, 1797 digits of 8×8 pixels, enlarged to 16×16"
BATCH = 64
LEARNING_RATE = 2e-3
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.998
CHECKPOINT_EVERY = 100
HELD_OUT = 360
"""Digits, a fifth, that the classifier does not train on."""


# --- Data -----------------------------------------------------------------------------------------------


def load_digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits as they are: images (1797, 1, 8, 8) in [0, 1] and labels (1797,)."""
    from sklearn import datasets

    digits = datasets.load_digits()
    return torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target).long()


def enlarge(images: Tensor, transforms: Tensor | None = None) -> Tensor:
    """Images (B, 1, 8, 8) at twice the size, bicubic, clamped to [0, 1]; what lies outside of them is black.

    Args:
        transforms: (B, 2, 3), where to look for each pixel, as in `torch.nn.functional.affine_grid`.
    """
    if transforms is None:
        transforms = torch.eye(2, 3).expand(len(images), 2, 3)
    grid = functional.affine_grid(transforms, [len(images), 1, 16, 16], align_corners=False)
    return functional.grid_sample(images, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def random_transforms(count: int) -> Tensor:
    """Small shifts, rotations and changes of size, (count, 2, 3), that leave a digit the digit it is."""
    angle = math.radians(5) * torch.randn(count)
    size = 1 + 0.04 * torch.randn(count)
    shift = 0.06 * torch.randn(count, 2)  # half the width is 1: a quarter of an original pixel
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(count, 2, 2)
    return torch.cat([size[:, None, None] * rows, shift[:, :, None]], dim=2)


def random_batch(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Digits drawn with replacement, enlarged and varied: images (64, 1, 16, 16) and labels (64,)."""
    chosen = torch.randint(len(images), (BATCH,))
    return enlarge(images[chosen], random_transforms(BATCH)), labels[chosen]


# --- Training -------------------------------------------------------------------------------------------


def train_diffusion(kind: str, steps: int) -> tuple[DigitUNet, dict[str, str]]:
    """A `DigitUNet` with averaged weights, and the facts about it. `kind` is "eps" or "flow"."""
    images, labels = load_digits()
    schedule = noise_schedule(kind)
    last_timestep = schedule.timestep(schedule.sigmas[-1])
    network = DigitUNet()

    def loss() -> Tensor:
        digits, y = random_batch(images, labels)
        x0 = encode(digits)
        y = torch.where(torch.rand(BATCH) < LABEL_DROPOUT, UNCONDITIONAL, y)
        # Evenly spread over the batch, at a random offset: less variance than independent draws.
        timesteps = last_timestep * (torch.arange(BATCH) + torch.rand(1)) / BATCH
        sigma = schedule.sigma(timesteps)[:, None, None, None]
        noise = torch.randn_like(x0)
        if kind == "eps":
            x, target = (x0 + sigma * noise) / (1 + sigma**2).sqrt(), noise
        else:
            x, target = (1 - sigma) * x0 + sigma * noise, noise - x0
        return functional.mse_loss(network(x, timesteps, y), target)

    last_loss = optimise(network, loss, steps)
    return network, {"loss": f"{last_loss:.5f}"}


def train_classifier(steps: int) -> tuple[DigitClassifier, dict[str, str]]:
    """A `DigitClassifier` with averaged weights and the real digits' statistics, and the facts about it."""
    images, labels = load_digits()
    order = torch.randperm(len(images))
    held_out, seen = order[:HELD_OUT], order[HELD_OUT:]
    network = DigitClassifier()

    def loss() -> Tensor:
        digits, y = random_batch(images[seen], labels[seen])
        return functional.cross_entropy(network(digits), y, label_smoothing=0.1)

    last_loss = optimise(network, loss, steps)
    network.half().float()  # the statistics are to be those of the weights as they are stored
    with torch.no_grad():
        real = enlarge(images)
        network.real_mean, network.real_covariance = mean_and_covariance(network.features(real))
        right = network(real[held_out]).argmax(1) == labels[held_out]
    return network, {"loss": f"{last_loss:.5f}", "held_out_accuracy": f"{right.float().mean():.4f}"}


def optimise(
    network: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    *,
    peak: float = LEARNING_RATE,
    checkpoint: Path | None = None,
) -> float:
    """Minimises `loss` and leaves the weights' exponential moving average in `network`.

    Args:
        loss: of a batch that it draws itself, by torch's own generator.
        steps: in all, those before a checkpoint included; the learning rate falls to nothing towards the last.
        peak: the highest learning rate.
        checkpoint: a file that is written every `CHECKPOINT_EVERY` steps. Where there is one, training goes on
            from it, to the same end as if it had never stopped.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # CPUs convolve a third faster
    optimiser = torch.optim.AdamW(network.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    average = AveragedModel(network, multi_avg_fn=_average)
    state = {"network": network, "average": average, "optimiser": optimiser}
    losses = read_checkpoint(checkpoint, state) if checkpoint else []
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, peak, total_steps=steps, pct_start=0.05, cycle_momentum=False, last_epoch=len(losses) - 1
    )
    bar = trange(len(losses), steps, initial=len(losses), total=steps)
    for step in bar:
        current = loss()
        optimiser.zero_grad()
        current.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        rate.step()
        average.update_parameters(network)
        losses.append(current.item())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
        if checkpoint and (step + 1) % CHECKPOINT_EVERY == 0:
            write_checkpoint(checkpoint, state, losses)
    network.load_state_dict(average.module.state_dict())
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


def _average(
    average: tuple[Tensor, ...] | list[Tensor],
    current: tuple[Tensor, ...] | list[Tensor],
    updates: Tensor | int,
) -> None:
    """An exponential moving average over at most a tenth of the steps so far: a short training forgets its start."""
    torch._foreach_lerp_(average, current, max(1 - EMA_DECAY, 9 / (10 + int(updates))))


def write_checkpoint(path: Path, state: Mapping[str, Any], losses: Sequence[float]) -> None:
    """What training needs to go on: the states of what has one, torch's generator, and the losses so far."""
    content = {name: part.state_dict() for name, part in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(content | {"generator": torch.get_rng_state(), "losses": list(losses)}, part)
    os.replace(part, path)


def read_checkpoint(path: Path, state: Mapping[str, Any]) -> list[float]:
    """Puts back what `write_checkpoint` wrote, where there is such a file; the losses so far."""
    if not path.exists():
        return []
    content = torch.load(path, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(content[name])
    torch.set_rng_state(content["generator"])
    losses: list[float] = content["losses"]
    return losses


# --- Command line ---------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one network and write OUT/NAME.safetensors: weights in float16, statistics in float32."""
    parser = argparse.ArgumentParser(
        prog="python -m dode_nodes.demo.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("network", choices=[*KINDS, "classifier"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"of {BATCH} digits each; by default {STEPS}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="a folder")
    options = parser.parse_args(arguments)
    steps = options.steps or STEPS[options.network]

    torch.manual_seed(options.seed)
    network: nn.Module
    if options.network == "classifier":
        network, facts = train_classifier(steps)
    else:
        network, facts = train_diffusion(options.network, steps)
    facts = {
        "seed": str(options.seed),
        "command": f"python -m dode_nodes.demo.train {options.network} --seed {options.seed} --steps {steps}",
        "dataset": DATASET,
        "steps": str(steps),
        **facts,
    }
    write_weights(options.out / f"{options.network}.safetensors", network, facts)


def write_weights(path: Path, network: nn.Module, facts: Mapping[str, str]) -> None:
    """A file of weights in float16 and statistics in float32, with where they come from."""
    weights = {name: parameter.detach().half().contiguous() for name, parameter in network.named_parameters()}
    tensors = weights | {name: buffer.float() for name, buffer in network.named_buffers()}
    metadata = {
        **facts,
        "parameters": str(sum(parameter.numel() for parameter in network.parameters())),
        "torch": torch.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    publish.publish(path, save(tensors, metadata), overwrite=True)
    print(path, metadata)


if __name__ == "__main__":
    main()
