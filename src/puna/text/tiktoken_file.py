"""Read Meta's tokenizer.model for Llama 3 and 4: lines of "base64(token bytes) rank".

The file holds the byte pairs only; which split pattern and which special tokens go with it follows from how
many there are (128,000: Llama 3; 200,000: Llama 4). Ids and names are those of Meta's llama-models, and of
Hugging Face's tokenizer.json where the two differ in the name of a reserved token.
"""

from __future__ import annotations

import binascii
from pathlib import Path

from puna.errors import TokenizerError
from puna.text.byte_level import (
    LLAMA3_SPLIT,
    LLAMA4_SPLIT,
    LazyEncoder,
    PipelineEncoder,
    build_encoder,
    merges_of_ranks,
    require_bytes,
    to_alphabet,
)
from puna.text.tokenizer_config import HfTokenizerConfig, apply_config
from puna.text.vocabulary import END_TOKENS, MAX_TOKEN_CHARS, TokenizerParts, check_token

LLAMA3_TOKENS = 128_000
LLAMA4_TOKENS = 200_000

_MAX_FILE_BYTES = 1 << 26


def read_tiktoken(path: Path, data: bytes, config: HfTokenizerConfig | None) -> TokenizerParts:
    """Read a tiktoken file of Llama 3 or 4, with the files beside it in a Hugging Face folder.

    Raises `TokenizerError` naming the line for anything else.
    """
    parts = _read(path, data)
    return parts if config is None else apply_config(parts, config, path)


def _read(path: Path, data: bytes) -> TokenizerParts:
    if len(data) > _MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: {len(data)} bytes; a tokenizer has at most {_MAX_FILE_BYTES}")
    tokens = parse_ranks(path, data)
    if len(tokens) == LLAMA3_TOKENS:
        return _build(path, tokens, _llama3_specials(), LLAMA3_SPLIT, pad="<|finetune_right_pad_id|>")
    if len(tokens) == LLAMA4_TOKENS:
        return _build(path, tokens, _llama4_specials(), LLAMA4_SPLIT, pad="<|finetune_right_pad|>")
    raise TokenizerError(
        f"{path}: {len(tokens)} tokens; Llama 3's file has {LLAMA3_TOKENS}, Llama 4's {LLAMA4_TOKENS}"
    )


def parse_ranks(path: Path, data: bytes) -> list[bytes]:
    """Return the tokens in rank order; the ranks must be 0, 1, 2 and so on, and no token may come twice."""
    lines = data.splitlines()
    tokens = [_parse_line(path, number, line) for number, line in enumerate(lines)]
    if len(set(tokens)) != len(tokens):
        first: dict[bytes, int] = {}
        for number, token in enumerate(tokens, 1):
            if first.setdefault(token, number) != number:
                raise TokenizerError(f"{path}: line {number} repeats the token of line {first[token]}")
    return tokens


def _parse_line(path: Path, number: int, line: bytes) -> bytes:
    encoded, _, rank = line.partition(b" ")
    try:
        token = binascii.a2b_base64(encoded, strict_mode=True)
    except binascii.Error as error:
        raise TokenizerError(f"{path}: line {number + 1}: not base64: {error}") from None
    if rank != b"%d" % number:
        shown = rank[:20].decode("ascii", "backslashreplace")
        raise TokenizerError(f"{path}: line {number + 1}: rank {shown!r} where {number} is expected")
    if not 0 < len(token) <= MAX_TOKEN_CHARS:
        check_token(token, f"{path}: line {number + 1}")
    return token


def _build(path: Path, base: list[bytes], specials: list[str], split: str, *, pad: str) -> TokenizerParts:
    names = [to_alphabet(token) for token in base]
    vocab = {name: rank for rank, name in enumerate(names)}
    ids = {name: len(base) + index for index, name in enumerate(specials)}
    ends = [ids[name] for name in END_TOKENS if name in ids]
    require_bytes(vocab, path)

    def make_encoder() -> PipelineEncoder:
        return build_encoder(vocab, merges_of_ranks(vocab), splits=(split,), ignore_merges=True, path=path)

    return TokenizerParts(
        tokens=names + specials,
        token_bytes=base + [name.encode() for name in specials],
        encoder=LazyEncoder(make_encoder),
        special_tokens=ids,
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ids["<|end_of_text|>"],
        pad_token_id=ids[pad],
        eos_token_ids=frozenset(ends),
        prefix_ids=(ids["<|begin_of_text|>"],),
    )


def _llama3_specials() -> list[str]:
    return [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        *(f"<|reserved_special_token_{index}|>" for index in range(3, 248)),
    ]


def _llama4_specials() -> list[str]:
    def reserved(kind: str, first: int, stop: int) -> list[str]:
        return [f"<|{kind}reserved_special_token_{index}|>" for index in range(first, stop)]

    return [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|header_start|>",
        "<|header_end|>",
        "<|eom|>",
        "<|eot|>",
        "<|step|>",
        *reserved("text_post_train_", 0, 6),
        "<|python_start|>",
        "<|python_end|>",
        "<|finetune_right_pad|>",
        *reserved("text_post_train_", 8, 69),
        "<|image_start|>",
        "<|image_end|>",
        *reserved("vision_", 0, 2),
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
        *reserved("vision_", 2, 6),
        "<|image|>",
        *reserved("vision_", 6, 7),
        "<|patch|>",
        *reserved("vision_", 7, 1048),
        *reserved("reasoning_", 0, 8),
        "<|reasoning_thinking_start|>",
        "<|reasoning_thinking_end|>",
        *reserved("", 0, 904),
    ]
