"""The command line: ``python -m dode_nodes`` with one of the commands below."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..demo.catalogue import NAMES
from ..errors import DodeError, TableError
from ..fit.ranks import RankFailed, is_first_rank
from ..tables.describe import summary_text, table_json, table_text
from ..tables.figures import matplotlib_figure
from ..tables.table import LambdaTable
from . import make_table, presets, train_lora
from .bar import Bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 1 where ``validate`` found a bad file; 2 for an error; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    options.command = shlex.join(["python", "-m", "dode_nodes", *arguments])
    try:
        with _termination_interrupts():
            status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DodeError, RankFailed) as error:
        _complain(f"error: {error}")
        return 2
    except OSError as error:
        _complain(f"error: {_in_words(error)}")
        return 2
    except KeyboardInterrupt as interrupt:
        _complain(f"interrupted: {str(interrupt) or 'nothing was written'}")
        return 130
    return status


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, so that it cleans up. Only a main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_words(error: OSError) -> str:
    """The file, where there is one, and the reason, without its number."""
    return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)


def _complain(text: str) -> None:
    """On standard error; of several ranks, which fail together, one does."""
    if is_first_rank():
        print(text, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dode_nodes",
        description="D-ODE solvers: few-step samplers, distilled from many-step ones.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="distil solvers for a demo model, and compare them with stock solvers",
        description="Distils λ for a small demo model, samples with it, and compares the D-ODE solvers with the "
        "stock ones at equal network evaluations. Takes about five minutes on a CPU core. Writes a λ "
        "table, pictures and demo.json. Nothing is overwritten: if the folder has results already, the command "
        "stops before any work.",
    )
    demo.add_argument("--out", type=Path, default=Path("dode-demo"), metavar="DIR",
                      help="folder for the results (default: %(default)s)")  # fmt: skip
    demo.add_argument("--model", choices=NAMES, default=NAMES[0],
                      help="pictures draws landscapes that a few words ask for, and is a rectified flow, like SD3 and "
                      "FLUX; the others draw digits: eps predicts noise, like Stable Diffusion; flow is a rectified "
                      "flow (default: %(default)s)")  # fmt: skip
    demo.add_argument("--steps", type=int, nargs="+", metavar="N",
                      help="network evaluations per picture (default: 4; 5 8 10 for digits)")  # fmt: skip
    demo.add_argument("--cfg", type=float,
                      help="classifier-free guidance scale (default: 3; 2 for digits)")  # fmt: skip
    demo.add_argument("--seed", type=int, default=0, help="seed of the initial noise (default: %(default)s)")
    demo.set_defaults(run=_demo)

    distill = commands.add_parser(
        "distill",
        help="distil a λ table for a model or a checkpoint",
        description="Runs a many-step teacher once and fits few-step solvers to it: first λ, then, within "
        "--refine-budget, all numbers of the solver together. Says what it may cost before it starts. If you "
        "interrupt it, it saves the rows found so far as FILE-partial. For several GPUs or processes: torchrun "
        "--nproc-per-node 2 -m dode_nodes distill …",
    )
    make_table.add_options(distill)

    lora = commands.add_parser(
        "distill-lora",
        help="train a LoRA for 1 to 5 steps of a demo model or a checkpoint",
        description="Distils rows for a few steps, unless a table is given, and trains one LoRA that brings the end of "
        "their runs nearer to a many-step teacher. Says what it may cost before it starts. If you interrupt it, it "
        "saves the best so far as FILE-partial. For several GPUs or processes: torchrun --nproc-per-node 2 -m dode_nodes "
        "distill-lora …",
    )
    train_lora.add_options(lora)

    show = commands.add_parser("show", help="print a λ table")
    show.add_argument("file", type=Path, metavar="FILE", help="a λ table, .safetensors")
    show.add_argument("--json", action="store_true", help="print JSON, for programs")
    show.set_defaults(run=_show)

    validate = commands.add_parser("validate", help="check λ tables; the exit status is 1 if one is bad")
    validate.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a λ table, .safetensors")
    validate.set_defaults(run=_validate)

    index = commands.add_parser(
        "index",
        help="check the tables of a folder and write its page",
        description="Checks every file of a folder. Those in community/ must also have author, licence, model "
        "and held-out errors. If all are good, it writes README.md, a page with a line for each row.",
    )
    presets.add_index_options(index)

    take = commands.add_parser(
        "import",
        help="copy shared λ tables into the lambdas folder",
        description="Checks files and codes that somebody shared, and saves each as a new file under a safe name.",
    )
    presets.add_import_options(take)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from ..demo.catalogue import load_model
    from ..demo.experiment import run_demo, settings_of
    from ..demo.results import comparison_text, results_folder, write_results

    model = load_model(options.model)
    settings_of(model, options.steps, options.cfg, options.seed)
    matplotlib_figure()  # raises now, not after a minute's work, where it is missing
    begun = time.monotonic()
    with results_folder(options.out) as folder:
        with Bar() as bar:
            bar.begin()
            demo = run_demo(model, options.steps, cfg=options.cfg, seed=options.seed, progress=bar)
        seconds = time.monotonic() - begun
        write_results(demo, folder, command=options.command, seconds=seconds)
    print(summary_text(demo.table.rows), comparison_text(demo), sep="\n\n")
    print(f"\n{seconds:.0f} s. Pictures and numbers: {options.out}")
    return 0


def _show(options: argparse.Namespace) -> int:
    table = LambdaTable.load(options.file)
    if options.json:
        print(json.dumps(table_json(table), indent=1, allow_nan=False))
    else:
        print(table_text(table))
    return 0


def _validate(options: argparse.Namespace) -> int:
    bad = 0
    for file in options.files:
        try:
            rows = len(LambdaTable.load(file).rows)
            print(f"{file}: OK, {rows} row{'s' if rows > 1 else ''}")
        except TableError as error:
            print(error)
            bad += 1
    return 1 if bad else 0
