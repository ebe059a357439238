"""The command line: `qpalette --help`. One file per command; nothing heavy is imported before a command runs."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on `arguments` (by default the process's own) and exit with its status.

    0: done; 1: an error, told in one line; 2: wrong usage; 130: interrupted.
    """
    from qpalette.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a code page may lack what a model writes: that is no reason to stop
            stream.reconfigure(errors="replace")
    app(None if arguments is None else list(arguments), prog_name="qpalette")
