"""Hold what a tokenizer file says, whatever its format: the tokens, their bytes, their roles.

Every reader (tokenizer.json, tiktoken, SentencePiece, GGUF) ends in `TokenizerParts`, and `Tokenizer` needs
nothing else. Knows no file format. An encoder only ever sees plain text: the strings of special tokens are
cut out beforehand, so no encoder can be talked into writing one.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol

from puna.errors import TokenizerError

BYTEWISE_ERRORS: Final = "puna-bytewise"

Utf8Errors = Literal["replace", "puna-bytewise"]

MAX_TOKEN_CHARS = 1 << 16

END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|eom|>", "<|eot|>")
"""The tokens by which Llama 3 and 4 end a text, a message or a turn."""


class TextEncoder(Protocol):
    """Turn plain text into ids; `at_start` is False for text that follows a token within one prompt."""

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Return the ids of a text that holds no special token."""


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """Describe one vocabulary completely; lists are indexed by token id."""

    tokens: list[str]
    token_bytes: list[bytes]
    encoder: TextEncoder
    special_tokens: Mapping[str, int]
    matched_tokens: Mapping[str, int] = field(default_factory=dict)  # found in any text, before the encoder
    strips_left: frozenset[int] = frozenset()  # special tokens that swallow the white space before them
    strips_right: frozenset[int] = frozenset()
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    unk_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    drops_leading_space: bool = False
    utf8_errors: Utf8Errors = "replace"
    chat_templates: Mapping[str, str] = field(default_factory=dict)


def check_parts(parts: TokenizerParts, path: Path) -> TokenizerParts:
    """Return the parts, or raise `TokenizerError` when a role points outside the vocabulary."""
    last = len(parts.tokens) - 1
    roles: dict[str, list[int | None]] = {
        "bos": [parts.bos_token_id],
        "eos": [parts.eos_token_id, *sorted(parts.eos_token_ids)],
        "pad": [parts.pad_token_id],
        "unk": [parts.unk_token_id],
        "added": [*parts.prefix_ids, *parts.suffix_ids],
    }
    for name, ids in roles.items():
        for token_id in ids:
            if token_id is not None and not 0 <= token_id <= last:
                raise TokenizerError(
                    f"{path}: {name}_token_id is {token_id}; the vocabulary has ids 0 to {last}"
                )
    return parts


def check_token(token: str | bytes, where: str) -> None:
    """Raise `TokenizerError` for an empty token or one of more than 65,536 characters."""
    if not 0 < len(token) <= MAX_TOKEN_CHARS:
        raise TokenizerError(f"{where}: a token has 1 to {MAX_TOKEN_CHARS} characters, this one {len(token)}")


def list_by_id(entries: Iterable[tuple[str, int]], path: Path) -> list[str]:
    """Return the tokens in the order of their ids; raise `TokenizerError` for a hole or an id used twice."""
    by_id: dict[int, str] = {}
    for token, token_id in entries:
        if by_id.setdefault(token_id, token) != token:
            raise TokenizerError(
                f"{path}: id {token_id} belongs to two tokens: {by_id[token_id]!r} and {token!r}"
            )
    if not by_id:
        raise TokenizerError(f"{path}: the vocabulary is empty")
    for token_id in range(len(by_id)):
        if token_id not in by_id:
            raise TokenizerError(f"{path}: no token has id {token_id}, and the highest id is {max(by_id)}")
    return [by_id[token_id] for token_id in range(len(by_id))]


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


# SentencePiece writes one U+FFFD for every byte that is not UTF-8; Python, Rust and tiktoken write one for
# every broken character.
codecs.register_error(BYTEWISE_ERRORS, _replace_each_byte)
