"""Find special tokens in a text: the earliest, and of those that start there the longest.

The strings are folded into one regular expression shaped like a trie, so a text full of near misses costs
linear time even with Llama 4's two thousand special tokens. Knows strings and ids only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from puna.errors import TokenizerError

_Trie = dict[str, "_Trie"]
_END = ""


class SpecialSplitter:
    """Cut a text into plain parts (str) and special tokens (int)."""

    def __init__(
        self,
        tokens: Mapping[str, int],
        *,
        strips_left: frozenset[int] = frozenset(),
        strips_right: frozenset[int] = frozenset(),
    ) -> None:
        self._ids = dict(tokens)
        self._strips_left = strips_left
        self._strips_right = strips_right
        try:
            self._pattern = re.compile(_trie_pattern(self._ids)) if self._ids else None
        except RecursionError:
            raise TokenizerError("the special tokens are prefixes of one another, hundreds deep") from None

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the parts of the text in order; plain parts are never empty."""
        start = 0
        after: int | None = None
        for match in self._pattern.finditer(text) if self._pattern else ():
            token_id = self._ids[match.group()]
            yield from self._plain(text[start : match.start()], after, token_id)
            yield token_id
            start, after = match.end(), token_id
        yield from self._plain(text[start:], after, None)

    def _plain(self, text: str, after: int | None, before: int | None) -> Iterator[str]:
        if after in self._strips_right:
            text = text.lstrip()
        if before in self._strips_left:
            text = text.rstrip()
        if text:
            yield text


def _trie_pattern(strings: Mapping[str, int]) -> str:
    root: _Trie = {}
    for string in strings:
        node = root
        for character in string:
            node = node.setdefault(character, {})
        node[_END] = {}
    return _node_pattern(root)


def _node_pattern(node: _Trie) -> str:
    """Return a pattern that prefers the longest string below this node."""
    literal = ""
    while len(node) == 1 and _END not in node:
        character, node = next(iter(node.items()))
        literal += re.escape(character)
    branches = [re.escape(c) + _node_pattern(child) for c, child in node.items() if c != _END]
    if not branches:
        return literal
    optional = "?" if _END in node else ""
    return f"{literal}(?:{'|'.join(branches)}){optional}"
