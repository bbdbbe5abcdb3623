"""Commands are tried on fits that begin with a short race."""

from __future__ import annotations

from tests.hosts.conftest import _short_race  # noqa: F401  # a fixture
