"""What the shipped tables gain: the README's main table.

For every number of network evaluations that the tables of lambdas/ have a row for, on one test set: the best stock
sampler × schedule × ending of all that ComfyUI has, chosen on the test latents in its favour; the row that λ alone
gave; and the row refined end to end. RMS and median distance to the converged solution at σ = 0, Fréchet distance to
the real digits. The tables were made by the command that each is printed with, on latents of other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import STEPS, Bench, arguments, frechet, prepare, print_setting, print_table
from stock import Stock, best_stock, combinations, samplers
from torch import Tensor
from tqdm import tqdm

from dode_nodes import LambdaRow, LambdaTable
from dode_nodes.demo.experiment import seeds_to_fit
from dode_nodes.tables.describe import setting_text
from dode_nodes.tables.row import shown_hash

LAMBDAS = Path(__file__).parents[1] / "lambdas"


@dataclass(frozen=True)
class Measured:
    """Results on the test latents.

    Attributes:
        error, median: distance to the converged solution.
        frechet: distance to the real digits.
    """

    error: float
    median: float
    frechet: float

    @classmethod
    def of(cls, bench: Bench, results: Tensor) -> Measured:
        return cls(bench.error(results), bench.median(results), frechet(results))

    @property
    def cells(self) -> list[float]:
        """For a table."""
        return [self.error, self.median, self.frechet]


def row_of(table: LambdaTable, evaluations: int, *, refined: bool) -> LambdaRow:
    """The only row of so many evaluations, with or without a refinement."""
    (row,) = [row for row in table.rows if row.nfe == evaluations and row.is_refined == refined]
    return row


def evaluations_to_reach(error: float, stock: Mapping[int, float]) -> str:
    """How many the best stock needs for this error; log-log between the budgets that were measured."""
    budgets = sorted(stock)
    best = np.minimum.accumulate([stock[n] for n in budgets])
    if error < best[-1]:
        return f"> {budgets[-1]}"
    return f"{np.exp(np.interp(-np.log(error), -np.log(best), np.log(budgets))):.1f}"


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, lists={"budgets": STEPS}, test_latents=96)
    for kind in options.models:
        table = LambdaTable.load(LAMBDAS / f"demo_{kind}.safetensors")
        bench = prepare(kind, options.cfg, options.test_latents)
        stock: dict[int, tuple[Stock, Measured]] = {}
        for n in tqdm(options.budgets, desc="stock"):
            _, chosen, results = best_stock(bench, combinations(bench, n))
            stock[n] = chosen, Measured.of(bench, results)
        print_setting(bench, fitted_from=seeds_to_fit(table.rows[0].settings["seed"], 1)[0])
        print_made(kind, table)
        print_errors(bench, table, stock)
        print_fits(table, options.budgets)


def print_made(kind: str, table: LambdaTable) -> None:
    """How the table was made, and what it is compared with."""
    settings = table.rows[0].settings
    steps = " ".join(str(n) for n in sorted({row.nfe for row in table.rows}))
    print(
        f"\nTable {shown_hash(table.sha256)}: `python -m dode_nodes distill --model {kind} --quality best --latents "
        f"{settings['latents']} --scale {settings['scale']} --cfg {settings['cfg']:g} --seed {settings['seed']} --steps "
        f"{steps}`, a quarter of the latents held out. Stock: {len(samplers(kind))} deterministic samplers."
    )


def print_errors(bench: Bench, table: LambdaTable, stock: Mapping[int, tuple[Stock, Measured]]) -> None:
    """The main table."""
    errors = {n: measured.error for n, (_, measured) in stock.items()}
    rows = []
    for n, (chosen, of_stock) in stock.items():
        plain, refined = row_of(table, n, refined=False), row_of(table, n, refined=True)
        of_plain, of_refined = (Measured.of(bench, bench.sample_row(row)) for row in (plain, refined))
        rows.append(
            (n, str(chosen), *of_stock.cells, *of_plain.cells, *of_refined.cells,
             of_refined.error / of_stock.error, of_refined.median / of_stock.median,
             evaluations_to_reach(of_refined.error, errors))
        )  # fmt: skip
    print(f"\nFréchet distance of the converged latents: {frechet(bench.converged):.2f}.")
    print_table(
        ["evaluations", "best stock of all", "RMS", "median", "Fréchet", "λ alone: RMS", "median", "Fréchet",
         "refined: RMS", "median", "Fréchet", "refined / stock, RMS", "median", "stock needs, for refined's RMS"],
        rows,
    )  # fmt: skip


def print_fits(table: LambdaTable, budgets: Sequence[int]) -> None:
    """What the refined rows are, and what each has cost."""
    rows = []
    for n in budgets:
        row = row_of(table, n, refined=True)
        report = row.report["refined"]
        held_out = [f"{stage['held_out_error']:.3f}" for stage in report["stages"]]
        spent = row.report["evaluations"]["refining"]
        rows.append(
            (
                n,
                row.label,
                setting_text(row.best_stock),
                report["kept"],
                ", ".join(held_out),
                spent,
                spent / row.settings["latents"],
            )
        )
    print_table(
        ["evaluations", "row", "best stock of the race", "kept", "held-out error, stage by stage",
         "evaluations spent on refining", "per latent"], rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
