"""A fit begins with a race of stock settings, which is most of a small one's work: here few stand for them."""

from __future__ import annotations

from types import ModuleType

import pytest

from dode_nodes.fit import race


@pytest.fixture(autouse=True)
def short_race(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all tests below a conftest that imports this, but those that are marked `whole_race`."""
    if not request.node.get_closest_marker("whole_race"):
        shorten_race(race, monkeypatch)


def shorten_race(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one solver start, on one schedule, with its first step free or not. Of a race that is short already nothing
    would be left.

    Args:
        module: ``race``; the pack that a host has loaded has one of its own.
    """
    few = {kind: schedules[:1] for kind, schedules in module.SCHEDULES.items()}
    monkeypatch.setattr(module, "SCHEDULES", few)
    monkeypatch.setattr(module, "SOLVERS", module.SOLVERS[1:2])
    monkeypatch.setattr(module, "ALSO_STOCK", ())
    assert module.SOLVERS
