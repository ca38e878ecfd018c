"""Keep what people write from becoming special tokens, whatever a chat template does with it.

A template writes its own special tokens as text, so its output must be searched for them, and the contents
stand in that output. Before the template runs, every string of a special token in a content is therefore
broken by a mark, a private character that occurs in no content; after the special tokens were cut out, the
marks are taken out of the rest, which is then encoded as plain text.

A special token that a template would put together from several contents, or from its own text and a content,
is broken too: a content that ends in the beginning of one, begins with the end of one, or is a piece of one,
gets a mark there. And since a mark follows every "|" inside a content, tokens like <|eot_id|> stay broken
even where a template cuts or edits contents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from puna.errors import ParameterError

_FIRST_PRIVATE, _LAST_PRIVATE = 0xE000, 0xF8FF

# Values that a template compares with names of its own: a mark there would hide them.
_KEYWORD_KEYS = frozenset({"role", "type"})


class ContentMarks:
    """Mark contents, and take the marks out of what became of them."""

    def __init__(self, special_tokens: Iterable[str], texts: str) -> None:
        """Choose marks that do not occur in `texts`, which is everything that will be rendered."""
        self._guard = _guard(frozenset(special_tokens))
        self.mark, self.end = _choose_marks(texts)

    def apply(self, value: Any) -> Any:
        """Return a JSON value with all its strings marked, keys included."""
        return self._apply(value, whole=True)

    def _apply(self, value: Any, *, whole: bool) -> Any:
        match value:
            case str():
                return self._guard(value, self.mark, whole)
            case list():
                return [self._apply(item, whole=whole) for item in value]
            case dict():
                return {
                    self._guard(key, self.mark, False): self._apply(item, whole=key not in _KEYWORD_KEYS)
                    for key, item in value.items()
                }
        return value

    def remove(self, text: str) -> str:
        """Return a text without marks, also where a template wrote them as JSON escapes."""
        return text.replace(self.mark, "").replace(_escape(self.mark), "")


def _choose_marks(texts: str) -> tuple[str, str]:
    lowered = texts.lower()
    free = (
        chr(code)
        for code in range(_FIRST_PRIVATE, _LAST_PRIVATE + 1)
        if chr(code) not in texts and _escape(chr(code)) not in lowered
    )
    try:
        return next(free), next(free)
    except StopIteration:
        raise ParameterError("messages: every private character U+E000 to U+F8FF occurs in them") from None


def _escape(mark: str) -> str:
    return f"\\u{ord(mark):04x}"


@lru_cache(maxsize=8)
def _guard(special_tokens: frozenset[str]) -> Callable[[str, str, bool], str]:
    """Return the function (text, mark, whole) that marks a text for these special tokens.

    `whole` asks also for the marks at the ends of the text, and of a text that is a piece of a token.
    """
    tokens = {token.lower() for token in special_tokens}
    single = {token for token in tokens if len(token) == 1}
    prefixes = {token[:size] for token in tokens for size in range(1, len(token))}
    suffixes = {token[size:] for token in tokens for size in range(1, len(token))}
    longest = max(map(len, tokens), default=0)
    joined = "\n".join(tokens)
    breaks = _break_pattern(tokens)

    def mark_ends(text: str, mark: str) -> str:
        body = text.strip()
        lowered = body.lower()
        sizes = range(1, min(longest, len(lowered) + 1))
        is_piece = len(lowered) < longest and "\n" not in lowered and lowered in joined
        before = mark if is_piece or any(lowered[:size] in suffixes for size in sizes) else ""
        after = mark if any(lowered[-size:] in prefixes for size in sizes) else ""
        start = text.find(body)
        return text[:start] + before + body + after + text[start + len(body) :]

    def guard(text: str, mark: str, whole: bool) -> str:
        if single and any(character in single for character in text.lower()):
            raise ParameterError("messages: a content holds a special token of one character")
        if whole and text and not text.isspace():
            text = mark_ends(text, mark)
        return breaks.sub(lambda match: match.group() + mark, text)

    return guard


def _break_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return what a mark must follow: a "|", or the first character of a token that has none inside."""
    unbarred = [token for token in tokens if "|" not in token[:-1] and len(token) > 1]
    barred = any("|" in token[:-1] for token in tokens)
    branches = [r"\|"] if barred else []
    branches += [re.escape(token[0]) + f"(?={re.escape(token[1:])})" for token in sorted(unbarred)]
    return re.compile("|".join(branches) or r"(?!)", re.IGNORECASE)


def strings(value: Any) -> Iterable[str]:
    """Yield every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
