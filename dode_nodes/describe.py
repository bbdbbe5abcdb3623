"""λ tables in words, for people, and as JSON, for programs.

A file's report and settings are anybody's words: what is missing is left out, what is odd is shown as it
is, without control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .reading import GIVEN, IPNDM, PLAIN, Refinement, at, is_number, item, refinement_of
from .table import LambdaRow, LambdaTable

_NOTHING = "–"


def table_text(table: LambdaTable) -> str:
    """The model's facts, then every row in full."""
    facts = [f"model: {_facts(table.model)}"] if table.model else []
    return "\n\n".join([*facts, *(row_text(row) for row in table.rows)])


def row_text(row: LambdaRow) -> str:
    """One row: how it was found, then its numbers step by step.

    Errors are RMS distances to the teacher after each step, on latents that the weights were not fitted
    on. ± is the standard error of λ, where it is as fitted.
    """
    lines = [row.label, *(f"  {note}" for note in _notes(row)), ""]
    return _printable("\n".join(lines + [f"  {line}" for line in columns(_steps(row))]))


def summary_text(rows: Sequence[LambdaRow]) -> str:
    """One line a row: the held-out error without and with λ, and λ; a triangle of weights has no room."""
    lines = [("solver", "output", "evaluations", "stock", "D-ODE", "λ, evaluation by evaluation")]
    for row in rows:
        errors = [number(at(row.report, "error", name)) for name in ("stock_end", "dode_end")]
        solver = f"{row.plain.solver}, refined" if row.is_refined else row.solver
        lambdas = "  ".join(_weights(row, k) for k in range(row.nfe))
        weights = lambdas if row.form == "lambda" else "weights over the history"
        lines.append((solver, row.prediction, str(row.nfe), *errors, weights))
    return _printable("\n".join(columns(lines, left=(0, 1, 5))))


def table_json(table: LambdaTable) -> dict[str, Any]:
    """A table with its numbers; arrays of another version, which this one does not know, are left out."""
    return dict(table.unknown) | {"model": dict(table.model), "rows": [_row_json(row) for row in table.rows]}


def _row_json(row: LambdaRow) -> dict[str, Any]:
    numbers = {"sigmas": row.sigmas, "weights": row.weights, "told_sigmas": row.told_sigmas}
    return row.to_json() | {name: value.tolist() for name, value in numbers.items() if value is not None}


def number(value: Any) -> str:
    """An error to three significant digits; a dash where there is none."""
    return f"{value:#.3g}" if is_number(value) else _NOTHING


def percent(value: float, reference: float) -> str:
    """The change from ``reference``, as −43 %, +12 % or ±0 %."""
    change = 100 * (value / reference - 1)
    return f"{change:+.0f} %".replace("-", "−") if abs(change) >= 0.5 else "±0 %"


def columns(lines: Iterable[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    """Cells in columns, aligned right but for the columns numbered in ``left``."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _notes(row: LambdaRow) -> list[str]:
    """How the row was found, and how good it is."""
    report = row.report
    notes = []
    if row.solver_options:
        notes.append(f"solver options: {_facts(row.solver_options)}")
    if row.settings:
        notes.append(f"settings: {_facts(row.settings)}")
    notes += _notes_on_error(report)
    shrunk_to = report.get("shrunk_to")
    if shrunk_to == 0:
        notes.append("λ did harm on the held-out latents and was set to 0: this is the stock solver")
    elif is_number(shrunk_to) and shrunk_to != 1:
        notes.append(f"λ did harm on the held-out latents and was shrunk to {shrunk_to:g} of what was fitted")
    undetermined = report.get("undetermined")
    if undetermined and isinstance(undetermined, list) and all(map(is_number, undetermined)):
        numbers = ", ".join(str(k + 1) for k in undetermined)
        notes.append(f"λ moves nothing, and is 0, at evaluation {numbers}")
    if (refinement := refinement_of(report)) is not None:
        notes += _notes_on_refinement(row, refinement)
    if isinstance(report.get("evaluations"), dict):
        notes.append(f"network evaluations spent: {_facts(report['evaluations'])}")
    return notes


def _notes_on_error(report: Mapping[str, Any]) -> list[str]:
    stock, dode = (at(report, "error", name) for name in ("stock_end", "dode_end"))
    notes = []
    if is_number(stock) and is_number(dode):
        change = f" ({percent(dode, stock)})" if stock else ""
        held, fitted = (_words(report.get(name, "?")) for name in ("held_out_latents", "fitted_latents"))
        notes.append(f"error at the end: stock {number(stock)}, D-ODE {number(dode)}{change}")
        notes.append(f"measured on {held} held-out latents, against the teacher; fitted on {fitted}")
    elif report.get("checked") is False:
        notes.append("not checked: there was one latent only, and λ was fitted on it")
    if is_number(own := report.get("teacher_error")):
        notes.append(f"the teacher's own error: at most about {number(own)}")
    return notes


def _notes_on_refinement(row: LambdaRow, refinement: Refinement) -> list[str]:
    """What came of it, and its stages in columns."""
    began = row.plain.solver
    outcome = {
        GIVEN: "refining brought it no nearer to the teacher: this is the row as it was",
        PLAIN: f"refining did no better than the plain {began}: this is the plain solver",
        IPNDM: f"refined from {began}: of what was tried, the weights of iPNDM-3 are nearest to the teacher",
    }
    refined = f"refined end to end from {began}: kept what was nearest to the teacher, {refinement.kept}"
    ended = ["the refinement was ended early; this is the best of it"] if refinement.interrupted else []
    lines = [("stage", "held-out error", "fitted error", "evaluations so far")]
    for name, fitted, held_out, evaluations in refinement.stages:
        spent = _NOTHING if evaluations is None else f"{evaluations:.0f}"
        lines.append((name, number(held_out), number(fitted), spent))
    stages = [f"  {line}" for line in columns(lines, left=(0,))] if refinement.stages else []
    return [outcome.get(refinement.kept, refined), *ended, *stages]


def _steps(row: LambdaRow) -> list[tuple[str, ...]]:
    """A head, then a line per evaluation; the first of a step has its σ and errors."""
    of_weights = "λ" if row.form == "lambda" else "weights of the outputs, oldest first"
    if row.channels is not None:
        of_weights += f" (mean of {row.channels} channels)"
    told = row.told_sigmas
    as_fitted = row.report.get("shrunk_to", 1) == 1
    head = ("step", "σ", "next σ", "evaluation", "σ told", of_weights, "±", "stock error", "D-ODE error")
    lines = [head]
    steps = [(step, stage) for step, count in enumerate(row.evaluations) for stage in range(count)]
    for k, (step, stage) in enumerate(steps):
        sigmas, errors = ("", "", ""), ("", "")
        if stage == 0:
            sigmas = (str(step + 1), f"{row.sigmas[step]:.5g}", f"{row.sigmas[step + 1]:.5g}")
            errors = tuple(number(item(at(row.report, "error", name), step)) for name in ("stock", "dode"))
        scatter = item(row.report.get("lambda_standard_error"), k) if as_fitted else None
        lines.append(
            (
                *sigmas,
                str(k + 1),
                "" if told is None else f"{told[k]:.5g}",
                _weights(row, k),
                f"{scatter:.4f}" if k and is_number(scatter) else _NOTHING,
                *errors,
            )
        )
    return lines if told is not None else [(*line[:4], *line[5:]) for line in lines]


def _weights(row: LambdaRow, k: int) -> str:
    """λ of evaluation k, or its row of the triangle. A first λ has no predecessor to act on."""
    if row.form == "lambda" and k == 0:
        return _NOTHING
    weights = row.weights[k] if row.form == "lambda" else row.weights[k, : k + 1]
    if row.channels is not None:
        weights = weights.mean(axis=-1)
    return " ".join(f"{weight:+.4f}" if weight else "0" for weight in np.atleast_1d(weights))


def _facts(facts: Mapping[str, Any]) -> str:
    return _printable(", ".join(f"{name} {_words(value)}" for name, value in facts.items()))


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ("×" if all(map(is_number, value)) else ", ").join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _printable(text: str) -> str:
    """Without what could steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
