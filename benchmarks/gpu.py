"""A network of SDXL's size in ComfyUI, with random weights: what a row costs when sampling, and what distilling costs.

Times and peaks are given beside those of the stock sampler, and of the network's bare evaluations. With ``--tiny`` the
network is small and runs on the CPU, which shows that the script works and measures no memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from common import command, print_table
from torch import Tensor, nn

from dode_nodes import LambdaRow, Recipe, Teacher
from dode_nodes.errors import DodeError
from dode_nodes.fit.student import REACH
from dode_nodes.hosts.comfy.launch import find_comfyui, open_comfyui

SEED, CFG, STEPS, ENTERED_STEPS = 0, 7.0, 5, 8
LATENTS, SCALE = 2, 4
REPEATS = 5
GIB = 2**30

SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "num_head_channels": 64,
    "num_classes": "sequential", "adm_in_channels": 2816, "use_spatial_transformer": True,
    "use_linear_in_transformer": True, "use_checkpoint": False, "legacy": False, "use_temporal_attention": False,
    "use_temporal_resblock": False,
}  # fmt: skip
TINY = SDXL | {
    "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [0, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [0, 0, 1, 1], "num_head_channels": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        unet: the network's configuration.
        dtype: it computes in.
        side: of the latent, a square of four channels.
    """

    unet: dict[str, Any]
    dtype: torch.dtype
    side: int


FULL = Setting(SDXL, torch.float16, 128)
SMALL = Setting(TINY, torch.float32, 16)


class Cost(NamedTuple):
    """Seconds, and the peak of the GPU's memory in GiB; None where there is no GPU."""

    seconds: float
    peak: float | None

    def cells(self, reference: Cost) -> list[str]:
        """For a table: itself, and as a multiple of another."""
        times = [f"{self.seconds:.3f}", f"{self.seconds / reference.seconds:.3f}"]
        if self.peak is None or reference.peak is None:
            return [*times, "–", "–"]
        return [*times, f"{self.peak:.2f}", f"{self.peak / reference.peak:.3f}"]


def cost(run: Callable[[], object], repeats: int = REPEATS) -> Cost:
    """Of one run: the median time after one to warm up, and the highest peak."""
    run()
    times, peaks = [], []
    for _ in range(repeats):
        _settle()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        run()
        _settle()
        times.append(time.perf_counter() - begun)
        if torch.cuda.is_available():
            peaks.append(torch.cuda.max_memory_allocated() / GIB)
    return Cost(statistics.median(times), max(peaks, default=None))


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_model(setting: Setting) -> Any:
    """A ModelPatcher of SDXL's class; its weights keep what goes through them at about the size it has."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SDXL(dict(setting.unet))
    config.set_inference_dtype(setting.dtype, None)
    network = comfy.model_base.SDXL(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in network.diffusion_model.named_parameters():
        weight.data = _random(name, weight, generator)
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(
        network, management.get_torch_device(), management.unet_offload_device()
    )


def _random(name: str, weight: nn.Parameter, generator: torch.Generator) -> Tensor:
    if weight.ndim < 2:  # of norms, and biases
        return torch.full_like(weight, float(name.endswith("weight")))
    spread = 0.5 / weight[0].numel() ** 0.5
    return (torch.randn(weight.shape, generator=generator) * spread).to(weight.dtype)


def prompt(width: int, seed: int) -> list[list[Any]]:
    """A CONDITIONING of 77 tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 77, width), (1, 1280)))
    return [[tokens, {"pooled_output": pooled, "width": 1024, "height": 1024}]]


@dataclass(frozen=True)
class Bench:
    """A model, its prompts and the size of its latents."""

    model: Any
    positive: list[list[Any]]
    negative: list[list[Any]]
    side: int

    @classmethod
    def of(cls, setting: Setting) -> Bench:
        width = setting.unet["context_dim"]
        return cls(random_model(setting), prompt(width, 1), prompt(width, 2), setting.side)

    def empty(self, batch: int) -> Tensor:
        """An empty latent."""
        return torch.zeros(batch, 4, self.side, self.side)

    def sigmas(self, steps: int) -> Tensor:
        """The Karras schedule."""
        import comfy.samplers

        sampling = self.model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, "karras", steps).cpu()

    def sample(self, sampler: Any, batch: int, steps: int = STEPS) -> Tensor:
        """As SamplerCustom does."""
        import comfy.sample

        latent = self.empty(batch)
        noise = comfy.sample.prepare_noise(latent, SEED)
        return comfy.sample.sample_custom(
            self.model, noise, CFG, sampler, self.sigmas(steps), self.positive, self.negative, latent,
            disable_pbar=True, seed=SEED,
        )  # fmt: skip

    def entered(self, batch: int) -> Callable[[], Tensor]:
        """A run as a fit makes it, in which nothing is evaluated."""
        import comfy.sample

        from dode_nodes.hosts.comfy.guiders import cfg_guider
        from dode_nodes.hosts.comfy.prompts import GuidedModel

        guider = cfg_guider(self.model, self.positive, self.negative, CFG)
        latent, sigmas = self.empty(batch), self.sigmas(ENTERED_STEPS)
        noise = comfy.sample.prepare_noise(latent, SEED)
        group = GuidedModel(guider, noise, SEED, latent, batch).group(sigmas)
        return lambda: group.around(lambda extra_args: group.x, torch.arange(batch), sigmas)


def rows(sigmas: Tensor) -> Iterator[tuple[str, LambdaRow]]:
    """A row with λ for Euler, and one as refinement makes them."""
    made_for = ("euler", sigmas.double().numpy(), (1,) * STEPS)
    yield "D-ODE, λ", LambdaRow(*made_for, np.full(STEPS, 0.1))
    weights = np.eye(STEPS) + 0.1 * sum(np.eye(STEPS, k=-j) for j in range(1, REACH))
    yield "D-ODE, refined", LambdaRow(*made_for, weights, form="history")


def sampling(bench: Bench, batch: int) -> Iterator[list[object]]:
    """A line per sampler, and one for what a run takes that evaluates nothing."""
    import comfy.samplers

    from dode_nodes.hosts.comfy.run_row import row_sampler

    stock = comfy.samplers.ksampler("euler")
    reference = cost(lambda: bench.sample(stock, batch))
    yield [batch, "stock euler", *reference.cells(reference)]
    for name, row in rows(bench.sigmas(STEPS)):
        ours = row_sampler(lambda sigmas, row=row: row)
        yield [batch, name, *cost(lambda ours=ours: bench.sample(ours, batch)).cells(reference)]
    eight = cost(lambda: bench.sample(stock, batch, ENTERED_STEPS))
    entered = cost(bench.entered(batch))
    yield [batch, f"entering a run of a fit, beside {ENTERED_STEPS} steps", *entered.cells(eight)]


class Evaluations:
    """What a network was asked, by batch size: how often, and one question."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.counts: Counter[int] = Counter()
        self._asked: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def watch(self, run: Callable[[], object]) -> None:
        """Note what a run asks."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.counts[len(args[0])] += 1
            self._asked.setdefault(len(args[0]), (args, kwargs))

        hook = self._network.register_forward_pre_hook(note, with_kwargs=True)
        try:
            run()
        finally:
            hook.remove()

    def bare_cost(self) -> Cost:
        """Of all of them, one after another, and nothing else."""
        costs = {
            size: cost(lambda args=args, kwargs=kwargs: self._network(*args, **kwargs))
            for size, (args, kwargs) in self._asked.items()
        }
        peaks = [each.peak for each in costs.values() if each.peak is not None]
        seconds = sum(costs[size].seconds * count for size, count in self.counts.items())
        return Cost(seconds, max(peaks, default=None))


class Silent:
    """A reporter of a fit that nobody watches."""

    def begin(self, *lines: str) -> None:
        """Nothing is said."""

    def __call__(self, progress: object) -> None:
        """Nothing is shown."""


def distilling(bench: Bench) -> Iterator[list[object]]:
    """The fit, and its bare evaluations."""
    from dode_nodes.hosts.comfy.guiders import cfg_guider
    from dode_nodes.hosts.comfy.job import Distillation, Request, schedule

    request = Request(
        guiders=[cfg_guider(bench.model, bench.positive, bench.negative, CFG)],
        latent=bench.empty(1),
        count=LATENTS,
        seed=SEED,
        schedules=[schedule(bench.model, "euler", "karras", STEPS)],
        recipe=Recipe(predictions=["noise"], teacher=Teacher(scale=SCALE)),
    )
    evaluations = Evaluations(bench.model.model.diffusion_model)
    evaluations.watch(lambda: Distillation(request, Silent()).run())
    fit = cost(lambda: Distillation(request, Silent()).run(), repeats=1)
    bare = evaluations.bare_cost()
    counts = ", ".join(f"{count} of {size}" for size, count in sorted(evaluations.counts.items()))
    yield [f"bare evaluations, guidance included: {counts}", *bare.cells(bare)]
    yield ["distilling", *fit.cells(bare)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small network, on the CPU")
    options = parser.parse_args()
    checkout = find_comfyui()
    if checkout is None:
        raise DodeError("set COMFYUI_PATH to the folder of your ComfyUI")
    if not options.tiny and not torch.cuda.is_available():
        raise DodeError("this needs a GPU; --tiny runs on the CPU")
    open_comfyui(checkout, cpu=options.tiny)
    import comfy.model_management
    from comfyui_version import __version__

    setting = SMALL if options.tiny else FULL
    bench = Bench.of(setting)
    parameters = sum(weight.numel() for weight in bench.model.model.diffusion_model.parameters())
    device = comfy.model_management.get_torch_device_name(bench.model.load_device)
    print(
        f"{command()}, ComfyUI {__version__}, torch {torch.__version__}, {device}. Random weights, seed {SEED}, "
        f"{parameters / 1e6:.1f} M parameters, {setting.dtype}, latents 4×{setting.side}×{setting.side}, cfg {CFG:g}; "
        f"{STEPS} steps. Medians of {REPEATS} runs. Peaks have the weights in them."
    )
    head = ["seconds", "as a ratio", "peak, GiB", "as a ratio"]
    with torch.inference_mode():
        print_table(
            ["batch", "sampling", *head], [line for batch in (1, 4) for line in sampling(bench, batch)]
        )
        print_table([f"{LATENTS} latents, C = {SCALE}, λ alone", *head], distilling(bench))


if __name__ == "__main__":
    main()
