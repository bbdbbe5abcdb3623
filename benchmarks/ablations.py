"""The paper's ablations on the embedded models, and its analysis figures.

Scale C (Fig. 4), batch B, the formulations of Eq. 8 to 10 (D-DDIM-Sep, -All, -2, Fixed-D-DDIM), and for
multistep solvers three places for λ: the wrapper (what this package does), raw history with the raw
difference (the authors' code), and Eq. 25 (the difference of the high-order estimates). Figures: norm and
single values along the trajectory (the paper's Fig. 5), cosine of neighbouring outputs (Fig. 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import Bench, arguments, prepare, print_setting, print_table
from tqdm import tqdm

from dode_nodes import LambdaRow, Progress, Targets, distill, run_teacher, sample_dode
from dode_nodes.demo.experiment import TEACHER
from dode_nodes.fit.evaluator import Evaluator
from dode_nodes.fit.greedy import Formulation, dode, fit_greedily
from dode_nodes.fit.runs import Recording, Run
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.solvers import ADAMS_BASHFORTH, SOLVERS
from dode_nodes.tables.row import PREDICTIONS

STEPS = (5, 8, 10)
SCALES = (5, 10, 20, 30)
BATCHES = (5, 10, 50, 100)
FIXED_GRID = np.arange(0.0, 1.55, 0.1)


def separate(k: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """D-DDIM-Sep: ô = λ₁ o_k + λ₂ o_{k−1}."""
    unit = np.eye(k + 1)
    return -unit[k] if k else np.zeros(1), [unit[k], unit[k - 1]] if k else []


def every(k: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """D-DDIM-All, Eq. 8: ô = Σ_j λ_j o_j."""
    unit = np.eye(k + 1)
    return -unit[k] if k else np.zeros(1), list(unit) if k else []


def two(k: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """D-DDIM-2, our reading of Eq. 9: ô = o_k + λ₁ (o_k − o_{k−1}) + λ₂ (o_k − o_{k−2})."""
    unit = np.eye(k + 1)
    return np.zeros(k + 1), [unit[k] - unit[k - back] for back in (1, 2) if k >= back]


def ipndm_weights(k: int, order: int = 4) -> np.ndarray:
    """iPNDM's high-order estimate O_k as weights over raw outputs (Eq. 20 to 24)."""
    newest_first, divisor = ADAMS_BASHFORTH[min(k + 1, order) - 1]
    weights = np.zeros(k + 1)
    weights[k + 1 - len(newest_first) :] = newest_first[::-1]
    return weights / divisor


def raw_history(k: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """iPNDM over raw outputs, plus λ (o_k − o_{k−1}): the authors' code."""
    return ipndm_weights(k) - np.eye(k + 1)[k], dode(k)[1]


def high_order_difference(k: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Eq. 25: Ô_k = O_k + λ (O_k − O_{k−1}), O_k iPNDM's estimate."""
    base = ipndm_weights(k) - np.eye(k + 1)[k]
    return base, [ipndm_weights(k) - np.append(ipndm_weights(k - 1), 0)] if k else []


def fitted(bench: Bench, steps: int, formulation: Formulation, targets: Targets) -> LambdaRow:
    """A formulation under Euler in noise space, fitted greedily."""
    sigmas = bench.schedule(steps)
    queries = probe_student(SOLVERS["euler"], sigmas)
    batches = targets.latents.batches()
    recordings = [Recording(Run(SOLVERS["euler"], sigmas), batch, "noise") for batch in batches]
    evaluator = Evaluator(Progress(steps * len(targets.latents)))
    denoisers = [evaluator.on(batch, "student") for batch in batches]
    fit = fit_greedily(recordings, denoisers, queries, targets, formulation)
    return LambdaRow(
        "euler", sigmas.double().numpy(), queries.per_step, fit.corrections + np.eye(steps), form="history"
    )


def fixed(bench: Bench, steps: int, latents: int) -> tuple[LambdaRow, float]:
    """Fixed-D-DDIM: one λ for all steps, by grid search on the fitted latents' teacher."""
    fit = bench.fit_latents(latents)
    (group,) = fit.groups
    sigmas = bench.schedule(steps)
    (target,) = run_teacher(fit, sigmas, TEACHER).ends

    def row(value: float) -> LambdaRow:
        return LambdaRow("euler", sigmas.double().numpy(), (1,) * steps, np.full(steps, value))

    def loss(value: float) -> float:
        end = sample_dode(group.model, group.x, sigmas, group.extra_args(torch.arange(latents)), disable=True,
                          row=row(value))  # fmt: skip
        return float((end - target).square().mean())

    value = min(FIXED_GRID, key=loss)
    return row(value), float(value)


def error_of(bench: Bench, row: LambdaRow) -> float:
    """On the test latents."""
    return bench.error(bench.sample_row(row))


def scales_and_batches(bench: Bench) -> None:
    """D-DDIM in noise and data space against C and B."""

    def errors(latents: int, scale: int) -> list[float]:
        schedules = [bench.schedule(n) for n in STEPS]
        targets = run_teacher(bench.fit_latents(latents), schedules, replace(TEACHER, scale=scale))
        return [error_of(bench, distill(targets, s, prediction=p)) for p in PREDICTIONS for s in schedules]

    header = ["", *(f"{p}, {n} steps" for p in PREDICTIONS for n in STEPS)]
    print("\nScale C, B = 20:")
    print_table(header, [(f"C = {c}", *errors(20, c)) for c in tqdm(SCALES, desc="scale")])
    print("\nBatch B (a quarter held out), C = 10:")
    print_table(header, [(f"B = {b}", *errors(b, 10)) for b in tqdm(BATCHES, desc="batch")])


def formulations(bench: Bench, latents: int) -> None:
    """Eq. 8, 9, 10 and the places for λ in a multistep solver."""
    schedules = {n: bench.schedule(n) for n in STEPS}
    targets = run_teacher(
        bench.fit_latents(latents), list(schedules.values()), TEACHER, solvers=["euler", "ipndm"]
    )

    def errors(make: Callable[[int], LambdaRow]) -> list[float]:
        return [error_of(bench, make(n)) for n in STEPS]

    def stock(solver: str) -> list[float]:
        return [bench.error(bench.sample(sigmas, solver)) for sigmas in schedules.values()]

    def wrapped(prediction: str) -> Callable[[int], LambdaRow]:
        return lambda n: distill(targets, schedules[n], solver="ipndm", prediction=prediction)

    def of(formulation: Formulation) -> Callable[[int], LambdaRow]:
        return lambda n: fitted(bench, n, formulation, targets)

    print(
        f"\nFormulations over DDIM in noise space, fitted greedily on {latents} latents (a quarter held out):"
    )
    print_table(
        ["", *(f"{n} steps" for n in STEPS)],
        [
            ("DDIM", *stock("euler")),
            ("D-DDIM (Eq. 10)", *errors(of(dode))),
            ("D-DDIM-Sep", *errors(of(separate))),
            ("D-DDIM-All (Eq. 8)", *errors(of(every))),
            ("D-DDIM-2 (Eq. 9)", *errors(of(two))),
            ("Fixed-D-DDIM", *errors(lambda n: fixed(bench, n, latents)[0])),
        ],
    )
    print("\nWhere λ acts in iPNDM:")
    print_table(
        ["", *(f"{n} steps" for n in STEPS)],
        [
            ("iPNDM", *stock("ipndm")),
            ("wrapper, noise (with no-harm check)", *errors(wrapped("noise"))),
            ("wrapper, data (with no-harm check)", *errors(wrapped("data"))),
            ("raw history, raw difference (authors' code)", *errors(of(raw_history))),
            ("Eq. 25", *errors(of(high_order_difference))),
        ],
    )


def trajectories(bench: Bench, latents: int, steps: int, out: Path) -> None:
    """The paper's Fig. 5 and Fig. 2, as PNGs."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    kind = bench.model.kind
    targets = run_teacher(bench.fit_latents(latents), bench.schedule(steps), TEACHER)
    row = distill(targets, bench.schedule(steps))
    runs = {
        "DDIM": outputs(bench, bench.schedule(steps), None),
        "D-DDIM": outputs(bench, bench.schedule(steps), row),
        "converged": outputs(bench, bench.schedule(20 * steps), None),
    }
    figure = Figure(figsize=(10, 3.6), dpi=150, layout="constrained")
    norms, values = figure.subplots(1, 2)
    for name, (sigmas, states, _) in runs.items():
        style = {"marker": "o"} if len(sigmas) < 5 * steps else {"color": "grey", "linestyle": "--"}
        norms.plot(sigmas, states.flatten(2).norm(dim=2).mean(1), label=name, **style)
        values.plot(sigmas, states[:, 0, 0, 4, 4], label=name, **style)
    for ax, title in ((norms, "norm of the latent, mean"), (values, "one value of one latent")):
        ax.set(xlabel="σ", title=title)
        ax.set_xscale("symlog", linthresh=0.05)
        ax.invert_xaxis()
        ax.legend(frameon=False)
    figure.savefig(out / f"trajectory_{kind}.png")

    sigmas, states, denoised = outputs(bench, bench.schedule(100), None)
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    spread = torch.tensor(sigmas[:-1]).reshape(-1, 1, 1, 1, 1)
    kinds = {"noise": (states[:-1] - denoised) / spread, "data": denoised}
    for ax, (name, o) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
        unit = torch.nn.functional.normalize(o.flatten(2), dim=2)
        cosine = torch.einsum("ibd,jbd->ij", unit, unit) / unit.shape[1]
        image = ax.imshow(cosine, vmin=0, vmax=1, cmap="viridis")
        neighbours = float(cosine.diagonal(1).mean())
        ax.set(title=f"{name}: cosine of outputs\nneighbours {neighbours:.4f} on average",
               xlabel="evaluation", ylabel="evaluation")  # fmt: skip
    figure.colorbar(image, ax=figure.axes)
    figure.savefig(out / f"cosine_{kind}.png")
    print(f"\nFigures: {out}/trajectory_{kind}.png, {out}/cosine_{kind}.png")


def outputs(
    bench: Bench, sigmas: torch.Tensor, row: LambdaRow | None
) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """σ ``[N + 1]``, states ``[N + 1, B, …]`` and raw denoised ``[N, B, …]`` of 16 test latents."""
    group = bench.test
    some = torch.arange(16)
    states, denoised = [], []

    def noting(x: torch.Tensor, sigma: torch.Tensor, **extra_args: torch.Tensor) -> torch.Tensor:
        states.append(x)
        denoised.append(group.model(x, sigma, **extra_args))
        return denoised[-1]

    end = sample_dode(noting, group.x[some], sigmas, group.extra_args(some), disable=True, row=row)
    return sigmas.tolist(), torch.stack([*states, end]), torch.stack(denoised)


def main() -> None:
    """Measure, print and draw."""
    options = arguments(__doc__, test_latents=128, fit_latents=32)
    for kind in options.models:
        bench = prepare(kind, options.cfg, options.test_latents)
        print_setting(bench)
        scales_and_batches(bench)
        formulations(bench, options.fit_latents)
        trajectories(bench, options.fit_latents, 8, Path(__file__).parent / "figures")


if __name__ == "__main__":
    main()
