"""``python -m dode_nodes distill-lora``: for a demo model or a checkpoint, rows for a few steps and a LoRA for them.

Under ``torchrun``, every rank learns from a share of each batch. The first rank prints and writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..demo.catalogue import NAMES, PICTURES, load_model
from ..demo.experiment import check_settings, demo_latents, seeds_to_fit, usual_of
from ..demo.models import DemoModel
from ..errors import DodeError
from ..fit.latents import Latents
from ..fit.lora import LoraRecipe
from ..fit.lora_pipeline import ADVISED, LORA_QUALITIES, LoraPipeline, Outcome, best_rows
from ..fit.low_rank import LowRank
from ..fit.pipeline import Pipeline
from ..fit.quality import GOOD, START_SOLVER, quality_of, start_schedule
from ..fit.ranks import failing_together, is_first_rank, process_group, signals_wait
from ..fit.recipe import Recipe
from ..fit.teacher import Teacher
from ..tables.fingerprint import same_checkpoint
from ..tables.lora_file import Factors
from ..tables.publish import check_new
from ..tables.row import LambdaRow
from ..tables.table import LambdaTable
from .bar import Bar, raise_with
from .lora_work import LoraWork, lora_beside, save
from .make_table import CHECKPOINT_CFG, MICRO_BATCH, size_in_pixels, start_for_checkpoint

SMALL_RATE, LARGE_RATE = 2e-3, 5e-4
"""Learning rates that the demo models and that large networks stand."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options. None where the default depends on the model, the table or the quality."""
    model = parser.add_argument_group("what to train for")
    which = model.add_mutually_exclusive_group()
    which.add_argument("--model", choices=NAMES, default="eps",
                       help="a demo model, as for distill (default: %(default)s)")  # fmt: skip
    which.add_argument("--checkpoint", type=Path, metavar="FILE",
                       help="a .safetensors checkpoint with its text encoder, as for distill; needs "
                       "ComfyUI")  # fmt: skip
    model.add_argument("--prompt", action="append", metavar="TEXT",
                       help="with --checkpoint or --model pictures: a prompt like those you use; repeat it to give "
                       "several, which get equal shares of the latents (default for pictures: half of all that it "
                       "knows, in turns)")  # fmt: skip
    model.add_argument(
        "--negative", metavar="TEXT", help="with --checkpoint: the negative prompt (default: empty)"
    )
    model.add_argument("--size", type=size_in_pixels, metavar="WxH",
                       help="with --checkpoint: the size you will sample at, in pixels (default: 512x512)")  # fmt: skip
    model.add_argument("--cfg", type=float,
                       help="the classifier-free guidance scale you will sample with (default: the table's; without "
                       f"one {CHECKPOINT_CFG:g}, and of a demo model its own)")  # fmt: skip
    rows = parser.add_argument_group("the few-step solver")
    rows.add_argument("--steps", type=int, nargs="+", default=[2], metavar="N",
                      help="steps per picture; of several, one LoRA is trained for all. Above "
                      f"{ADVISED} it hardly pays (default: 2)")  # fmt: skip
    rows.add_argument("--table", type=Path, metavar="FILE",
                      help="a λ table with rows for these steps (default: they are distilled first)")  # fmt: skip
    training = parser.add_argument_group("the training")
    meanings = "; ".join(f"{name}: {each.words}" for name, each in LORA_QUALITIES.items())
    training.add_argument("--quality", choices=LORA_QUALITIES, default=GOOD,
                          help="how much work it may be, distilling the rows included "
                          f"(default: %(default)s). {meanings}")  # fmt: skip
    training.add_argument("--rank", type=int, default=8, help="of the LoRA (default: %(default)s)")
    training.add_argument("--rate", type=float,
                          help=f"the learning rate (default: {LARGE_RATE:g}; of a demo model "
                          f"{SMALL_RATE:g})")  # fmt: skip
    training.add_argument("--batch-size", type=int, default=4, metavar="N",
                          help="noises in a batch; fewer need less memory (default: %(default)s)")  # fmt: skip
    training.add_argument("--latents", type=int, metavar="N",
                          help="noises to train on; a quarter of them is held out (default: by quality)")  # fmt: skip
    training.add_argument("--iterations", type=int, metavar="N",
                          help="batches for each number of steps (default: by quality)")  # fmt: skip
    training.add_argument("--seed", type=int, default=0, help="seed of the noises (default: %(default)s)")
    training.add_argument("--redo", action="store_true",
                          help="with --checkpoint: begin anew what was fitted or begun before")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("lambda.safetensors"), metavar="FILE",
                        help="the λ table to write; the LoRA is written beside it, as FILE-lora. Neither may exist yet "
                        "(default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=train)


def train(options: argparse.Namespace) -> int:
    """Train, save, show.

    Raises:
        DodeError, RankFailed: something is wrong with the options, the model or its answers.
        KeyboardInterrupt: says where it has left what was found.
    """
    with process_group(), signals_wait() as stop_if_asked:
        work = _worked(options, stop_if_asked)
        if is_first_rank():
            saved = save(work, options.out)
            print(work.report())
            print("\n".join(["", *map(str, saved)]))
    return 0


def _worked(options: argparse.Namespace, stop_if_asked: Callable[[], None]) -> LoraWork:
    """All of it. Ended early, what there is is left in files."""
    work: LoraWork | None = None
    try:
        with failing_together(), Bar(stop_if_asked) as bar:
            if is_first_rank():
                for path in (options.out, lora_beside(options.out)):
                    check_new(path)
            work = _work(options, bar)
            work.run()
        return work
    except BaseException as error:
        partial = options.out.with_stem(f"{options.out.stem}-partial")
        if work is None or not is_first_rank() or not (saved := save(work, partial)):
            raise
        raise_with(error, f"what was found so far is saved in {' and '.join(map(str, saved))}")


def _work(options: argparse.Namespace, bar: Bar) -> LoraWork:
    """What the options ask for.

    Raises:
        DodeError: they are not in order; before any evaluation.
    """
    quality = LORA_QUALITIES[options.quality]
    options.steps = list(dict.fromkeys(options.steps))
    if options.latents is None:
        options.latents = max(quality.latents, 2 * len(options.prompt or []))
    if options.latents < 2:
        raise DodeError(
            f"set --latents to at least 2, one to train and one to check on; it is {options.latents}"
        )
    if options.rank < 1:
        raise DodeError(f"set --rank to at least 1; it is {options.rank}")
    if options.iterations is None:
        options.iterations = quality.iterations
    if options.checkpoint is None:
        return Embedded(options, bar)
    start_for_checkpoint(options)
    from .train_lora_checkpoint import OfCheckpoint  # now that there is a comfy to import

    return OfCheckpoint(options, bar)


def lora_recipe(options: argparse.Namespace, rate: float, *, checkpointing: bool) -> LoraRecipe:
    """How to train; ``rate`` is the usual one for the model."""
    return LoraRecipe(
        options.iterations * len(options.steps),
        options.batch_size,
        rate if options.rate is None else options.rate,
        checkpointing=checkpointing,
        seed=options.seed,
    )


class Embedded:
    """The training for an embedded model."""

    def __init__(self, options: argparse.Namespace, bar: Bar) -> None:
        if any(value is not None for value in (options.negative, options.size)):
            raise DodeError("use --negative and --size only with --checkpoint: the demo models have none")
        if options.prompt and options.model != PICTURES:
            raise DodeError(
                f"use --prompt only with --checkpoint or --model {PICTURES}: the other demo models draw digits"
            )
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        self._model, self._bar = load_model(options.model, device), bar
        steps, count = options.steps, options.latents
        given = None if options.table is None else _rows_of(options.table, self._model, steps)
        cfg = options.cfg
        if cfg is None and given is not None:
            cfg = given[0].settings.get("cfg")
        if cfg is None:
            cfg = usual_of(self._model.name).cfg
        check_settings(steps, cfg, options.seed)

        def latents(seeds: range) -> Latents:
            drawn = options.prompt or self._model.fitted_on
            return demo_latents(self._model, cfg, seeds, MICRO_BATCH, subjects=drawn)

        of_rows = quality_of(options.quality).count(len(options.prompt or []))
        seeds = seeds_to_fit(options.seed, of_rows + count)
        # What reads the subject belongs to a host's text encoder.
        self._adapters = LowRank(self._model.network, options.rank, options.seed, without="label")
        flow = self._model.kind == "flow"
        self._pipeline = LoraPipeline(
            latents(seeds[of_rows:]),
            given or self._distillation(latents(seeds[:of_rows]), steps, cfg, options, flow=flow),
            steps,
            self._adapters,
            lora_recipe(options, SMALL_RATE, checkpointing=False),
            self._model.make_sigmas,
            flow=flow,
        )

    def _distillation(
        self, latents: Latents, steps: Sequence[int], cfg: float, options: argparse.Namespace, *, flow: bool
    ) -> Pipeline:
        """Of the rows, as ``distill`` makes them."""
        schedule = start_schedule(flow=flow)
        recipe = Recipe(
            [START_SOLVER],
            teacher=Teacher(flow=flow),
            refine_budget=quality_of(options.quality).refine_budget,
            settings={"cfg": cfg, "seed": options.seed, "schedule": schedule},
            make_sigmas=self._model.make_sigmas,
            or_stock=True,
        )
        return Pipeline(latents, [self._model.make_sigmas(schedule, n, False) for n in steps], recipe)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the model."""
        return self._model.facts

    @property
    def rows(self) -> Sequence[LambdaRow]:
        """What there is of rows."""
        return self._pipeline.rows

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """What there is of results."""
        return self._pipeline.outcomes

    def run(self) -> None:
        """All of it."""
        self._bar.begin(str(self._pipeline.cost), *self._pipeline.remarks)
        self._pipeline.run(self._bar)

    def factors(self) -> dict[str, Factors]:
        """By the names that the demo nodes' models have in ComfyUI, so that it can be loaded there."""
        if not self._pipeline.helps:
            return {}
        return {f"network.{name}": each for name, each in self._adapters.factors().items()}

    def report(self) -> str:
        """What came of it, in words."""
        return self._pipeline.report()


def _rows_of(path: Path, model: DemoModel, steps: Sequence[int]) -> list[LambdaRow]:
    """The rows of a table for these steps.

    Raises:
        DodeError: it is another model's, or has no such row.
    """
    table = LambdaTable.load(path)
    mine = model.facts
    if same_checkpoint(table.model.get("fingerprint", {}), mine["fingerprint"]) is not True:
        name = table.model.get("name", "another")
        raise DodeError(f"{path}: give a table of this model, {mine['name']}: this one is for {name}")
    return best_rows(table.rows, steps)
