"""Encode with byte-level BPE, the tokenizer of Llama 3 and 4: the byte alphabet, the splits, the encoder.

Knows vocabularies and merges as Python objects, no file format. The merging is done by the `tokenizers`
library, whose heap keeps a million equal letters linear. The alphabet is GPT-2's: 188 printable bytes stand
for themselves, the other 68 for U+0100 onwards. The split patterns are those of Meta's llama-models
(Llama 3, Llama 4), of GPT-2, and of llama.cpp's `llama-vocab.cpp` for names that only GGUF files use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from puna.errors import TokenizerError

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA4_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMAUG_SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_CPP_DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
SMOLLM_SPLITS = (r"\p{N}", GPT2_SPLIT)
KNOWN_SPLITS = frozenset(
    {LLAMA3_SPLIT, LLAMA4_SPLIT, SMAUG_SPLIT, GPT2_SPLIT, r"\p{N}", *LLAMA_CPP_DEFAULT_SPLITS}
)

_LONG_TEXT_CHARS = 1 << 14


def _byte_alphabet() -> list[str]:
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


BYTE_ALPHABET = _byte_alphabet()
_TO_ALPHABET = dict(enumerate(BYTE_ALPHABET))
_FROM_ALPHABET = {character: byte for byte, character in enumerate(BYTE_ALPHABET)}


def to_alphabet(data: bytes) -> str:
    """Write bytes in GPT-2's alphabet, one character a byte."""
    return data.decode("latin-1").translate(_TO_ALPHABET)


def from_alphabet(token: str) -> bytes:
    """Return the bytes that a token in GPT-2's alphabet stands for.

    A token with any other character in it stands for itself, in UTF-8: so do added tokens such as "<|eot|>".
    """
    try:
        return bytes([_FROM_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode(errors="surrogateescape")


def merges_of_ranks(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the merges that make byte-pair encoding by rank (tiktoken) out of a vocabulary in rank order.

    Lists every way to cut a token into two others. Only the way that merging by rank itself takes can come up
    while encoding, because the merges inside a token happen as if it stood alone; the rest do no harm.
    """
    return [
        (left, right)
        for token in vocab
        for cut in range(1, len(token))
        if (left := token[:cut]) in vocab and (right := token[cut:]) in vocab
    ]


class PipelineEncoder:
    """Encode plain text with a `tokenizers.Tokenizer` that holds no special tokens."""

    def __init__(self, tokenizer: Tokenizer, inner: Tokenizer | None = None) -> None:
        """Take the tokenizer and, where text after a token is encoded differently, the one for that."""
        self._tokenizer = tokenizer
        self._inner = inner or tokenizer

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Return the ids; about 1 s a megabyte whatever the text."""
        tokenizer = self._tokenizer if at_start else self._inner
        if len(text) < _LONG_TEXT_CHARS:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        else:  # without offsets: half the time; not for short texts, as it starts threads
            ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids


class LazyEncoder:
    """Encode with an encoder that is made when the first text comes, as some only decode, or only look."""

    def __init__(self, make: Callable[[], PipelineEncoder]) -> None:
        """Take what makes it, which must not fail."""
        self._make = make

    @cached_property
    def _encoder(self) -> PipelineEncoder:
        return self._make()

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Return the ids; see `PipelineEncoder.encode`."""
        return self._encoder.encode(text, at_start=at_start)


def require_bytes(vocab: Mapping[str, int], path: Path) -> None:
    """Raise `TokenizerError` when one of the 256 bytes has no token."""
    for byte, character in enumerate(BYTE_ALPHABET):
        if character not in vocab:
            raise TokenizerError(f"{path}: no token for the single byte 0x{byte:02X}")


def build_encoder(
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    *,
    splits: tuple[str, ...],
    ignore_merges: bool,
    path: Path,
) -> PipelineEncoder:
    """Build an encoder from tokens in the byte alphabet and merges in order of rank.

    With `ignore_merges` a whole split part that is a token becomes that token, reachable by merges or not.
    Raises `TokenizerError` for a merge of unknown tokens, and when one of the 256 bytes has no token.
    """
    require_bytes(vocab, path)
    pairs = list(merges)
    try:
        model = models.BPE(vocab=dict(vocab), merges=pairs, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises bare Exception, without the place
        for token, token_id in vocab.items():
            if any("\ud800" <= character <= "\udfff" for character in token):
                raise TokenizerError(f"{path}: token {token_id} is not UTF-8") from None
        for index, (left, right) in enumerate(pairs):
            if not {left, right, left + right} <= vocab.keys():
                raise TokenizerError(
                    f"{path}: merge {index}, {left!r} {right!r}: not three known tokens"
                ) from None
        raise TokenizerError(f"{path}: merges: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PipelineEncoder(tokenizer)
