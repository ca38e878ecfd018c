"""Say which bytes each token stands for, from the decoder that a tokenizer.json describes.

Decoding is done on bytes rather than by the pipeline's own decoder, so that a stream of tokens and all of
them at once give the same text. One difference follows: where a run of byte tokens is not UTF-8,
Transformers writes U+FFFD for all of its bytes, and Puna, like SentencePiece, only for the broken ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.text.byte_level import from_alphabet
from puna.text.vocabulary import BYTEWISE_ERRORS, Utf8Errors

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of(token: str) -> bytes | None:
    """Return the byte that a token like "<0x0A>" stands for, or None."""
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(match[1]) if match else None


@dataclass(kw_only=True)
class TokenBytes:
    """Turn tokens into bytes: by GPT-2's alphabet, or by replacing U+2581 and reading "<0xNN>" tokens."""

    byte_level: bool = False
    byte_fallback: bool = False
    replaced: tuple[tuple[str, str], ...] = ()
    drops_leading_space: bool = False

    @property
    def utf8_errors(self) -> Utf8Errors:
        """Name the error handler that fits: one U+FFFD a broken character, or one a byte."""
        return BYTEWISE_ERRORS if self.byte_fallback else "replace"

    @classmethod
    def from_decoder(cls, path: Path, decoder: Any) -> TokenBytes:
        """Read the decoder of a tokenizer.json; raise `TokenizerError` for one that no Llama has."""
        result = cls()
        match decoder:
            case {"type": "Sequence", "decoders": [*steps]}:
                pass
            case _:
                steps = [decoder]
        for step in steps:
            result._read_step(path, step)
        return result

    def _read_step(self, path: Path, step: object) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self.byte_level = True
            case {"type": "ByteFallback"}:
                self.byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
                self.replaced += ((old, new),)
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                self.drops_leading_space = start == 1
            case {"type": "Metaspace", "replacement": str(old), **rest} if old:
                self.replaced += ((old, " "),)
                self.drops_leading_space = rest.get("prepend_scheme", "always") != "never"
            case _:
                raise TokenizerError(f"{path}: decoder {str(step)[:80]} is none that a Llama has")

    def table(self, path: Path, tokens: list[str], verbatim: Collection[str]) -> list[bytes]:
        """Return the bytes of every token; those in `verbatim` are not in GPT-2's alphabet."""
        try:
            return [self._of(token, token in verbatim) for token in tokens]
        except UnicodeEncodeError as error:
            raise TokenizerError(f"{path}: the token {error.object!r} holds a lone surrogate") from None

    def _of(self, token: str, verbatim: bool) -> bytes:
        if self.byte_level:
            return token.encode() if verbatim else from_alphabet(token)
        if self.byte_fallback and (byte := byte_of(token)) is not None:
            return byte
        for old, new in self.replaced:
            token = token.replace(old, new)
        return token.encode()
