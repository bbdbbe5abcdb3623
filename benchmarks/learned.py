"""Learned solvers from the literature on our eps model, by their authors' own code, beside a refined row.

    python benchmarks/learned.py --methods refined dyweight amed gits --steps 5 6 8 \\
        --diff-sampler CHECKOUT_OF_zju-pi/diff-sampler --dyweight CHECKOUT_OF_Westlake-AGI-Lab/DyWeight

Theirs, imported from the checkouts at run time: DyWeight's predictor, loss, teacher and sampler (arXiv:2603.11607);
the predictor, losses, teachers and samplers of AMED-Solver and AMED-Plugin (arXiv:2312.00094); GITS' search,
`get_dp_list`, with its teacher, and its samplers (arXiv:2405.11326).

Ours: the model behind the interface that they call; the loops around DyWeight's and AMED's losses, as theirs want
CUDA, a process group and their networks (same optimiser, rates, clipping and order of updates); a process group of
one for GITS; latents of variance σ_max² + 1 instead of σ_max² (GITS draws its own to search on); σ_min and σ_max,
our model's. AMED's predictor reads an 8×8 bottleneck: it gets our 4×4 one, each value four times.

Options. DyWeight: its recipe for latent models (discrete schedule, three outputs), but with its l2 loss, the rate
of its CIFAR recipe, and without its free first step, which did worse here in both pairs tried: the best of eight
variants at 5 evaluations, on the latents from 2,000,000 on. AMED-Solver, and AMED-Plugin on iPNDM: the
CIFAR recipes; on DPM-Solver++ the same on its best schedule here. With the batch of its Stable Diffusion recipe, for
100 updates of every step (theirs make 78 and 156), and with a free first step where the number of evaluations is
odd, as two evaluations make a step. GITS: the recipe on iPNDM, and the best solver and schedule here, with the
coefficient of the recipe and the best of four at 5 evaluations; no free first step, which it did not always find
room for. DPM-Solver++ predicts the noise, as in their latent recipes: their data prediction clips as if for pixels.

Their samplers end at σ_min = 0.029, and that is the state which is compared to the converged solution at σ = 0:
denoising on costs an evaluation. DyWeight is fitted to a teacher that ends at 0; the others, fitted to σ_min, are
also compared to the converged solution there. A backward pass counts as two evaluations.

Left out: the flow model. Their samplers want x = x0 + σ·noise, where a rectified flow starts at an infinite σ.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from common import MICRO_BATCH, Bench, prepare, print_setting, print_table, sample_group
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dode_nodes import distill, refine, run_teacher
from dode_nodes.demo.experiment import TEACHER
from dode_nodes.demo.models import DemoModel
from dode_nodes.demo.networks import CLASSES
from dode_nodes.fit.latents import root_mean_square
from dode_nodes.sampling.schedules import make_sigmas

BUDGET = 300_000
"""Most evaluations that one fit may cost; where the authors' number of images costs more, it gets fewer."""
POLYNOMIAL = {"schedule_type": "polynomial", "schedule_rho": 7}
DISCRETE = {"schedule_type": "discrete", "schedule_rho": 1}
TIME_UNIFORM = {"schedule_type": "time_uniform", "schedule_rho": 1}


@dataclass(frozen=True)
class Outcome:
    """A fitted solver on the test latents.

    Attributes:
        images: initial latents that it was fitted on.
        fitting: evaluations that the fit cost.
        states: where the test latents ended.
        per_latent: evaluations that each of them cost.
    """

    solver: str
    settings: str
    images: int
    fitting: int
    states: Tensor
    per_latent: float


class Net:
    """Our model behind the interface of theirs; counts evaluations, three for one that is differentiated.

    Labels may come as digits or, as EDM's networks have them, one-hot.
    """

    label_dim = CLASSES

    def __init__(self, model: DemoModel, cfg: float) -> None:
        self.demo = model
        self.img_channels, self.img_resolution, _ = model.latent_shape
        self.sigma_min, self.sigma_max = model.sigma_min, model.sigma_max
        self.evaluations = 0
        self._denoise = model.denoiser(cfg)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        labels = condition if class_labels is None else class_labels
        if labels.ndim == 2:
            labels = labels.argmax(1)
        denoised = self._denoise(x, sigma.to(x).reshape(-1).expand(len(x)), labels=labels)
        self.evaluations += len(x) * (3 if denoised.requires_grad else 1)
        return denoised

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """σ itself: our timestep is continuous in it."""
        return torch.as_tensor(sigma)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """The timestep at σ."""
        return self.demo.timestep(sigma)

    def sigma(self, timestep: Tensor) -> Tensor:
        """σ at a timestep."""
        return self.demo.noise_schedule.sigma(timestep)


class GuidedNet(Net):
    """`Net` as AMED has Stable Diffusion: guidance inside, and a bottleneck that it can hook into."""

    def __init__(self, model: DemoModel, cfg: float) -> None:
        super().__init__(model, cfg)
        self.guidance_type = "uncond" if cfg == 1 else "classifier-free"
        self._bottleneck = nn.Identity()
        unet = SimpleNamespace(middle_block=self._bottleneck)
        self.model = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))

    @contextlib.contextmanager
    def bottleneck(self) -> Iterator[None]:
        """Meanwhile their hooks see our 4×4 bottleneck as the 8×8 that their predictor reads."""

        def show(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._bottleneck(functional.interpolate(output.detach(), scale_factor=2.0))

        hook = self.demo.network.middle[-1].register_forward_hook(show)
        try:
            yield
        finally:
            hook.remove()


@contextlib.contextmanager
def checkout(folder: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Import from a checkout: its modules are forgotten afterwards, for the next has some of the same names."""
    before, bytecode = set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield importlib.import_module
    finally:
        sys.dont_write_bytecode = bytecode
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(folder):
                del sys.modules[name]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """They print every update, and torch warns of how they copy a σ."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def on_test_latents(
    bench: Bench, net: Net, sample: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, float]:
    """The states where ``sample(x, labels)`` ends, and the evaluations that each latent cost."""
    before, group = net.evaluations, bench.test
    with torch.no_grad():
        states = torch.cat([
            sample(group.x[part], group.extra_args(part)["labels"])
            for part in torch.arange(len(group.x)).split(MICRO_BATCH)
        ])  # fmt: skip
    return states, (net.evaluations - before) / len(group.x)


def batches(bench: Bench, images: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh latents and their labels for every update."""
    (group,) = bench.fit_latents(images).groups
    for part in tqdm(torch.arange(images).split(batch), desc="updates", leave=False, disable=None):
        yield group.x[part], group.extra_args(part)["labels"]


def images_within(budget: int, cost: int, wanted: int, batch: int) -> int:
    """How many of the wanted images, in whole batches, the budget pays at this cost of each."""
    return min(wanted, budget // cost) // batch * batch


# DyWeight: weights over all earlier outputs and a scale of every σ, fitted end to end by backpropagation.


@dataclass(frozen=True)
class DyWeight:
    """Their options. AFS: the first step goes along x / √(1 + σ²), without an evaluation."""

    afs: bool
    history: int | None
    lr: float
    schedule: dict[str, Any]
    batch: int = 16
    images: int = 10_000
    teacher_steps: int = 35

    def __str__(self) -> str:
        history = "all outputs" if self.history is None else f"{self.history} outputs"
        afs = "AFS, " if self.afs else ""
        return f"{afs}{history}, {self.schedule['schedule_type']}, lr {self.lr:g}, batch {self.batch}"


def dyweight(bench: Bench, steps: int, folder: Path, variant: DyWeight) -> Outcome:
    """Fit and measure one variant."""
    net = Net(bench.model, bench.cfg)
    solver = {
        "num_steps": steps + 2 if variant.afs else steps + 1, "sampler_stu": "dyweight", "sampler_tea": "ipndm",
        "teacher_steps": variant.teacher_steps, "afs": variant.afs, "max_order": 4, **variant.schedule,
    }  # fmt: skip
    with checkout(folder) as load:
        torch.manual_seed(0)
        predictor = load("training.networks").DyWeight_predictor(max_history_steps=variant.history, **solver)
        loss = load("training.loss").DyWeight_loss(
            sigma_min=net.sigma_min, sigma_max=net.sigma_max, loss_type="l2", **solver
        )
        images = images_within(BUDGET, variant.teacher_steps + 3 * steps, variant.images, variant.batch)

        def student(x: Tensor, labels: Tensor) -> Tensor:
            weights, t_scale = predictor()
            return loss.get_student_final_output(
                net=net,
                tensor_in=x,
                labels=labels,
                hybrid_weights=weights,
                t_scale=t_scale,
                use_afs=variant.afs,
            )

        def teacher(x: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                return loss.get_final_teacher_output(net=net, tensor_in=x, labels=labels)

        optimizer, scheduler = _dyweight_optimizer(predictor, variant.lr, images // variant.batch)
        for x, labels in batches(bench, images, variant.batch):
            optimizer.zero_grad()
            loss.compute_loss(student(x, labels), teacher(x, labels)).backward()
            nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        fitting = net.evaluations
        states, per_latent = on_test_latents(bench, net, student)
    return Outcome("DyWeight", str(variant), images, fitting, states, per_latent)


def _dyweight_optimizer(
    predictor: nn.Module, lr: float, updates: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam; a tenth of the updates warms up, then a cosine down to a hundredth."""
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    warmup = updates // 10
    rates = torch.optim.lr_scheduler
    up = rates.LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
    down = rates.CosineAnnealingLR(optimizer, T_max=updates - warmup, eta_min=lr / 100)
    return optimizer, rates.SequentialLR(optimizer, [up, down], milestones=[warmup])


# AMED: a small network reads the U-Net's bottleneck and places an intermediate step, fitted step by step.


@dataclass(frozen=True)
class Amed:
    """Their options. `scale_dir` and `scale_time` bound what is learned beside the intermediate σ."""

    name: str
    solver: str
    max_order: int
    schedule: dict[str, Any]
    scale_dir: float = 0.01
    scale_time: float = 0.2
    batch: int = 32
    images: int = 3_200
    lr: float = 5e-3

    @property
    def single_step(self) -> bool:
        """AMED-Solver: Heun teaches, and every step is fitted from the teacher's state."""
        return self.solver == "amed"

    def __str__(self) -> str:
        base = "" if self.single_step else f"{self.solver} order {self.max_order}, "
        return (
            f"{base}{self.schedule['schedule_type']}, scale_dir {self.scale_dir:g}, "
            f"scale_time {self.scale_time:g}, lr {self.lr:g}, batch {self.batch}"
        )


def amed(bench: Bench, steps: int, folder: Path, variant: Amed) -> Outcome:
    """Fit and measure one variant. An odd number of evaluations needs AFS, as two make a step."""
    net = GuidedNet(bench.model, bench.cfg)
    pairs = (steps + 1) // 2
    teacher, between, per_step = ("heun", 1, 2) if variant.single_step else (variant.solver, 2, 1)
    solver = {
        "num_steps": pairs + 1, "sampler_stu": variant.solver, "sampler_tea": teacher, "M": between,
        "afs": steps % 2 == 1, "max_order": variant.max_order, "predict_x0": False, **variant.schedule,
    }  # fmt: skip
    with checkout(folder) as load, quiet(), net.bottleneck():
        torch.manual_seed(0)
        predictor = load("training.networks").AMED_predictor(
            img_resolution=net.img_resolution,
            scale_dir=variant.scale_dir,
            scale_time=variant.scale_time,
            **solver,
        )
        loss = load("training.loss").AMED_loss(sigma_min=net.sigma_min, sigma_max=net.sigma_max, **solver)
        cost = pairs * ((between + 1) * per_step + 4)
        images = images_within(BUDGET, cost, variant.images, variant.batch)
        optimizer = torch.optim.Adam(predictor.parameters(), lr=variant.lr)
        wrapped = nn.DataParallel(predictor)  # only for the .module that their DPM-Solver++ asks for
        for x, labels in batches(bench, images, variant.batch):
            _amed_updates(variant, loss, wrapped, optimizer, net, x, labels)
        fitting = net.evaluations

        def sample(x: Tensor, labels: Tensor) -> Tensor:
            return loss.solver_stu(
                net, x / loss.t_steps[0], condition=labels, AMED_predictor=predictor, sigma_min=net.sigma_min,
                sigma_max=net.sigma_max, **solver,
            )  # fmt: skip

        states, per_latent = on_test_latents(bench, net, sample)
    return Outcome(variant.name, str(variant), images, fitting, states, per_latent)


def _amed_updates(
    variant: Amed,
    loss: Any,
    predictor: nn.Module,
    optimizer: torch.optim.Optimizer,
    net: Net,
    x: Tensor,
    labels: Tensor,
) -> None:
    """One update at every step of the batch's trajectory."""
    with torch.no_grad():
        teacher = loss.get_teacher_traj(net=net, tensor_in=x, condition=labels)
    for step in range(loss.num_steps - 1):
        optimizer.zero_grad()
        squares, ended = loss(
            AMED_predictor=predictor,
            net=net,
            tensor_in=x,
            condition=labels,
            step_idx=step,
            teacher_out=teacher[step],
        )
        (squares.sum() / len(x)).backward()
        for parameter in predictor.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
        optimizer.step()
        x = teacher[step] if variant.single_step else ended


# GITS: dynamic programming chooses the student's σ among a finer teacher's.


@dataclass(frozen=True)
class Gits:
    """Their options. Without a search it is the stock solver on the stock schedule."""

    solver: str
    max_order: int
    schedule: dict[str, Any]
    search: bool = True
    coeff: float = 1.15
    teacher_steps: int = 61
    images: int = 256

    def __str__(self) -> str:
        coeff = f", coeff {self.coeff:g}" if self.search else ""
        return f"{self.solver} order {self.max_order}, {self.schedule['schedule_type']}{coeff}"


def gits(bench: Bench, steps: int, folder: Path, variant: Gits) -> Outcome:
    """Search (or take the stock schedule) and measure one variant."""
    net = Net(bench.model, bench.cfg)
    options = {
        "num_steps": steps + 1, "sigma_min": net.sigma_min, "sigma_max": net.sigma_max, "max_order": variant.max_order,
        "predict_x0": False, "lower_order_final": True, "afs": False, **variant.schedule,
    }  # fmt: skip
    with checkout(folder) as load, quiet():
        torch.manual_seed(0)
        module = load("gits_utils")
        chosen = _gits_search(module, net, variant, options) if variant.search else None
        fitting = net.evaluations
        t_steps = module.solver_utils.get_schedule(
            variant.teacher_steps if variant.search else steps + 1, net.sigma_min, net.sigma_max,
            device=torch.device("cpu"), net=net, dp_list=chosen, **variant.schedule,
        )  # fmt: skip
        sampler, _ = module.get_sampler_fn(variant.solver, torch.device("cpu"))
        options["num_steps"] = len(t_steps)
        states, per_latent = on_test_latents(
            bench,
            net,
            lambda x, labels: sampler(net, x / t_steps[0], class_labels=labels, t_steps=t_steps, **options),
        )
    return Outcome(
        "GITS" if variant.search else "nothing learned", str(variant), variant.images if variant.search else 0,
        fitting, states, per_latent,
    )  # fmt: skip


def _gits_search(module: ModuleType, net: Net, variant: Gits, options: dict[str, Any]) -> list[int]:
    """Their search. It draws its own latents and wants a process group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return module.get_dp_list(
            net, torch.device("cpu"), dataset_name="demo", model_source="edm", prompt=None, metric="dev",
            num_warmup=variant.images, max_batch_size=64, num_steps_tea=variant.teacher_steps, coeff=variant.coeff,
            solver=variant.solver, solver_tea=variant.solver, deis_mode="tab", **options,
        )  # fmt: skip
    finally:
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Refined:
    """Ours: greedy λ for Euler on the beta schedule, refined end to end."""

    latents: int

    def __str__(self) -> str:
        return f"from D-euler, beta; {self.latents} latents, a quarter held out"


def refined(bench: Bench, steps: int, folder: None, variant: Refined) -> Outcome:
    """Distil, refine and measure."""
    sigmas = make_sigmas("beta", steps, bench.model.noise_schedule)
    targets = run_teacher(bench.fit_latents(variant.latents), sigmas, TEACHER)
    row = refine(targets, distill(targets, sigmas))
    return Outcome(
        solver="refined D-ODE",
        settings=str(variant),
        images=variant.latents,
        fitting=sum(row.report["evaluations"].values()),
        states=bench.sample_row(row),
        per_latent=row.nfe,
    )


VARIANTS: dict[str, tuple[Callable[..., Outcome], tuple[Any, ...]]] = {
    "refined": (refined, (Refined(16), Refined(48), Refined(128))),
    "dyweight": (dyweight, (DyWeight(afs=False, history=3, lr=3e-2, schedule=DISCRETE),)),
    "amed": (
        amed,
        (
            Amed("AMED-Plugin", "ipndm", 4, POLYNOMIAL),
            Amed("AMED-Plugin", "dpmpp", 3, POLYNOMIAL),
            Amed("AMED-Solver", "amed", 4, TIME_UNIFORM, scale_time=0.0),
        ),
    ),
    "gits": (
        gits,
        (
            Gits("ipndm", 4, POLYNOMIAL, search=False),
            Gits("ipndm", 4, POLYNOMIAL),
            Gits("dpmpp", 3, POLYNOMIAL, search=False),
            Gits("dpmpp", 3, POLYNOMIAL),
            Gits("dpmpp", 3, POLYNOMIAL, coeff=1.0),
        ),
    ),
}
"""For every method how it is measured, and with which options."""


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 6, 8], help="network evaluations")
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--test-latents", type=int, default=96)
    parser.add_argument(
        "--diff-sampler", type=Path, help="checkout of zju-pi/diff-sampler, for amed and gits"
    )
    parser.add_argument("--dyweight", type=Path, help="checkout of Westlake-AGI-Lab/DyWeight, for dyweight")
    options = parser.parse_args()
    needed = {
        "--dyweight": "dyweight" in options.methods,
        "--diff-sampler": bool({"amed", "gits"} & set(options.methods)),
    }
    for name, is_needed in needed.items():
        folder = getattr(options, name[2:].replace("-", "_"))
        if is_needed and (folder is None or not folder.is_dir()):
            parser.error(f"{name}: a folder is needed")
    return options


def folders(options: argparse.Namespace) -> dict[str, Path]:
    """Where each method's modules are."""
    found = {}
    if options.dyweight:
        found["dyweight"] = options.dyweight.resolve()
    if options.diff_sampler:
        repository = options.diff_sampler.resolve()
        found |= {"amed": repository / "amed-solver-main", "gits": repository / "gits-main"}
    return found


def commit(folder: Path) -> str:
    """The commit that is checked out there."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


def converged_at_sigma_min(bench: Bench) -> Tensor:
    """The converged solution where their samplers end."""
    return sample_group(
        bench.test, make_sigmas("karras", 160, bench.model.noise_schedule)[:-1], "ipndm", None
    )


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    options = parse()
    places = folders(options)
    bench = prepare("eps", options.cfg, options.test_latents)
    at_sigma_min = converged_at_sigma_min(bench)
    rows = []
    for steps in options.steps:
        for name in options.methods:
            method, variants = VARIANTS[name]
            for variant in variants:
                start = time.perf_counter()
                found = method(bench, steps, places.get(name), variant)
                rows.append(
                    (f"{found.per_latent:g}", found.solver, found.settings, bench.error(found.states),
                     bench.median(found.states), root_mean_square(found.states - at_sigma_min), found.images,
                     found.fitting, round(time.perf_counter() - start))
                )  # fmt: skip
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print_setting(bench)
    print(
        "\nCommits: "
        + ", ".join(f"{name} {commit(places[name])}" for name in options.methods if name in places)
        + f". The converged solution moves by {root_mean_square(at_sigma_min - bench.converged):.4f} RMS from σ_min to 0."
    )
    print_table(
        ["evaluations", "solver", "settings", "RMS", "median", "RMS at σ_min", "fitted on images", "evaluations to fit",
         "seconds"], rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
