"""What test_ranks.py starts under torchrun: the same calls on every rank, and what came of them as a file a rank.

torchrun --nproc-per-node 2 tests/ranks.py FOLDER COMMANDS    # as JSON: [[port, [argument, ...]], ...]
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dode_nodes import Group, LambdaRow, Latents, Progress, Refinement, distill, refine, run_teacher
from dode_nodes.cli.commands import main as command_line
from dode_nodes.fit.lora import END, STEP, LoraRecipe, LoraTraining
from dode_nodes.fit.ranks import (
    failing_together,
    gather,
    process_group,
    rank_and_size,
    signals_wait,
    sum_over_ranks,
)
from tests.fit.test_lora import Toy, plain, targets_for
from tests.oracles import two_peaks
from tests.toys import Telling, karras, latents

told = Telling()


def groups(*sizes_and_shapes: tuple[int, ...]) -> list[Group]:
    """Of latents of their own."""
    return [Group(two_peaks, latents(*of, seed=i)) for i, of in enumerate(sizes_and_shapes)]


def fitted(micro_batch: int | None = None) -> list[LambdaRow]:
    """Rows of two groups, 5 and 2 latents (one is held out), distilled on one teacher's run, then refined."""
    told.clear()
    targets = run_teacher(Latents(groups((5,), (2, 1, 4, 6)), micro_batch), karras(4), progress=told)
    row = distill(targets, karras(4), progress=told)
    return [row, refine(targets, row, progress=told)]


def as_json(row: LambdaRow) -> dict[str, Any]:
    """All of a row."""
    return row.to_json() | {name: array.tolist() for name, array in row.arrays().items()}


def gathered() -> dict[str, Any]:
    """What ranks have that differ in shape or in having anything."""
    rank = rank_and_size()[0]
    parts = {
        "first has none": None if rank == 0 else torch.full((rank, 2), 0.1, dtype=torch.bfloat16),
        "first has most": torch.arange(3 - rank),
        "last has none": torch.eye(2, dtype=torch.float64)[None] if rank == 0 else None,
        "no numbers": torch.zeros(rank + 1, 0, 0),
        "none has any": None,
    }
    return {
        name: [[list(one.shape), str(one.dtype), one.tolist()] for one in gather(part)]
        for name, part in parts.items()
    }


def shares() -> dict[str, list[int]]:
    """This rank's latents of 5 + 2, and of the one held out."""
    whole, one_at_a_time = Latents(groups((5,), (2,))), Latents(groups((5,), (2,)), 1)
    shared = {
        "all": whole.batches(),
        "held out": whole.batches(whole.held_out),
        "one at a time": one_at_a_time.batches(),
    }
    return {name: [batch.numbers.tolist() for batch in batches] for name, batches in shared.items()}


def trained() -> dict[str, list[float]]:
    """θ, its errors and losses. Of five latents four are learned from, three at a time: the last alone, which one rank
    has nothing of."""
    found = {}
    for loss in (END, STEP):
        toy = Toy()
        recipe = LoraRecipe(10, batch=3, rate=0.02, loss=loss)
        training = LoraTraining(targets_for(toy, latents(5, sigma=4.0)), [plain()], toy, recipe)
        best = training.run()
        found[loss] = [float(toy.theta), best.strength, *best.errors, *training.losses]
    return found


def trained_until_one_rank_has_no_number() -> list[float]:
    """The answers of the last rank are NaN in its second batch: after how many batches it ended, and with which θ."""
    rank, size = rank_and_size()
    toy = Toy(nan_from=0.01 if rank == size - 1 else math.inf)
    recipe = LoraRecipe(8, batch=3, rate=0.2)
    training = LoraTraining(targets_for(toy, latents(4, sigma=4.0)), [plain()], toy, recipe)
    training.run()
    return [float(training.stopped_at or 0), float(toy.theta)]


def not_a_number_on_the_last_rank() -> None:
    """Its answers are NaN from the third on."""
    asked = 0
    last = rank_and_size()[0] == rank_and_size()[1] - 1

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return two_peaks(x, sigma) * (float("nan") if last and asked > 2 else 1)

    distill(run_teacher(Latents.of(model, latents(4)), karras(4)), karras(4))


def signal_to_the_last_rank(best: list[LambdaRow]) -> None:
    """As Ctrl-C or the end of another rank brings it, amid an evaluation of the refinement.

    Args:
        best: gets the best row that was found by then.
    """
    last = rank_and_size()[0] == rank_and_size()[1] - 1
    with signals_wait() as stop_if_asked:

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            if last and stage == "refining":
                os.kill(os.getpid(), signal.SIGINT)
            return two_peaks(x, sigma)

        def tell(p: Progress) -> None:
            nonlocal stage
            stage = p.stage
            stop_if_asked()

        stage = ""
        targets = run_teacher(Latents.of(model, latents(4)), karras(4))
        refinement = Refinement(targets, distill(targets, karras(4)))
        try:
            refinement.run(tell)
        finally:
            best.append(refinement.best)


def ending_of(work: Callable[[], None]) -> list[str]:
    """What it raises on this rank, under ``failing_together``."""
    try:
        with failing_together():
            work()
    except BaseException as error:
        return [type(error).__name__, str(error)]
    return []


def printed_by_command(port: int, arguments: list[str]) -> str:
    """What ``python -m dode_nodes`` prints on this rank. Started anew it would import everything again, so here the ranks
    meet anew instead, at this port."""
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    with redirect_stdout(io.StringIO()) as printed:
        status = command_line(arguments)
    assert status == 0
    return printed.getvalue()


def main(folder: Path, commands: list[tuple[int, list[str]]]) -> None:
    """On every rank."""
    with process_group():
        rank, size = rank_and_size()
        best: list[LambdaRow] = []
        found = {
            "size": size,
            "gathered": gathered(),
            "sum": float(sum_over_ranks(rank + 0.1)),
            "shares": shares(),
            "rows": [as_json(row) for row in fitted()],
            "told": list(told),
            "lora": trained(),
            "lora with nan": trained_until_one_rank_has_no_number(),
            "nan": ending_of(not_a_number_on_the_last_rank),
            "signal": ending_of(lambda: signal_to_the_last_rank(best)),
            "best after that": [as_json(row) for row in best],
            "rows after that": [as_json(row) for row in fitted(micro_batch=1)],
        }
    found["printed"] = [printed_by_command(*command) for command in commands]
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
