"""Numbers of steps as people write them."""

from __future__ import annotations

import re

from ..errors import DodeError


def parse_steps(text: str) -> list[int]:
    """ "5, 6, 8" or "2-12" as numbers, without repetition.

    Raises:
        DodeError: it holds something else.
    """
    parts = [part.split("-") for part in re.split(r"[,;\s]+", text.strip()) if part]
    in_order = all(
        1 <= len(part) <= 2
        and all(number.isdecimal() and 1 <= int(number) <= 1000 for number in part)
        and int(part[0]) <= int(part[-1])
        for part in parts
    )
    if not parts or not in_order:
        raise DodeError(f"steps must be numbers such as '5, 6, 8, 10' or '2-12', not '{text}'")
    return list(dict.fromkeys(number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)))
