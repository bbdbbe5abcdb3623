"""Commands are tried on fits that begin with a short race."""

from __future__ import annotations

from tests.short_race import short_race  # noqa: F401  # a fixture
