"""Converts files of earlier versions to the present one. Only here is a report used to tell what a row is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .gate import is_number
from .provenance import DISTILLED, PLAIN, PLAIN_SOLVER, REFINED, ROW_GIVEN


def to_current(facts: dict[str, Any], version: int) -> dict[str, Any]:
    """A row's facts, from any version's JSON."""
    return _from_1(facts) if version == 1 else facts


def _from_1(facts: dict[str, Any]) -> dict[str, Any]:
    """Version 1 kept what a refinement began with, and what was measured, in the report."""
    report = facts.get("report", {})
    if not isinstance(report, dict):
        return facts  # it will be refused
    report = dict(report)
    error = report.pop("error", None)
    facts = facts | {"origin": _origin(_at(report, "refined")), "report": report}
    if _at(error, "dode") or _at(error, "stock"):
        report["after_steps"] = {name: _at(error, name) or [] for name in ("stock", "dode")}
    if "refined" in report and isinstance(report["refined"], dict):
        report["refined"] = {name: value for name, value in report["refined"].items() if name != "from"}
    shrunk_to, scatter = report.get("shrunk_to", 1), report.get("lambda_standard_error")
    if is_number(shrunk_to) and isinstance(scatter, list):
        report["lambda_standard_error"] = [s * shrunk_to if is_number(s) else s for s in scatter]
    if (errors := _errors(facts, report, error)) is not None:
        facts["errors"] = errors
    return facts


def _origin(refined: Any) -> dict[str, Any]:
    kept = _at(refined, "kept")
    if kept in (None, ROW_GIVEN):
        return {"kind": DISTILLED}
    began = _at(refined, "from")
    if kept == PLAIN_SOLVER or not isinstance(began, Mapping):
        return {"kind": PLAIN if kept == PLAIN_SOLVER else REFINED}
    return dict(began) | {"kind": REFINED}


def _errors(facts: Mapping[str, Any], report: Mapping[str, Any], error: Any) -> dict[str, Any] | None:
    """Of the whole row; version 1 knew none of its parts."""
    end, latents = _at(error, "dode_end"), report.get("held_out_latents")
    evaluations = facts.get("evaluations")
    if end is None or not latents or not isinstance(evaluations, list):
        return None
    return {
        "latents": latents,
        "dode": [end, *[None] * (len(evaluations) - 1)],
        "stock": _at(error, "stock_end"),
    }


def _at(facts: Any, name: str) -> Any:
    return facts.get(name) if isinstance(facts, Mapping) else None
