"""``python -m dode_nodes distill``: a λ table for an embedded model or a checkpoint, without a graph.

Under ``torchrun`` every rank does the same, on a share of the latents; the first prints and writes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from tqdm import tqdm

from .demo.demo import STUDENT_SCHEDULE, check_settings, latents_group, seeds_to_fit
from .demo.models import KINDS, load_demo_model
from .denoiser import PREDICTIONS
from .describe import summary_text
from .errors import DodeError
from .groups import Progress
from .pipeline import Pipeline
from .ranks import failing_together, is_first_rank, meet, process_group, signals_wait
from .safefile import free_path
from .schedules import make_sigmas
from .table import LambdaTable

if TYPE_CHECKING:
    from .hosts.comfy.distilling import Distillation

AUTO = "auto"
_EMBEDDED_CFG, _CHECKPOINT_CFG = 2.0, 7.0
_MICRO_BATCH = 16  # of an embedded model's latents: what fits a CPU's cache


class Work(Protocol):
    """A distillation that can be ended at any time."""

    def run(self) -> object:
        """All of it."""

    def table(self) -> LambdaTable | None:
        """What has been found so far; None where that is nothing."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options. None where the default depends on the model."""
    model = parser.add_argument_group("what to distil for")
    which = model.add_mutually_exclusive_group()
    which.add_argument("--model", choices=KINDS, default="eps",
                       help="a model of digits inside this package: eps predicts noise, as Stable Diffusion; "
                       "flow is a rectified flow, as SD3 and FLUX (default: %(default)s)")  # fmt: skip
    which.add_argument("--checkpoint", type=Path, metavar="FILE",
                       help="a checkpoint with its text encoder, .safetensors; loaded and sampled by the ComfyUI at "
                       "$COMFYUI_PATH, around this pack, or in ~/comfy/ComfyUI")  # fmt: skip
    model.add_argument("--prompt", action="append", metavar="TEXT",
                       help="with --checkpoint: a prompt like those you use; again for more, which share the "
                       "latents equally")  # fmt: skip
    model.add_argument("--negative", metavar="TEXT",
                       help="with --checkpoint: the negative prompt (default: empty)")  # fmt: skip
    model.add_argument("--size", type=_size, metavar="WxH",
                       help="with --checkpoint: pixels of the pictures you will sample (default: 512x512)")  # fmt: skip
    model.add_argument("--cfg", type=float,
                       help="scale of classifier-free guidance that you will sample with "
                       f"(default: {_EMBEDDED_CFG:g}; {_CHECKPOINT_CFG:g} for a checkpoint)")  # fmt: skip

    student = parser.add_argument_group("the few-step solver")
    student.add_argument("--steps", type=int, nargs="+", default=[5, 8], metavar="N",
                         help="steps per picture; one run of the teacher serves them all (default: 5 8)")  # fmt: skip
    student.add_argument("--solver", default="euler",
                         help="the sampler to improve, any deterministic one (default: %(default)s)")  # fmt: skip
    student.add_argument("--schedule",
                         help="its σ, by ComfyUI's names of schedulers "
                         "(default: karras; simple for a flow model)")  # fmt: skip
    student.add_argument("--prediction", choices=(AUTO, *PREDICTIONS), default=AUTO,
                         help="what λ corrects; auto tries both and keeps what does better on latents that λ was not "
                         "fitted on (default: %(default)s)")  # fmt: skip

    fit = parser.add_argument_group("the fit")
    fit.add_argument("--latents", type=int, default=32, metavar="N",
                     help="noises to distil on; a quarter of them is kept to check λ on "
                     "(default: %(default)s)")  # fmt: skip
    fit.add_argument("--seed", type=int, default=0, help="of the noises (default: %(default)s)")
    fit.add_argument("--teacher", default="dpmpp_2m", metavar="SOLVER",
                     help="the sampler to follow (default: %(default)s)")  # fmt: skip
    fit.add_argument("--scale", type=int, default=10, metavar="C",
                     help="its steps per step of the few-step solver (default: %(default)s)")  # fmt: skip
    fit.add_argument("--refine-budget", type=float, default=4.0, metavar="X",
                     help="what refining may cost, as a multiple of the teacher's evaluations; 0 for λ alone "
                     "(default: %(default)s)")  # fmt: skip
    fit.add_argument("--micro-batch", type=int, metavar="N",
                     help="latents evaluated at a time; the table is the same "
                     f"(default: {_MICRO_BATCH}; for a checkpoint what fits into memory)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("lambda.safetensors"), metavar="FILE",
                        help="the λ table to write; nothing is overwritten (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=distil)


def _size(text: str) -> tuple[int, int]:
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
        if is_first_rank():
            path = table.save(free_path(options.out))  # taken meanwhile: not a reason to lose the work
            print(f"{summary_text(table.rows)}\n\nThe table: {path}")
    return 0


def _found(options: argparse.Namespace, stop_if_asked: Callable[[], None]) -> LambdaTable:
    """The whole table. Ended early, it is left as far as it has come."""
    work: Work | None = None
    try:
        with failing_together(), Reporter(stop_if_asked) as reporter:
            if is_first_rank():
                LambdaTable.check_new(options.out)
            work = _work(options, reporter)
            work.run()
        return work.table()
    except BaseException as error:
        table = work and work.table()
        if table is None or not is_first_rank():
            raise
        out = options.out
        where = f"what was found is in {table.save(free_path(out.with_stem(f'{out.stem}-partial')))}"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(where) from error
        print(where, file=sys.stderr)
        raise


class Reporter:
    """One progress bar, on the first rank; and on all of them the place where Ctrl-C is heeded.

    Attributes:
        later: evaluations that will follow the run in progress.
    """

    def __init__(self, stop_if_asked: Callable[[], None]) -> None:
        self.later = 0
        self._stop_if_asked = stop_if_asked
        self._bar: tqdm | None = None
        self._before = self._done = 0

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, cost: str) -> None:
        """Say what is to come, once no rank has anything against it."""
        meet()
        if is_first_rank():
            print(cost, flush=True)
            self._bar = tqdm(unit=" evaluations", unit_scale=True)

    def next_run(self) -> None:
        """The next run counts its evaluations from 0; the bar goes on."""
        self._before = self._done

    def __call__(self, progress: Progress) -> None:
        """After an evaluation."""
        self._stop_if_asked()
        if self._bar is not None:
            self._done = self._before + progress.done
            self._bar.total = self._before + progress.total + self.later
            self._bar.set_description(progress.stage, refresh=False)
            self._bar.update(self._done - self._bar.n)


def _work(options: argparse.Namespace, reporter: Reporter) -> Work:
    """What the options ask for; as far as can be seen from here they are in order.

    Raises:
        DodeError: they are not; before any evaluation.
    """
    if options.cfg is None:
        options.cfg = _EMBEDDED_CFG if options.checkpoint is None else _CHECKPOINT_CFG
    options.steps = list(dict.fromkeys(options.steps))
    check_settings(options.steps, options.cfg, options.seed)
    if options.latents < 2:
        raise DodeError(
            f"--latents must be at least 2, some to fit and some to check on, not {options.latents}"
        )
    if not 0 <= options.refine_budget < math.inf:
        raise DodeError(f"--refine-budget must be a number of at least 0, not {options.refine_budget}")
    if options.micro_batch is not None and options.micro_batch < 1:
        raise DodeError(f"--micro-batch must be at least 1, not {options.micro_batch}")
    if options.checkpoint is not None:
        return _of_checkpoint(options, reporter)
    if any(value is not None for value in (options.prompt, options.negative, options.size)):
        raise DodeError(
            "--prompt, --negative and --size are for a --checkpoint: the model inside knows digits only"
        )
    return Embedded(options, reporter)


def _of_checkpoint(options: argparse.Namespace, reporter: Reporter) -> Distillation:
    if not options.prompt:
        raise DodeError("a checkpoint needs at least one --prompt, like those that you will use")
    if options.checkpoint.suffix not in (".safetensors", ".sft"):
        raise DodeError(
            f"{options.checkpoint}: not .safetensors, and other kinds can run code when they are read"
        )
    if not options.checkpoint.is_file():
        raise DodeError(f"{options.checkpoint}: there is no such file")
    from .hosts.comfyui import start_comfyui

    start_comfyui()
    from .hosts.comfy.headless import distillation  # now that there is a comfy to import

    return distillation(options, reporter)


class Embedded:
    """The distillation for an embedded model."""

    def __init__(self, options: argparse.Namespace, reporter: Reporter) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        model = load_demo_model(options.model, device=device)
        schedule = options.schedule or STUDENT_SCHEDULE[model.kind]
        self._reporter = reporter
        self._facts = {"name": "embedded digits", "kind": model.kind}
        self._pipeline = Pipeline(
            [latents_group(model, options.cfg, seeds_to_fit(options.seed, options.latents))],
            [make_sigmas(schedule, steps, model.noise_schedule).to(device) for steps in options.steps],
            solver=options.solver,
            predictions=PREDICTIONS if options.prediction == AUTO else [options.prediction],
            teacher=options.teacher,
            scale=options.scale,
            flow=model.kind == "flow",
            refine_budget=options.refine_budget,
            micro_batch=options.micro_batch or _MICRO_BATCH,
            settings={"cfg": options.cfg, "seed": options.seed, "schedule": schedule},
        )

    def run(self) -> None:
        """All of it."""
        self._reporter.begin(str(self._pipeline.cost))
        self._pipeline.run(self._reporter)

    def table(self) -> LambdaTable | None:
        """What has been found so far."""
        found = self._pipeline.found
        return LambdaTable(found, model=self._facts) if found else None
