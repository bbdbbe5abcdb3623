"""A demo that takes seconds: few stock samplers, a short teacher and reference, and as many fresh latents as digits."""

from __future__ import annotations

import functools

import pytest

from dode_nodes import Teacher
from dode_nodes.demo import experiment

FRESH = 10


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Let ``experiment.run_demo`` do less."""
    patch.setattr(experiment, "STOCK_SOLVERS", experiment.STUDENTS)
    patch.setattr(experiment, "STOCK_SCHEDULES", {"eps": ("karras",), "flow": ("simple",)})
    patch.setattr(experiment, "TEACHER", Teacher("dpmpp_2m", scale=5))
    patch.setattr(experiment, "REFERENCE_STEPS", 12)
    patch.setattr(experiment, "REFERENCE_SCALE", 1)
    patch.setattr(
        experiment, "run_demo", functools.partial(experiment.run_demo, latents=4, fresh_latents=FRESH)
    )
