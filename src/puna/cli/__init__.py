"""The command line: `puna run`, `puna show`, `puna train`.

One module per group of verbs, which parse and print; the work is done below. Importing this package imports
neither torch nor rich: `puna --help` has to answer at once, so commands import what they run when they run.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from puna.cli.app import app
from puna.errors import PunaError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    logging.basicConfig(format="Warning: %(message)s")
    # Read when torch is imported. By default threads wait for each other by spinning for milliseconds, which
    # makes everything many times slower where other processes use the cores too.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        return _run(arguments)
    except BrokenPipeError:
        _drop_output()  # whoever read it is gone
        return 1
    except OSError as error:
        print(f"Error: {error.filename or 'the output'}: {error.strerror or error}", file=sys.stderr)
        _drop_output()
        return 1


def _drop_output() -> None:
    """Let what is not written yet go nowhere; else Python complains when it flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str] | None) -> int:
    try:
        app(args=arguments, prog_name="puna")
    except PunaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except SystemExit as ended:
        sys.stdout.flush()
        return ended.code if isinstance(ended.code, int) else 0
    return 0
