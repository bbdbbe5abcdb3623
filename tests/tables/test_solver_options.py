"""What a row may hand its sampler: only numbers, and only what that sampler is known to take."""

from __future__ import annotations

import pytest

from dode_nodes.errors import DodeError
from dode_nodes.tables.solver_options import checked_options


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("euler", {}),
        ("ipndm", {"max_order": 3}),
        ("seeds_3", {"eta": 0, "r_1": 0.3, "r_2": 1000}),
        ("<mine>", {"by": -1000.0, "λ": 0}),
        ("of another pack", {}),
    ],
)
def test_what_is_known_is_copied(solver, options):
    given = dict(options)
    copy = checked_options(solver, given, "it")
    given["later"] = 1
    assert copy == options
    with pytest.raises(TypeError):
        copy["later"] = 1


@pytest.mark.parametrize(
    ("solver", "options", "why"),
    [
        ("euler", {"max_order": 3}, "it: 'euler' is not known to take the option \"max_order\""),
        ("of another pack", {"eta": 0}, "is not known to take the option \"eta\""),
        ("ipndm", {"max_order": "3"}, 'it: max_order must be a number from -1000 to 1000, not "3"'),
        ("ipndm", {"max_order": True}, "must be a number"),
        ("ipndm", {"max_order": None}, "must be a number"),
        ("ipndm", {"max_order": [3]}, "must be a number"),
        ("ipndm", {"max_order": 1000.5}, "must be a number"),
        ("ipndm", {"max_order": 10**400}, "must be a number"),
        ("<mine>", {"noise_sampler": {}}, "must be a number"),
        ("<mine>", {"two words": 1}, "is not known to take"),
        ("<mine>", {"\u202e": 1}, r"option \"\\u202e\""),
        ("ipndm", [("max_order", 3)], "it must be an object"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name(solver, options, why):
    with pytest.raises(DodeError, match=why):
        checked_options(solver, options, "it")
