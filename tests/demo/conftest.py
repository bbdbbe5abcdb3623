"""One small demo for all tests of what a demo finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from dode_nodes import Pipeline, Progress
from dode_nodes.demo import experiment
from dode_nodes.demo.experiment import Demo
from dode_nodes.demo.models import load_demo_model
from dode_nodes.fit import race
from tests.demo.small import make_small
from tests.short_race import shorten_race


@dataclass
class Ran:
    """A demo, and how it came about.

    Attributes:
        told: (stage, done, total) after each evaluation.
        pipelines: all that were run.
    """

    demo: Demo | None = None
    told: list[tuple[str, int, int]] = field(default_factory=list)
    pipelines: list[Pipeline] = field(default_factory=list)


@pytest.fixture(scope="session")
def ran() -> Iterator[Ran]:
    """A small demo at 2 and 3 evaluations."""
    ran = Ran()

    class Noted(Pipeline):
        def run(self, progress):
            ran.pipelines.append(self)
            return super().run(progress)

    def tell(progress: Progress) -> None:
        ran.told.append((progress.stage, progress.done, progress.total))

    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(experiment, "Pipeline", Noted)
        with pytest.MonkeyPatch.context() as meanwhile:
            shorten_race(race, meanwhile)
            ran.demo = experiment.run_demo(load_demo_model("eps"), (3, 2, 3), cfg=1.5, progress=tell)
        yield ran


@pytest.fixture(scope="session")
def demo(ran: Ran) -> Demo:
    """What it found."""
    return ran.demo
