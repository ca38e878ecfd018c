"""Stop strings in a stream of text pieces.

A piece may hold the beginning of a stop string; that much is held back until it is clear. Token ids and
models are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Pass text through until one of the strings appears; cut there."""

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self._strings = tuple(strings)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take the next piece and return what is sure to come before any stop string.

        Of several stop strings the one that ends first counts. What comes after it is dropped.
        """
        if self.found is not None:
            return ""
        self._held += text
        ends = [(place + len(s), s) for s in self._strings if (place := self._held.find(s)) >= 0]
        if ends:
            end, self.found = min(ends, key=lambda found: found[0])
            passed, self._held = self._held[: end - (0 if self._include else len(self.found))], ""
            return passed
        keep = self._undecided()
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def flush(self) -> str:
        """Return what was held back, when no more text will come."""
        passed, self._held = self._held, ""
        return passed

    def _undecided(self) -> int:
        """Return how many characters at the end could become a stop string."""
        longest = max((len(s) for s in self._strings), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._strings):
                return size
        return 0
