"""Makes version_1.safetensors and the ends of all version 1 files; runs on the code of that time (README.md)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from dode_nodes.distill import distill
from dode_nodes.groups import Group, held_out
from dode_nodes.refine import refine
from dode_nodes.sample import sample_dode
from dode_nodes.table import LambdaRow, LambdaTable
from dode_nodes.teacher import run_teacher
from safetensors.numpy import save_file

from tests.oracles import Gaussian, two_peaks
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
"""What the node Distill λ wrote of a model with two LoRAs on it (hosts/comfy/facts.py)."""
FROM_THE_NODE = {"cfg": 2.0, "seed": 0, "scheduler": "karras", "prompts": 4, "host": "ComfyUI"}


def refined(solver: str, steps: int, count: int) -> LambdaRow:
    """A row that refining has brought nearer to the teacher."""
    x = latents(count)
    row = distill(two_peaks, x, karras(steps), solver=solver, settings=FROM_THE_NODE)
    return refine(two_peaks, x, row)


def refined_in_vain(harmful: bool) -> LambdaRow:
    """A row for which no refinement is better on the held-out latents than the plain solver, or than itself."""
    x, sigmas = latents(8), karras(4)
    row = distill(two_peaks, x, sigmas)
    row = replace(row, weights=np.array([0, 9.0, -9.0, 9.0])) if harmful else row
    ends = sample_dode(two_peaks, x, sigmas, disable=True, row=row.plain if harmful else row) + 0.5
    ends[held_out([Group(two_peaks, x)])] -= 0.5
    targets = replace(run_teacher(two_peaks, x, sigmas), states={0.0: ends})
    return refine(two_peaks, x, row, targets=targets)


def shrunk() -> LambdaRow:
    """A row of which a part is kept: fitted on two models, checked on a third."""
    counts = {0.5: 3, 0.6: 3, 2.0: 1}
    groups = [Group(Gaussian(flow=False, std=std), latents(count)) for std, count in counts.items()]
    return distill(groups, None, karras(5))


def main(folder: Path) -> None:
    """Write the table, and where two_peaks ends with each row of it and of the tables beside it."""
    rows = [
        refined("dpmpp_2m", 4, count=8),
        refined("heun", 3, count=12),
        refined_in_vain(harmful=True),
        refined_in_vain(harmful=False),
        shrunk(),
    ]
    LambdaTable(rows, MODEL).save(folder / "version_1.safetensors", overwrite=True)
    ends = {}
    for name in ("version_1", "demo_eps", "demo_flow"):
        for i, row in enumerate(LambdaTable.load(folder / f"{name}.safetensors").rows):
            x = latents(1, sigma=float(row.sigmas[0]), seed=5)
            ends[f"{name}.{i}"] = sample_dode(two_peaks, x, row.sigmas, disable=True, row=row).numpy()
    save_file(ends, folder / "version_1_ends.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
