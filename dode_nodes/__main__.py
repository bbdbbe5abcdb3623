"""The command line: ``python -m dode_nodes demo``, ``distill``, ``show`` and ``validate``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from . import headless
from .describe import summary_text, table_json, table_text
from .errors import DodeError, TableError
from .plots import matplotlib_figure
from .ranks import RankFailed, is_first_rank
from .table import LambdaTable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 1 where ``validate`` found a bad file; 2 for an error; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    options.command = shlex.join(["python", "-m", "dode_nodes", *arguments])
    try:
        status = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DodeError, OSError, RankFailed) as error:
        _complain(f"error: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        _complain(f"interrupted: {str(interrupt) or 'nothing was written'}")
        return 130
    return status


def _complain(text: str) -> None:
    """On standard error; of several ranks, which fail together, one does."""
    if is_first_rank():
        print(text, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dode_nodes",
        description="D-ODE solvers: few-step samplers distilled from many-step ones.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="distil solvers for the small model inside this package, and compare",
        description="Distils λ for the small digit model inside this package, samples with it, and sets the "
        "D-ODE solvers beside the stock ones at equal network evaluations. Takes about two minutes on two CPU "
        "cores. Writes a λ table, pictures and demo.json, and overwrites nothing: a folder that has results "
        "already is refused before any work.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--out", type=Path, default=Path("dode-demo"), metavar="DIR", help="folder for the results"
    )
    demo.add_argument("--model", choices=("eps", "flow"), default="eps",
                      help="eps: predicts noise, as Stable Diffusion; flow: rectified flow, as SD3 and FLUX")  # fmt: skip
    demo.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10], metavar="N",
                      help="network evaluations per picture")  # fmt: skip
    demo.add_argument("--cfg", type=float, default=2.0, help="scale of classifier-free guidance")
    demo.add_argument("--seed", type=int, default=0, help="of the initial noise")
    demo.set_defaults(run=_demo)

    distill = commands.add_parser(
        "distill",
        help="distil a λ table for a model or a checkpoint",
        description="Runs a many-step teacher once and fits few-step solvers to it: λ first, then, within "
        "--refine-budget, all numbers of the solver end to end. Says before it starts what it may cost. Interrupted, "
        "it saves what was found as FILE-partial. For several GPUs or processes: torchrun --nproc-per-node 2 -m "
        "dode_nodes distill …",
    )
    headless.add_options(distill)

    show = commands.add_parser("show", help="print a λ table")
    show.add_argument("file", type=Path, metavar="FILE", help="a λ table, .safetensors")
    show.add_argument("--json", action="store_true", help="for programs")
    show.set_defaults(run=_show)

    validate = commands.add_parser("validate", help="check λ tables; exits with 1 if one is bad")
    validate.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a λ table, .safetensors")
    validate.set_defaults(run=_validate)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from .demo.demo import run_demo
    from .demo.models import load_demo_model
    from .demo.results import comparison_text, results_folder, write_results

    matplotlib_figure()  # raises now, not after a minute's work, where it is missing
    begun = time.monotonic()
    with results_folder(options.out) as folder:
        with closing(_Bars()) as bars:
            demo = run_demo(
                load_demo_model(options.model),
                options.steps,
                cfg=options.cfg,
                seed=options.seed,
                tell=bars.tell,
            )
        seconds = time.monotonic() - begun
        write_results(demo, folder, command=options.command, seconds=seconds)
    print(summary_text(demo.table.rows), comparison_text(demo), sep="\n\n")
    print(f"\n{seconds:.0f} s. Pictures and numbers: {options.out}")
    return 0


class _Bars:
    """A progress bar per stage."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def tell(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.close()
            self._bar = tqdm(desc=f"{stage:18}", total=total, unit=" evaluations", unit_scale=True)
            self._stage = stage
        self._bar.total = total  # it grows where λ has to be shrunk
        self._bar.update(done - self._bar.n)


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


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console whose encoding lacks λ
    sys.exit(main())
