"""Names of tables: one rule for every system, so that a table's name means the same file wherever it goes."""

from __future__ import annotations

import re

from ..errors import TableError

SUFFIX = ".safetensors"

_MOST_BYTES = 200  # of a part: file systems allow 255, an ending and numbers follow
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\x7f]')
_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)


def parts_of(name: str) -> tuple[str, ...]:
    """A table's name as the user gave it, as folders and a file name without ending.

    ``/`` and ``\\`` both separate folders. Nothing leads out of the folder that the parts are put in, on any system.

    Raises:
        TableError: it is no name; says why.
    """
    if not name.strip().removesuffix(SUFFIX):
        raise TableError("give the table a name: letters, digits, - and _, and / between folders")
    parts = tuple(name.strip().removesuffix(SUFFIX).replace("\\", "/").split("/"))
    for part in parts:
        if problem := _problem(part):
            raise TableError(
                f"give the table another name than '{name}': {problem}. "
                "Use letters, digits, - and _, and / between folders"
            )
    return parts


def _problem(part: str) -> str:
    if not part:
        return "it begins or ends with /, or has // in it"
    if part in (".", ".."):
        return f"'{part}' is not the name of a folder"
    if _FORBIDDEN.search(part):
        return 'it has one of the characters < > : " | ? *'
    if part != part.strip() or part.endswith("."):
        return "a part of it begins or ends with a space, or ends with a dot"
    if _DEVICE.fullmatch(part):
        return f"'{part}' is the name of a device on Windows"
    if len(part.encode(errors="surrogatepass")) > _MOST_BYTES:
        return f"a part of it is longer than {_MOST_BYTES} bytes"
    return ""
