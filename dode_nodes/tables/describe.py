"""λ tables in words, for people, and as JSON, for programs.

A file's report and settings have been checked, but their texts may come from a stranger. They are shown without
control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .choice import asked_steps, cfg_range, part_for_steps, steps_text
from .free_outputs import GAUSSIAN, START
from .gate import is_number
from .provenance import IPNDM, PLAIN, PLAIN_SOLVER, ROW_GIVEN, StockSetting
from .row import LambdaRow, shown_hash
from .table import LambdaTable

_NOTHING = "–"
_ENOUGH = 8
"""Latents for a ratio to be told."""
_OTHER_PICTURES = (
    "it makes other pictures than its teacher of the same noise, so its errors say nothing; use the sampler that this "
    "model was made for"
)
_FREE = {START: "the start", GAUSSIAN: "the Gaussian denoiser"}


def table_text(table: LambdaTable) -> str:
    """The model's facts, then every row in full."""
    model = {name: value for name, value in table.model.items() if name not in ("fingerprint", "patches")}
    facts = [f"table {shown_hash(table.sha256)}"]
    if model:
        facts.append(f"model: {_facts(model)}")
    if samples := table.model.get("fingerprint", {}).get("samples"):
        facts.append(f"fingerprint: {len(samples)} samples of the weights")
    if layout := table.model.get("fingerprint", {}).get("layout"):
        facts.append(f"fingerprint: {printable(shown_hash(layout))}")
    if weights := table.model.get("patches", {}).get("weights"):
        facts.append(f"with LoRAs or patches on {weights} weights")
    return "\n\n".join(["\n".join(facts), *(row_text(row) for row in table.rows)])


def row_text(row: LambdaRow) -> str:
    """One row: how it was found, then its numbers step by step.

    Errors are RMS distances to the teacher after each step, on latents that the weights were not fitted
    on. ± is the standard error of λ.
    """
    lines = [row.label, *(f"  {note}" for note in _notes(row)), ""]
    return printable("\n".join(lines + [f"  {line}" for line in columns(_steps(row))]))


def summary_text(rows: Sequence[LambdaRow]) -> str:
    """One line a row: the held-out error without and with λ, and λ; a triangle of weights has no room."""
    lines: list[Sequence[str]] = [
        ("solver", "output", "evaluations", "stock", "D-ODE", "λ, evaluation by evaluation")
    ]
    for row in rows:
        errors = (None, None) if row.errors is None else (row.errors.stock, row.errors.dode[0])
        solver = f"{row.plain.solver}, refined" if row.is_refined else row.solver
        lambdas = "  ".join(_weights(row, k) for k in range(row.nfe))
        weights = lambdas if row.form == "lambda" else "weights over the history"
        evaluations = str(row.nfe) if row.nfe == row.paid_steps else f"{row.nfe} in {row.paid_steps} steps"
        lines.append((solver, row.prediction, evaluations, *map(number, errors), weights))
    return printable("\n".join(columns(lines, left=(0, 1, 5))))


def table_json(table: LambdaTable) -> dict[str, Any]:
    """A table with its numbers; arrays of a later version, which this one does not know, are left out."""
    rows = [_row_json(row) for row in table.rows]
    return dict(table.unknown) | {"sha256": table.sha256, "model": dict(table.model), "rows": rows}


def _row_json(row: LambdaRow) -> dict[str, Any]:
    numbers = {"sigmas": row.sigmas.tolist(), "weights": row.weights.tolist()}
    return row.to_json() | {"sha256": row.sha256} | numbers


def amount(steps: int, evaluations: int) -> str:
    """What a run takes, of the network: "8 evaluations"; the steps as well where these are another number."""
    words = f"{evaluations} evaluation" if evaluations == 1 else f"{evaluations} evaluations"
    return words if steps == evaluations else f"{steps} step{'s' if steps > 1 else ''} ({words})"


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
    notes = [f"numbers {shown_hash(row.sha256)}"]
    if row.solver_options:
        notes.append(f"solver options: {_facts(row.solver_options)}")
    if row.settings:
        notes.append(f"settings: {_facts(row.settings)}")
    notes += [
        f"with the LoRA {shown_hash(lora.sha256)} {lora.name} at {lora.strength:g}" for lora in row.loras
    ]
    if (trained := row.trained_lora) is not None:
        notes.append(
            f"has a LoRA of its own, {shown_hash(trained.content)} {trained.name} at {trained.strength:g}: error "
            f"{number(trained.error)} with it, {number(trained.error_without)} without, on {trained.latents} latents"
        )
    if (credit := row.credit) is not None:
        told = {"by": credit.author, "licence": credit.licence, "date": credit.date}
        notes += [", ".join(f"{name} {value}" for name, value in told.items() if value)]
        notes += [f"note: {line}" for line in credit.notes.splitlines()]
    notes += _notes_on_error(row)
    notes.append(f"σ: {sigma_list(row)}")
    notes.append(f"error of these σ with {row.solver} and no weights: {number(_error_without_weights(row))}")
    if row.nfe == 1 and not row.is_refined:
        notes.append("with one evaluation there is nothing to fit: this is the plain solver")
    shrunk_to = report.get("shrunk_to", 1)
    if shrunk_to == 0 and row.nfe > 1:
        notes.append("λ made the held-out latents worse, so it was set to 0: this is the stock solver")
    elif shrunk_to not in (0, 1):
        notes.append(
            f"λ made the held-out latents worse, so it was shrunk to {shrunk_to:g} of what was fitted"
        )
    if undetermined := report.get("undetermined"):
        numbers = ", ".join(str(k + 1) for k in undetermined)
        notes.append(f"λ has no effect at evaluation {numbers}, and is 0 there")
    if "refined" in report:
        notes += _notes_on_refinement(row, report["refined"])
    if "evaluations" in report:
        notes.append(f"network evaluations spent: {_facts(report['evaluations'])}")
    return notes


def sigma_list(row: LambdaRow) -> str:
    """The σ as ComfyUI's node ManualSigmas takes them, with all digits that samplers see."""
    return ", ".join(str(np.float32(sigma)).removesuffix(".0") for sigma in row.sigmas)


def _error_without_weights(row: LambdaRow) -> float | None:
    """Known only where the plain solver was measured on the row's own σ."""
    plain = row.plain
    same = plain.solver == row.solver and not row.has_own_sigmas and not row.free.first
    return row.errors.stock if same and row.errors is not None else None


def headline(row: LambdaRow) -> str | None:
    """In everyone's words how near it comes; None where latents of its own do not tell."""
    unseen = row.unseen
    if unseen is None or unseen.latents < _ENOUGH or not unseen.dode.rms or not unseen.stock.rms:
        return None
    what, dode, of_stock = amount(row.paid_steps, row.nfe), unseen.dode.rms, unseen.stock.rms
    if not unseen.corresponds:
        return f"{what}: {_OTHER_PICTURES}"
    rival = f"plain {row.plain.solver}" if row.best_stock is None else _best_of(row.best_stock)
    if row.origin.kind == PLAIN:
        return f"{what}: nothing that was fitted comes nearer than {rival}, so this is that setting"
    near, far = min(dode, of_stock), max(dode, of_stock)
    times = f"{far / near:.2g}"
    if times == "1":
        return f"{what}: as near to the slow sampler's pictures as {rival}"
    how = f"{times} times {'nearer to' if dode <= of_stock else 'farther from'}"
    needs = ""
    if (count := unseen.stock_needs) is not None:
        needs = f", which needs {count if count <= 2 * row.nfe else f'more than {2 * row.nfe}'} for it"
    return f"{what}: {how} the slow sampler's pictures than {rival}{needs}"


def held_text(table: LambdaTable) -> str:
    """What it holds, in one line: numbers of steps, and the guidance that they were made at."""
    scales = [scale for row in table.rows for scale in cfg_range(row) if scale is not None]
    if not scales:
        return steps_text(table.rows)
    ends = dict.fromkeys([min(scales), max(scales)])
    return f"{steps_text(table.rows)}, made at cfg {' to '.join(f'{scale:g}' for scale in ends)}"


def rows_told(table: LambdaTable) -> list[LambdaRow]:
    """Of the rows that are used for each number of steps, fewest first, those that have a headline."""
    used = [part_for_steps(table, steps).row for steps in sorted(set(map(asked_steps, table.rows)))]
    return [row for row in used if headline(row) is not None]


def headlines(table: LambdaTable) -> list[str]:
    """Those of the rows that are used for each number of steps, fewest first."""
    return [line for row in rows_told(table) if (line := headline(row)) is not None]


def _best_of(stock: StockSetting) -> str:
    what = "the best stock setting" if stock.tried is None else f"the best of {stock.tried} stock settings"
    return f"{what} ({setting_text(stock)})"


def setting_text(stock: StockSetting) -> str:
    """As people set it: sampler, scheduler, ending."""
    ending = " without the penultimate σ" if stock.discard_penultimate else ""
    return f"{stock.sampler}, {stock.scheduler}{ending}"


def _notes_on_unseen(row: LambdaRow) -> list[str]:
    if (unseen := row.unseen) is None:
        return []
    figures = "; ".join(
        f"{name} {number(of.rms)} (median {number(of.median)}, most {number(of.low)} to {number(of.high)})"
        for name, of in (("D-ODE", unseen.dode), ("stock", unseen.stock))
    )
    share = f"{round(unseen.nearer * unseen.latents)} of {unseen.latents} latents end nearer"
    told = headline(row)
    others = ""
    if unseen.to_others is not None:
        others = f"; from the teacher's pictures of other noises {number(unseen.to_others)}"
    return [
        *([told] if told else []),
        f"on latents that nothing was fitted or chosen on: {figures}; {share}{others}",
    ]


def _notes_on_error(row: LambdaRow) -> list[str]:
    report, errors, notes = row.report, row.errors, _notes_on_unseen(row)
    if errors is not None:
        stock, dode = errors.stock, errors.dode[0]
        told = row.unseen is None or row.unseen.corresponds
        change = f" ({percent(dode, stock)})" if stock and dode is not None and told else ""
        fitted = report.get("fitted_latents", "?")
        notes.append(f"error at the end: stock {number(stock)}, D-ODE {number(dode)}{change}")
        notes.append(
            f"measured on {errors.latents} held-out latents, against the teacher; fitted on {fitted}"
        )
        later = [(row.steps - i, error) for i, error in enumerate(errors.dode) if i and error is not None]
        if later:
            parts = ", ".join(f"{steps}: {number(error)}" for steps, error in later)
            notes.append(f"error if only the last steps are run: {parts}")
    elif report.get("checked") is False:
        notes.append("not checked: there was only one latent, and λ was fitted on it")
    if (best := row.best_stock) is not None:
        notes.append(
            f"best stock setting: {setting_text(best)}, {number(best.error)} on {best.latents} latents"
        )
    if (own := report.get("teacher_error")) is not None:
        notes.append(f"the teacher's own error: at most about {number(own)}")
    return notes


def _notes_on_refinement(row: LambdaRow, refined: Mapping[str, Any]) -> list[str]:
    """What came of it, and its stages in columns."""
    began, kept = row.plain.solver, refined.get("kept", "")
    outcome = {
        ROW_GIVEN: "refining did not bring it closer to the teacher: this is the row before refining",
        PLAIN_SOLVER: f"refining did no better than the plain {began}: this is the plain solver",
        IPNDM: f"refined from {began}: of all that was tried, the weights of iPNDM-3 are closest to the teacher",
    }
    best = f"refined end to end from {began}: kept the stage closest to the teacher, {kept}"
    ended = (
        ["the refinement was stopped early; this is its best result so far"]
        if refined.get("interrupted")
        else []
    )
    lines = [("stage", "held-out error", "fitted error", "evaluations so far")]
    for stage in refined.get("stages", []):
        errors = (number(stage.get(name)) for name in ("held_out_error", "fitted_error"))
        lines.append((stage["stage"], *errors, str(stage.get("evaluations", _NOTHING))))
    stages = [f"  {line}" for line in columns(lines, left=(0,))] if len(lines) > 1 else []
    return [outcome.get(kept, best), *ended, *stages]


def _steps(row: LambdaRow) -> list[Sequence[str]]:
    """A head, then a line per evaluation; the first of a step has its σ and errors."""
    of_weights = "λ" if row.form == "lambda" else "weights of the outputs, oldest first"
    if row.free.columns:
        of_weights += (
            f"; before them, {' and '.join(_FREE[name] for name in row.free.requires if name in _FREE)}"
        )
    if row.bands > 1:
        of_weights += "; after |, what is added for coarser bands"
    lines: list[Sequence[str]] = [
        ("step", "σ", "next σ", "evaluation", of_weights, "±", "stock error", "D-ODE error")
    ]
    scatter = row.report.get("lambda_standard_error", [])
    after = row.report.get("after_steps", {})
    steps = [(step, stage) for step, count in enumerate(row.evaluations) for stage in range(count)]
    for k, (step, stage) in enumerate(steps):
        sigmas, errors = ("", "", ""), ("", "")
        if stage == 0:
            sigmas = (str(step + 1), f"{row.sigmas[step]:.5g}", f"{row.sigmas[step + 1]:.5g}")
            stock, dode = (number(_at(after.get(name, []), step)) for name in ("stock", "dode"))
            errors = (stock, dode)
        error = _at(scatter, k) if k else None
        plus_minus = _NOTHING if error is None else f"{error:.4f}"
        number_of = str(k + 1 - row.free.first) if k or not row.free.first else "free"
        lines.append((*sigmas, number_of, _weights(row, k), plus_minus, *errors))
    return lines


def _at(values: Sequence[Any], i: int) -> Any:
    return values[i] if i < len(values) else None


def _weights(row: LambdaRow, k: int) -> str:
    """λ of evaluation k, or its row of the triangle. A first λ has no predecessor to act on."""
    if row.form == "lambda" and k == 0:
        return _NOTHING
    if row.form == "lambda":
        return _signed(row.weights[k : k + 1])
    planes = row.weights.reshape(-1, *row.weights.shape[-2:])
    return " | ".join(_signed(plane[k, : row.free.columns + k + 1]) for plane in planes)


def _signed(weights: np.ndarray) -> str:
    return " ".join(f"{weight:+.4f}" if weight else "0" for weight in weights)


def _facts(facts: Mapping[str, Any]) -> str:
    return printable(", ".join(f"{name} {_words(value)}" for name, value in facts.items()))


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ("×" if all(map(is_number, value)) else ", ").join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """Without what could steer a terminal, or turn the direction of writing."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
