"""Tiny pipelines, made once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("diffusers") else ["test_*.py"]


@pytest.fixture(scope="session")
def _made() -> Callable[[str], Any]:
    from tests.hosts.diffusers import tiny_pipelines

    return cache(lambda name: tiny_pipelines.PIPELINES[name]())


@pytest.fixture
def pipeline(_made: Callable[[str], Any]) -> Callable[[str], Any]:
    """``pipeline("sd")`` -> one of ``tiny_pipelines.PIPELINES``; what is set on it is gone after the test."""
    return lambda name: copy.copy(_made(name))
