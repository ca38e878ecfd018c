"""Where the command line writes: answers to one stream, notices to another, lines wrapped while they come.

A word is held back until it is known whether it fits on the line, so nothing printed is ever taken back.
"""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

_MARGIN = 5  # columns kept free on the right, as in Ollama
_NARROWEST = 10 + _MARGIN
_CLEAR_LINE = "\x1b[K"


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """Hold the two streams; `columns` gives the width where output is a terminal, and None elsewhere."""

    out: TextIO
    err: TextIO
    columns: Callable[[], int | None]

    @classmethod
    def standard(cls) -> Terminal:
        """Return the one that the process was started with."""
        out = sys.stdout
        return cls(
            out=out,
            err=sys.stderr,
            columns=lambda: shutil.get_terminal_size().columns if out.isatty() else None,
        )

    def write(self, text: str) -> None:
        """Print at once, without a newline."""
        self.out.write(text)
        self.out.flush()

    def notice(self, text: str) -> None:
        """Print a line that is no part of an answer."""
        self.err.write(text + "\n")
        self.err.flush()

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show a person what is taken time by, and take it away afterwards."""
        if not self.err.isatty():
            yield
            return
        self.err.write(f"{text} ...\r")  # so that a warning meanwhile is written over it
        self.err.flush()
        try:
            yield
        finally:
            self.err.write(_CLEAR_LINE)
            self.err.flush()

    def stream(self, pieces: Iterable[str], *, wordwrap: bool) -> None:
        """Print pieces as they come; a terminal gets a newline at the end, also when they are cut off."""
        columns = self.columns()
        wraps = wordwrap and columns is not None and columns >= _NARROWEST
        wrap = WordWrap(columns - _MARGIN if wraps and columns else None)
        last = ""
        try:
            for piece in pieces:
                if text := wrap.push(piece):
                    self.write(text)
                    last = text
        finally:
            rest = wrap.flush()
            self.write(rest)
            last = rest or last
            if columns is not None and not last.endswith("\n"):
                self.write("\n")


class WordWrap:
    """Break the lines of a stream between words; with `width` None everything passes as it is."""

    def __init__(self, width: int | None) -> None:
        self._width = width
        self._column = 0
        self._space = ""  # before the word; dropped where a line breaks
        self._word = ""
        self._is_long = False  # in a word longer than a line: it is printed as it comes

    def push(self, text: str) -> str:
        """Take a piece; return what can be printed."""
        return text if self._width is None else "".join(map(self._take, text))

    def flush(self) -> str:
        """Return what was held back."""
        rest = self._place_word() + self._space
        self._space = ""
        return rest

    def _take(self, char: str) -> str:
        if char == "\n":
            line = self.flush() + char
            self._column, self._is_long = 0, False
            return line
        if char in " \t":
            placed = self._place_word()
            self._space += char
            self._is_long = False
            return placed
        if self._is_long:
            return char
        if _char_width(char) == 2:  # a line may break before and after an ideograph
            placed = self._place_word()
            self._word = char
            return placed + self._place_word()
        self._word += char
        if _width(self._word) < (self._width or 0):
            return ""
        self._is_long = True
        return self._place_word()

    def _place_word(self) -> str:
        """Return the word behind its space, or on a new line where it does not fit on this one."""
        if not self._word:
            return ""
        size, limit = _width(self._word), self._width or 0
        needed = _width(self._space) + size
        if self._column and self._column + needed > limit:
            text, self._column = "\n" + self._word, size
        else:
            text, self._column = self._space + self._word, self._column + needed
        self._space = self._word = ""
        return text


def _width(text: str) -> int:
    return sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.category(char) in ("Cf", "Me", "Mn"):  # joiners and accents
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
