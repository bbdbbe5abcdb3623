"""A training that is ended at any place and begun again finds the same, to the bit, and learns from no batch twice."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from dode_nodes import Latents, Progress, Teacher, run_teacher
from dode_nodes.fit import lora
from dode_nodes.fit.lora import STEP, LoraRecipe, LoraTraining
from dode_nodes.fit.low_rank import LowRank
from tests.fit.test_lora import SIGMAS, Network, plain
from tests.fit.test_resume import kept_in
from tests.toys import Interrupted, latents


def training(folder: Path | None, **recipe: object) -> tuple[LoraTraining, list[nn.Parameter]]:
    network = Network()
    sigmas = torch.tensor([4.0, 0.0], dtype=torch.float64)
    targets = run_teacher(
        Latents.of(network.denoise, latents(8, 2, 4, 4, sigma=4.0)), SIGMAS, Teacher(scale=4)
    )
    adapters = LowRank(network, 2)
    kept = None if folder is None else kept_in(folder)
    settings = {"iterations": 12, "batch": 2, "rate": 1e-2} | recipe
    rows = [plain(SIGMAS)] if recipe else [plain(SIGMAS), plain(sigmas)]
    return LoraTraining(targets, rows, adapters, LoraRecipe(**settings), kept), adapters.parameters()  # type: ignore[arg-type]


def batches(subject: LoraTraining) -> list[int]:
    """Numbers of the batches that it learns from, as it does."""
    seen: list[int] = []
    update = subject._update

    def noting(*args: object) -> float:
        loss = update(*args)  # type: ignore[arg-type]
        seen.append(len(subject.losses) + 1)
        return loss

    subject._update = noting  # type: ignore[method-assign]
    return seen


@cache
def whole() -> tuple[LoraTraining, list[nn.Parameter]]:
    """One that is not ended."""
    alone = training(None)
    alone[0].run()
    return alone


@pytest.mark.parametrize("part", [0.05, 0.5, 0.62, 0.97])
def test_it_goes_on_to_the_same_numbers(part: float, tmp_path: Path) -> None:
    alone, numbers = whole()
    first, _ = training(tmp_path)
    learned = batches(first)

    def stop(progress: Progress) -> None:
        if progress.done > part * first.cost:
            raise Interrupted

    with pytest.raises(Interrupted):
        first.run(stop)
    second, found = training(tmp_path)
    learned_after = batches(second)
    second.run()
    assert [*learned, *learned_after] == list(range(1, 13))
    assert second.losses == alone.losses
    assert second.best.errors == alone.best.errors
    assert second.best.strength == alone.best.strength
    assert second.errors_without == alone.errors_without
    assert all(map(torch.equal, found, numbers))


def test_after_a_crash_it_goes_on_from_what_was_kept_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed keeps nothing at its end: the last look, or some minutes ago, is where it is."""
    alone, _ = whole()
    for seconds, begins_with in ((1e9, 10), (-1.0, 12)):
        folder = tmp_path / str(begins_with)
        monkeypatch.setattr(lora, "_KEEP_SECONDS", seconds)
        first, _ = training(folder)
        update = first._update

        def killed(*args: object, first: LoraTraining = first, update: object = update) -> float:
            if len(first.losses) == 11:
                first._kept = None
                raise Interrupted
            return update(*args)  # type: ignore[operator,no-any-return]

        first._update = killed  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            first.run()
        second, _ = training(folder)
        learned = batches(second)
        second.run()
        assert learned[0] == begins_with
        assert second.losses == alone.losses


def test_of_a_batch_with_several_steps_nothing_half_done_is_kept(tmp_path: Path) -> None:
    settings = {"loss": STEP, "iterations": 8}
    alone, numbers = training(None, **settings)
    alone.run()
    first, _ = training(tmp_path, **settings)

    def stop(progress: Progress) -> None:
        if progress.done > 0.55 * first.cost and "training" in progress.stage:
            raise Interrupted

    with pytest.raises(Interrupted):
        first.run(stop)
    second, found = training(tmp_path, **settings)
    second.run()
    assert second.losses == alone.losses
    assert all(map(torch.equal, found, numbers))
