"""Lines and messages from a person: editing and history by readline, several lines between triple quotes.

The history is a text file, one line for each line entered, that only its owner can read:
`$PUNA_HOME/history`, by default `~/.puna/history`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

try:
    import readline
except ModuleNotFoundError:  # Windows: input() has its own editing there
    readline = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

PROMPT, MORE = ">>> ", "... "
_QUOTES = '"""'
_KEPT = 1000  # lines of history that are read back


def puna_home() -> Path:
    """Return the folder for what belongs to the user: $PUNA_HOME, or ~/.puna."""
    return Path(os.environ.get("PUNA_HOME") or "~/.puna").expanduser()


class LineInput:
    """Read single lines with `input`; remember them in a file until told not to."""

    def __init__(self, file: Path | None = None) -> None:
        self._remembers = True
        self._file = file or puna_home() / "history"
        self._restore()

    def __call__(self, prompt: str) -> str:
        """Read one line; raises EOFError and KeyboardInterrupt as `input` does."""
        if readline is not None:
            readline.set_auto_history(self._remembers)
        line = input(prompt)
        if self._remembers and line.strip():
            try:
                self._append(line)
            except OSError as error:
                self._remembers = False
                logger.warning("history is not kept: %s", error)
        return line

    def set_history(self, remembers: bool) -> None:
        """Say whether lines are remembered, in this session and in the file."""
        self._remembers = remembers

    def _restore(self) -> None:
        if readline is None or not self._file.is_file():
            return
        try:
            lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            logger.warning("history cannot be read: %s", error)
            return
        for line in lines[-_KEPT:]:
            readline.add_history(line)

    def _append(self, text: str) -> None:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with open(descriptor, "a", encoding="utf-8", errors="replace") as file:
            file.write(text + "\n")


def read_message(read: Callable[[str], str]) -> str:
    """Read a message: one line, or all up to a line that ends with triple quotes if one begins with them.

    The quotes are left out, also those after `/set system`, whose message may have several lines too.
    """
    line = read(PROMPT)
    command, opening, text = line.partition(_QUOTES)
    if not opening or command.split() not in ([], ["/set", "system"]):
        return line
    lines = [text]
    while not lines[-1].endswith(_QUOTES):
        lines.append(read(MORE))
    text = command + "\n".join(lines).removesuffix(_QUOTES)
    return text if command.strip() else " " * text.startswith("/") + text  # a quoted "/" is no command
