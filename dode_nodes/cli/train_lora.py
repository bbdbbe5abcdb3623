"""``python -m dode_nodes distill-lora``: rows for a few steps of an embedded model, and a LoRA trained for them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..demo.catalogue import NAMES, PICTURES, load_model
from ..demo.experiment import check_settings, demo_latents, seeds_to_fit, usual_of
from ..demo.models import DemoModel
from ..errors import DodeError
from ..fit.latents import Latents
from ..fit.lora import LoraRecipe
from ..fit.lora_pipeline import ADVISED, LORA_QUALITIES, LoraPipeline, best_rows
from ..fit.low_rank import LowRank
from ..fit.pipeline import Pipeline, Recipe
from ..fit.quality import GOOD, START_SOLVER, quality_of, start_schedule
from ..fit.ranks import is_one_of_several
from ..fit.teacher import Teacher
from ..tables.lora_file import content_hash, write_lora
from ..tables.publish import check_new, first_free, numbered
from ..tables.row import LambdaRow
from ..tables.table import LambdaTable
from .bar import Bar, raise_with
from .make_table import MICRO_BATCH


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options. None where the default depends on the model, the table or the quality."""
    model = parser.add_argument_group("what to train for")
    model.add_argument("--model", choices=NAMES, default="eps",
                       help="a demo model, as for distill (default: %(default)s)")  # fmt: skip
    model.add_argument("--prompt", action="append", metavar="TEXT",
                       help="with --model pictures: a prompt; repeat it to give several, which get equal shares of the "
                       "latents")  # fmt: skip
    model.add_argument("--cfg", type=float,
                       help="the classifier-free guidance scale you will sample with (default: the table's, or the "
                       "model's own)")  # fmt: skip
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
    training.add_argument("--rate", type=float, default=2e-3, help="the learning rate (default: %(default)s)")
    training.add_argument("--latents", type=int, metavar="N",
                          help="noises to train on; a quarter of them is held out (default: by quality)")  # fmt: skip
    training.add_argument("--iterations", type=int, metavar="N",
                          help="batches for each number of steps (default: by quality)")  # fmt: skip
    training.add_argument("--seed", type=int, default=0, help="seed of the noises (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("lambda.safetensors"), metavar="FILE",
                        help="the λ table to write; the LoRA is written beside it, as FILE-lora. Neither may exist yet "
                        "(default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=train)


def train(options: argparse.Namespace) -> int:
    """Train, save, show.

    Raises:
        DodeError: something is wrong with the options, the model or its answers.
        KeyboardInterrupt: says where it has left what was found.
    """
    if is_one_of_several():
        raise DodeError("start this without torchrun: several processes cannot share this work yet")
    for path in (options.out, _lora_beside(options.out)):
        check_new(path)
    work: Work | None = None
    try:
        with Bar() as bar:
            work = Work(options)
            bar.begin(str(work.pipeline.cost), *work.pipeline.remarks)
            work.pipeline.run(bar)
    except BaseException as error:
        partial = options.out.with_stem(f"{options.out.stem}-partial")
        if work is None or not (saved := work.save(partial)):
            raise
        raise_with(error, f"what was found so far is saved in {' and '.join(map(str, saved))}")
    saved = work.save(options.out)
    print(work.pipeline.report())
    print("\n".join(["", *map(str, saved)]))
    return 0


def _lora_beside(table: Path) -> Path:
    return table.with_stem(f"{table.stem}-lora")


class Work:
    """The training for an embedded model.

    Attributes:
        pipeline: all that is done.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self._model = load_model(options.model, device)
        steps = list(dict.fromkeys(options.steps))
        given = None if options.table is None else _rows_of(options.table, self._model, steps)
        cfg = options.cfg
        if cfg is None and given is not None:
            cfg = given[0].settings.get("cfg")
        if cfg is None:
            cfg = usual_of(self._model.name).cfg
        check_settings(steps, cfg, options.seed)
        if options.prompt and options.model != PICTURES:
            raise DodeError(f"use --prompt only with --model {PICTURES}: the other demo models draw digits")
        quality = LORA_QUALITIES[options.quality]
        count = quality.latents if options.latents is None else options.latents
        iterations = quality.iterations if options.iterations is None else options.iterations
        if count < 2:
            raise DodeError(f"set --latents to at least 2, one to train and one to check on; it is {count}")

        def latents(seeds: range) -> Latents:
            return demo_latents(self._model, cfg, seeds, MICRO_BATCH, options.prompt)

        of_rows = quality_of(options.quality).count(len(options.prompt or []))
        seeds = seeds_to_fit(options.seed, of_rows + count)
        # What reads the subject belongs to a host's text encoder.
        self._adapters = LowRank(self._model.network, options.rank, options.seed, without="label")
        flow = self._model.kind == "flow"
        self.pipeline = LoraPipeline(
            latents(seeds[of_rows:]),
            given or self._distillation(latents(seeds[:of_rows]), steps, cfg, options, flow=flow),
            steps,
            self._adapters,
            LoraRecipe(iterations * len(steps), rate=options.rate, seed=options.seed, checkpointing=False),
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
            refine_budget=quality_of(options.quality).budget(len(steps)),
            settings={"cfg": cfg, "seed": options.seed, "schedule": schedule},
            make_sigmas=self._model.make_sigmas,
            or_stock=True,
        )
        return Pipeline(latents, [self._model.make_sigmas(schedule, n, False) for n in steps], recipe)

    def save(self, out: Path) -> list[Path]:
        """The table of what rows there are and, if it makes one of them better, the LoRA; where they are."""
        outcomes, rows = self.pipeline.outcomes, self.pipeline.rows
        saved: list[Path] = []
        if self.pipeline.helps:
            # By the names that the demo nodes' models have in ComfyUI, so that it can be loaded there.
            factors = {f"network.{name}": each for name, each in self._adapters.factors().items()}
            lora = first_free(numbered(_lora_beside(out)), lambda path: write_lora(path, factors))
            rows = [each.named(content_hash(factors), lora.name) for each in outcomes]
            saved.append(lora)
        if rows:
            table = LambdaTable(rows, model=self._model.facts)
            saved.insert(0, first_free(numbered(out), table.save))
        return saved


def _rows_of(path: Path, model: DemoModel, steps: Sequence[int]) -> list[LambdaRow]:
    """The rows of a table for these steps.

    Raises:
        DodeError: it is another model's, or has no such row.
    """
    table = LambdaTable.load(path)
    if any(table.model.get(name) != fact for name, fact in model.facts.items()):
        raise DodeError(
            f"{path}: give a table of this model: this one is for {table.model.get('name', 'another')}"
        )
    return best_rows(table.rows, steps)
