"""``distill-lora`` for a checkpoint, which ComfyUI loads. Imported once ComfyUI has been started."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..demo.experiment import check_settings
from ..fit.lora_pipeline import Outcome, best_rows
from ..fit.quality import START_SOLVER, quality_of
from ..fit.ranks import is_first_rank
from ..fit.recipe import Recipe
from ..hosts.comfy.checkpoint import combinations_of, distillation, lora_training
from ..hosts.comfy.lora_job import LoraDistillation, LoraRequest
from ..hosts.comfy.model_facts import check_model, model_facts
from ..tables.lora_file import Factors
from ..tables.row import LambdaRow
from ..tables.table import LambdaTable
from .bar import Bar
from .make_table import CHECKPOINT_CFG
from .once import Once
from .train_lora import LARGE_RATE, lora_recipe


class OfCheckpoint:
    """The training for a checkpoint: its rows first, if there is no table.

    Raises:
        DodeError: something is wrong with the options, the table or the checkpoint; before any evaluation.
    """

    def __init__(self, options: argparse.Namespace, bar: Bar) -> None:
        table = None if options.table is None else LambdaTable.load(options.table)
        self.rows: Sequence[LambdaRow] = [] if table is None else best_rows(table.rows, options.steps)
        if options.cfg is None:
            options.cfg = self.rows[0].settings.get("cfg", CHECKPOINT_CFG) if self.rows else CHECKPOINT_CFG
        check_settings(options.steps, options.cfg, options.seed)
        options.micro_batch = None
        self._recipe = lora_recipe(options, LARGE_RATE, checkpointing=True)
        self._options, self._bar = options, bar
        self._combinations = combinations_of(options)
        self._combinations.check(options.latents)
        self._training: LoraDistillation | None = None
        if table is not None and is_first_rank():
            for line in check_model(table.model, self._combinations.model):
                print(line)
        self._making = self._of_rows() if table is None else None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the model."""
        return model_facts(self._combinations.model)

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """What there is of results."""
        return [] if self._training is None else self._training.pipeline.outcomes

    def run(self) -> None:
        """All of it."""
        options = self._options
        if self._making is not None:
            with torch.inference_mode():
                self._making.run()
            table = self._making.table()
            assert table is not None  # noqa: S101  # it has run
            self.rows = best_rows(table.rows, options.steps)
        request = LoraRequest(
            **self._combinations.parts,
            rows=self.rows,
            count=options.latents,
            recipe=self._recipe,
            rank=options.rank,
        )
        self._training = lora_training(request, self._bar, redo=options.redo)
        self._training.run()

    def factors(self) -> dict[str, Factors]:
        """The LoRA by the names of ComfyUI's layers, if it makes a row better; else nothing."""
        return {} if self._training is None else self._training.factors()

    def report(self) -> str:
        """What came of it, in words."""
        return "" if self._training is None else self._training.pipeline.report()

    def _of_rows(self) -> Once:
        """As ``distill`` makes them."""
        options, quality = self._options, quality_of(self._options.quality)
        usual = {"latents": quality.count(len(options.prompt)), "solver": START_SOLVER, "schedule": None}
        recipe = Recipe(
            solvers=[START_SOLVER],
            refine_budget=quality.refine_budget,
            settings={"cfg": options.cfg, "seed": options.seed},
            or_stock=True,
        )
        asked = argparse.Namespace(**vars(options) | usual)
        return Once(*distillation(self._combinations, asked, recipe, self._bar))
