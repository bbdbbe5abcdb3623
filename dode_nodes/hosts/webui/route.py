"""Distilling over HTTP: POST /dode/v1/distil, behind the host's own password."""

from __future__ import annotations

from dataclasses import MISSING, fields
from secrets import compare_digest
from typing import Any, get_type_hints

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import shared
from pydantic import create_model

from ...errors import DodeError
from .request import Request

PATH = "/dode/v1/distil"


_types = get_type_hints(Request)
_Fields: Any = create_model(
    "Fields",
    **{
        each.name: (_types[each.name], ... if each.default is MISSING else each.default)
        for each in fields(Request)
    },
)


class Body(_Fields):
    """A request, as JSON."""


def add(demo: Any, app: FastAPI) -> None:
    """As soon as the host's server is there, if it offers an API."""
    options = shared.cmd_opts
    if options.api or options.nowebui:
        checks = [Depends(_check_password)] if options.api_auth else []
        app.add_api_route(PATH, _distil, methods=["POST"], dependencies=checks)


def _check_password(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008  # FastAPI's way
    """As the host checks its own routes."""
    known = (pair.partition(":") for pair in shared.cmd_opts.api_auth.split(","))
    if not any(_same(given.username, user) & _same(given.password, word) for user, _, word in known):
        raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})


def _same(a: str, b: str) -> bool:
    return compare_digest(a.encode(), b.encode())


def _distil(body: Body) -> dict[str, Any]:
    """Until it has ended. What was found before an interruption is a table, too."""
    from .job import Job

    try:
        job = Job(Request(**body.dict()))
        job.run()
    except DodeError as error:
        raise HTTPException(400, str(error)) from error
    if job.table is None:
        raise HTTPException(400, job.failed or "nothing was found")
    return {
        "table": job.path and job.path.stem,
        "rows": [row.label for row in job.table.rows],
        "lines": job.lines,
        "ended_early": job.failed,
    }
