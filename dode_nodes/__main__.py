"""``python -m dode_nodes``."""

import io
import sys

from .cli.commands import main

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console whose encoding lacks λ
    sys.exit(main())
