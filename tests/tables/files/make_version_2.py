"""Makes version_2.safetensors, and where two_peaks ends with its rows (README.md)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dode_nodes import LambdaRow, LambdaTable, Latents, distill, refine, run_teacher, sample_dode
from dode_nodes.tables.provenance import PLAIN, Lora, Origin, StockSetting
from tests.oracles import two_peaks
from tests.toys import karras, latents

MODEL = {
    "family": "SDXL",
    "prediction_type": "v",
    "channels": 4,
    "shift": None,
    "sigma_min": 0.029167158529162407,
    "sigma_max": 14.614641189575195,
    "fingerprint": {"layout": "89cb2f5b2975123c", "values": [round(0.01 * i - 0.2, 5) for i in range(48)]},
    "patches": {"weights": 722, "strengths": [0.5, 0.8]},
}
FROM_THE_NODE = {"cfg": 2.0, "seed": 0, "scheduler": "karras", "prompts": 4, "host": "ComfyUI"}


def rows() -> list[LambdaRow]:
    """Of every origin and form, with every field."""
    sigmas, solvers = karras(4), ["ipndm", "heun"]
    targets = run_teacher(Latents.of(two_peaks, latents(8)), sigmas, solvers=solvers)
    greedy = [distill(targets, sigmas, solver=solver, settings=FROM_THE_NODE) for solver in solvers]
    of_order_2 = distill(targets, sigmas, solver="ipndm", solver_options={"max_order": 2}, prediction="data")
    history, heun = (refine(targets, row) for row in greedy)
    return [
        replace(of_order_2, unknown={"x-note": "kept"}, unknown_arrays={"x-curve": np.arange(3, dtype="f4")}),
        replace(
            history,
            best_stock=StockSetting("dpmpp_2m", "karras", 0.125, 16, discard_penultimate=True),
            loras=[Lora("0123456789abcdef" * 4, 0.8, "detail.safetensors")],
        ),
        heun,
        replace(greedy[0], weights=np.zeros(4), origin=Origin(PLAIN), errors=None, report={}),
    ]


def main(folder: Path) -> None:
    """Write both files."""
    table = LambdaTable(
        rows(), MODEL, unknown={"x-table": [1, {"a": None}]}, unknown_arrays={"x-basis": np.eye(2)}
    )
    table.save(folder / "version_2.safetensors", overwrite=True)
    ends = {}
    for i, row in enumerate(table.rows):
        x = latents(1, sigma=float(row.sigmas[0]), seed=5)
        ends[f"version_2.{i}"] = sample_dode(two_peaks, x, row.sigmas, disable=True, row=row).numpy()
    save_file(ends, folder / "version_2_ends.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
