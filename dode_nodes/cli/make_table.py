"""``python -m dode_nodes distill``: a λ table for an embedded model, a checkpoint or a pipeline, without a graph.

Under ``torchrun``, every rank does the same on a share of the latents. The first rank prints and writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..demo.catalogue import NAMES, PICTURES, load_model
from ..demo.experiment import check_settings, demo_latents, in_turns, seeds_to_fit, usual_of
from ..errors import DodeError
from ..fit.headline import LATENTS as UNSEEN
from ..fit.key import key_of
from ..fit.known import KnownFit
from ..fit.pipeline import Pipeline
from ..fit.quality import GOOD, QUALITIES, START_SOLVER, quality_of, start_schedule
from ..fit.ranks import failing_together, is_first_rank, process_group, signals_wait
from ..fit.recipe import Recipe
from ..fit.teacher import Teacher
from ..sampling.schedules import make_sigmas
from ..tables.describe import summary_text
from ..tables.publish import first_free, numbered
from ..tables.row import PREDICTIONS
from ..tables.table import LambdaTable
from .bar import Bar, raise_with
from .once import Once, Work

if TYPE_CHECKING:
    from ..hosts.diffusers import Distillation as PipelineDistillation

AUTO = "auto"
CHECKPOINT_CFG = 7.0
MICRO_BATCH = 16  # of an embedded model's latents: what fits a CPU's cache


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options. None where the default depends on the model."""
    model = parser.add_argument_group("what to distil for")
    which = model.add_mutually_exclusive_group()
    which.add_argument("--model", choices=NAMES, default="eps",
                       help="a demo model. pictures draws landscapes that a few words ask for, and is a rectified flow, "
                       "like SD3 and FLUX; the others draw digits: eps predicts noise, like Stable Diffusion; flow is "
                       "a rectified flow (default: %(default)s)")  # fmt: skip
    which.add_argument("--checkpoint", type=Path, metavar="FILE",
                       help="a .safetensors checkpoint with its text encoder; needs ComfyUI: at $COMFYUI_PATH, the one "
                       "this pack is installed in, or ~/comfy/ComfyUI")  # fmt: skip
    which.add_argument("--pipeline", type=Path, metavar="DIR",
                       help="a folder of diffusers, of safetensors files; needs pip install "
                       "'dode-nodes[diffusers]'")  # fmt: skip
    model.add_argument("--prompt", action="append", metavar="TEXT",
                       help="with --checkpoint, --pipeline or --model pictures: a prompt like those you use; repeat "
                       "it to give several, which get equal shares of the latents (default for pictures: half of all "
                       "that it knows, in turns)")  # fmt: skip
    model.add_argument("--negative", metavar="TEXT",
                       help="with --checkpoint or --pipeline: the negative prompt (default: empty)")  # fmt: skip
    model.add_argument("--size", type=size_in_pixels, metavar="WxH",
                       help="with --checkpoint or --pipeline: the size you will sample at, in pixels (default: 512x512; "
                       "of a pipeline, its own)")  # fmt: skip
    model.add_argument("--cfg", type=float,
                       help="the classifier-free guidance scale you will sample with "
                       f"(default: {CHECKPOINT_CFG:g}; of a demo model, its own)")  # fmt: skip

    student = parser.add_argument_group("the few-step solver")
    student.add_argument("--steps", type=int, nargs="+", default=[5, 8], metavar="N",
                         help="steps per picture; the teacher runs only once for all of them (default: 5 8)")  # fmt: skip
    student.add_argument(
        "--solver", help=f"the deterministic sampler that the fit begins with (default: {START_SOLVER})"
    )
    student.add_argument("--schedule",
                         help="the σ schedule that the fit begins with, by ComfyUI's scheduler names "
                         "(default: karras; simple for a flow model)")  # fmt: skip
    student.add_argument("--prediction", choices=(AUTO, *PREDICTIONS), default=AUTO,
                         help="what λ corrects; auto tries both and keeps the one with the smaller held-out error "
                         "(default: %(default)s)")  # fmt: skip

    fit = parser.add_argument_group("the fit")
    meanings = "; ".join(f"{name}: {quality.words}" for name, quality in QUALITIES.items())
    fit.add_argument("--quality", choices=QUALITIES, default=GOOD,
                     help=f"how much work it may be (default: %(default)s). {meanings}")  # fmt: skip
    fit.add_argument("--latents", type=int, metavar="N",
                     help="noises to distil on; a quarter of them is held out to check λ "
                     "(default: by quality)")  # fmt: skip
    fit.add_argument("--seed", type=int, default=0, help="seed of the noises (default: %(default)s)")
    fit.add_argument("--teacher", default="dpmpp_2m", metavar="SOLVER",
                     help="the sampler to follow (default: %(default)s)")  # fmt: skip
    fit.add_argument("--scale", type=int, default=0, metavar="C",
                     help="teacher steps per step of the few-step solver "
                     "(default: 30 in all, at least 5 per step, for a flow model 8)")  # fmt: skip
    fit.add_argument("--refine-budget", type=float, metavar="X",
                     help="what the refinement of a row may cost, as a multiple of ten of its own runs over all noises; "
                     "0 for λ alone (default: by quality)")  # fmt: skip
    fit.add_argument("--micro-batch", type=int, metavar="N",
                     help="latents to evaluate at once; does not change the table "
                     f"(default: {MICRO_BATCH}; for a checkpoint, what fits into memory; for a pipeline, "
                     "4)")  # fmt: skip
    fit.add_argument("--redo", action="store_true",
                     help="fit again what was fitted before, and from the beginning what was interrupted")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("lambda.safetensors"), metavar="FILE",
                        help="the λ table to write; must not exist yet (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=distil)


def size_in_pixels(text: str) -> tuple[int, int]:
    """Width and height."""
    try:
        width, height = map(int, text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"write the size as 512x512, not '{text}'") from None
    return width, height


def distil(options: argparse.Namespace) -> int:
    """Find a table, save it, show it.

    Raises:
        DodeError, RankFailed: something is wrong with the options, the model or its answers.
        KeyboardInterrupt: says where it has left what was found.
    """
    with process_group(), signals_wait() as stop_if_asked, torch.inference_mode():
        table = _found(options, stop_if_asked)
        if table is not None and is_first_rank():
            # If the name is taken meanwhile, that is no reason to lose the work.
            path = first_free(numbered(options.out), table.save)
            print(f"{summary_text(table.rows)}\n\nThe table: {path}")
    return 0


def _found(options: argparse.Namespace, stop_if_asked: Callable[[], None]) -> LambdaTable | None:
    """The whole table. Ended early, it is left as far as it has come."""
    work: Work | None = None
    try:
        with failing_together(), Bar(stop_if_asked) as bar:
            if is_first_rank():
                LambdaTable.check_new(options.out)
            work = _work(options, bar)
            work.run()
        return work.table()
    except BaseException as error:
        table = None if work is None else work.table()
        if table is None or not is_first_rank():
            raise
        out = options.out
        partial = first_free(numbered(out.with_stem(f"{out.stem}-partial")), table.save)
        raise_with(error, f"the rows found so far are saved in {partial}")


def _work(options: argparse.Namespace, bar: Bar) -> Work:
    """What the options ask for; as far as can be seen from here they are in order.

    Raises:
        DodeError: they are not; before any evaluation.
    """
    if options.cfg is None:
        embedded = options.checkpoint is None and options.pipeline is None
        options.cfg = usual_of(options.model).cfg if embedded else CHECKPOINT_CFG
    options.steps = list(dict.fromkeys(options.steps))
    check_settings(options.steps, options.cfg, options.seed)
    or_stock = options.solver is None and options.schedule is None
    options.solver = options.solver or START_SOLVER
    quality = quality_of(options.quality)
    if options.latents is None:
        options.latents = quality.count(len(options.prompt or []))
    if options.refine_budget is None:
        options.refine_budget = quality.refine_budget
    if options.latents < 2:
        raise DodeError(
            f"set --latents to at least 2, one to fit and one to check on; it is {options.latents}"
        )
    if options.micro_batch is not None and options.micro_batch < 1:
        raise DodeError(f"set --micro-batch to at least 1; it is {options.micro_batch}")
    recipe = Recipe(
        solvers=[options.solver],
        predictions=PREDICTIONS if options.prediction == AUTO else [options.prediction],
        teacher=Teacher(options.teacher, options.scale),
        refine_budget=options.refine_budget,
        settings={"cfg": options.cfg, "seed": options.seed},
        or_stock=or_stock,
    )
    if options.checkpoint is not None:
        return _of_checkpoint(options, recipe, bar)
    if options.pipeline is not None:
        return _of_pipeline(options, recipe, bar)
    if any(value is not None for value in (options.negative, options.size)):
        raise DodeError(
            "use --negative and --size only with --checkpoint or --pipeline: the demo models have none"
        )
    if options.prompt and options.model != PICTURES:
        raise DodeError(
            f"use --prompt only with --checkpoint, --pipeline or --model {PICTURES}: the other demo models draw digits"
        )
    work = Embedded(options, recipe, bar)
    return Once(work, work.fit)


def _of_pipeline(options: argparse.Namespace, recipe: Recipe, bar: Bar) -> PipelineDistillation:
    if not options.prompt:
        raise DodeError("give at least one --prompt with --pipeline, like those you will use")
    if not (options.pipeline / "model_index.json").is_file():
        raise DodeError(f"{options.pipeline}: not a folder of diffusers: it has no model_index.json")
    try:
        from ..hosts.diffusers.folder import distillation
    except ImportError as error:
        raise DodeError(
            f"--pipeline needs diffusers: pip install 'dode-nodes[diffusers]' ({error})"
        ) from error

    return distillation(options, recipe, bar)


def start_for_checkpoint(options: argparse.Namespace) -> None:
    """Start the ComfyUI that loads the options' checkpoint.

    Raises:
        DodeError: there is none, or the options are not in order.
    """
    if not options.prompt:
        raise DodeError("give at least one --prompt with --checkpoint, like those you will use")
    if options.checkpoint.suffix not in (".safetensors", ".sft"):
        raise DodeError(
            f"give a .safetensors file, not {options.checkpoint}: other formats can run code when they are loaded"
        )
    if not options.checkpoint.is_file():
        raise DodeError(f"there is no file {options.checkpoint}")
    from ..hosts.comfy.launch import start_comfyui

    start_comfyui()


def _of_checkpoint(options: argparse.Namespace, recipe: Recipe, bar: Bar) -> Once:
    start_for_checkpoint(options)
    from ..hosts.comfy.checkpoint import combinations_of, distillation  # now that there is a comfy to import

    return Once(*distillation(combinations_of(options), options, recipe, bar))


class Embedded:
    """The distillation for an embedded model.

    Attributes:
        fit: what is known of it.
    """

    def __init__(self, options: argparse.Namespace, recipe: Recipe, bar: Bar) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        model = load_model(options.model, device)
        schedule = options.schedule or start_schedule(flow=model.kind == "flow")
        recipe = replace(
            recipe,
            teacher=replace(recipe.teacher, flow=model.kind == "flow"),
            settings=dict(recipe.settings) | {"schedule": schedule},
            make_sigmas=model.make_sigmas,
        )
        seeds = seeds_to_fit(options.seed, options.latents + UNSEEN)
        drawn = in_turns(options.prompt or model.fitted_on, len(seeds))
        fitted, measured = slice(options.latents), slice(options.latents, None)
        latents, unseen = (
            demo_latents(
                model, options.cfg, seeds[part], options.micro_batch or MICRO_BATCH, subjects=drawn[part]
            )
            for part in (fitted, measured)
        )
        schedules = [make_sigmas(schedule, steps, model.noise_schedule).to(device) for steps in options.steps]
        parts = {
            "model": [model.name, model.network.state_dict()],
            "drawn": [options.prompt, options.cfg, options.latents, options.seed],
            "schedules": schedules,
            "recipe": recipe.parts,
        }
        self.fit = KnownFit.by(lambda: key_of(parts), redo=options.redo)
        self._bar = bar
        self._facts = model.facts
        self._pipeline = Pipeline(latents, schedules, recipe, unseen, self.fit.work)

    def run(self) -> None:
        """All of it."""
        self._bar.begin(str(self._pipeline.cost), *self._pipeline.remarks)
        self._pipeline.run(self._bar)

    def table(self) -> LambdaTable | None:
        """What has been found so far."""
        found = self._pipeline.found
        return LambdaTable(found, model=self._facts) if found else None
