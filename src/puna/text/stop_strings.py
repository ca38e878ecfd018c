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
        self._passed_over = 0  # characters of `_held` in which no stop string may end any more
        self.found: str | None = None

    def push(self, text: str, *, counts: bool = True) -> str:
        """Take the next piece and return what is sure to come before any stop string.

        Of several stop strings the one that ends first counts. What comes after it is dropped. A string that
        ends in a piece which does not count is none; one that only begins there is (vLLM's rule).
        """
        if self.found is not None:
            return ""
        self._held += text
        if counts:
            ends = [(end, s) for s in self._strings if (end := self._end_of(s)) > 0]
            if ends:
                end, self.found = min(ends, key=lambda found: found[0])
                passed, self._held = self._held[: end - (0 if self._include else len(self.found))], ""
                return passed
        cut = len(self._held) - self._undecided()
        passed, self._held = self._held[:cut], self._held[cut:]
        self._passed_over = len(self._held)
        return passed

    def _end_of(self, string: str) -> int:
        """Return where a stop string ends in what was not looked at before, 0 for nowhere."""
        place = self._held.find(string, max(self._passed_over + 1 - len(string), 0))
        return place + len(string) if place >= 0 else 0

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
