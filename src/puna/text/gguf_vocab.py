"""Read the vocabulary inside a GGUF file: kind "llama" (SentencePiece) or "gpt2" (byte-level BPE).

The keys and defaults are those of llama.cpp's `llama-vocab.cpp`. Which split pattern a BPE vocabulary wants
is a name in the file; for Llama 4 the pattern and whole-token lookup are those the model was trained with
(Hugging Face's tokenizer.json), which llama.cpp only approximates. Knows metadata as a mapping, no file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.text.byte_level import (
    GPT2_SPLIT,
    LLAMA3_SPLIT,
    LLAMA4_SPLIT,
    LLAMA_CPP_DEFAULT_SPLITS,
    SMAUG_SPLIT,
    SMOLLM_SPLITS,
    build_encoder,
    from_alphabet,
)
from puna.text.sentencepiece_file import build_parts
from puna.text.sentencepiece_model import Piece, PieceType, SentencePieceModel, check_pieces
from puna.text.token_bytes import byte_of
from puna.text.vocabulary import END_TOKENS, TokenizerParts, check_token

logger = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_END_TOKENS = frozenset(
    {
        *END_TOKENS,
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "</s>",
        "<EOT>",
    }
)


@dataclass(frozen=True, kw_only=True)
class _PreTokenizer:
    """Hold what a name under tokenizer.ggml.pre stands for."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = _PreTokenizer(splits=(LLAMA3_SPLIT,), ignore_merges=True, add_bos=True)
_LLAMA4 = _PreTokenizer(splits=(LLAMA4_SPLIT,), ignore_merges=True)
_PRE_TOKENIZERS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "llama4": _LLAMA4,
    "gpt-4o": _LLAMA4,
    "smaug-bpe": _PreTokenizer(splits=(SMAUG_SPLIT,)),
    "gpt-2": _PreTokenizer(splits=(GPT2_SPLIT,)),
    "smollm": _PreTokenizer(splits=SMOLLM_SPLITS),
    "default": _PreTokenizer(splits=LLAMA_CPP_DEFAULT_SPLITS),
}


def read_gguf_vocab(path: Path, metadata: Mapping[str, Any]) -> TokenizerParts:
    """Build the vocabulary from a GGUF file's metadata; raise `TokenizerError` naming the key at fault."""
    reader = _Reader(path, metadata)
    match metadata.get(_PREFIX + "model"):
        case "llama":
            add_bos, parts = True, _read_sentencepiece(reader)
        case "gpt2":
            pre = reader.pre_tokenizer()
            add_bos, parts = pre.add_bos, _read_bpe(reader, pre)
        case kind:
            raise TokenizerError(f"{path}: {_PREFIX}model is {kind!r}; Llama models have 'llama' or 'gpt2'")
    ends = {reader.token_id(name) for name in ("eos", "eot", "eom")} | {parts.eos_token_id}
    ends |= {parts.special_tokens.get(name) for name in _END_TOKENS}
    bos, eos = parts.bos_token_id, parts.eos_token_id
    return replace(
        parts,
        eos_token_ids=frozenset(token_id for token_id in ends if token_id is not None),
        prefix_ids=(bos,) if bos is not None and reader.flag("add_bos_token", add_bos) else (),
        suffix_ids=(eos,) if eos is not None and reader.flag("add_eos_token", False) else (),
        chat_templates=_templates(path, metadata),
    )


class _Reader:
    """Get typed values out of the metadata."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._metadata = metadata
        tokens = self._list("tokens", str)
        if not tokens:
            raise TokenizerError(f"{path}: {_PREFIX}tokens is missing or empty")
        self.tokens: list[str] = tokens

    def _list(self, name: str, kind: type | tuple[type, ...]) -> list[Any] | None:
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            return None
        items = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            raise TokenizerError(f"{self.path}: {_PREFIX}{name} is no list of the right kind")
        return items

    def per_token(self, name: str, kind: type | tuple[type, ...]) -> list[Any] | None:
        """Return a list with one value a token, or None where the key is absent."""
        values = self._list(name, kind)
        if values is not None and len(values) != len(self.tokens):
            raise TokenizerError(
                f"{self.path}: {_PREFIX}{name} has {len(values)} values for {len(self.tokens)} tokens"
            )
        return values

    def types(self) -> list[PieceType] | None:
        """Return the kind of every token; 0, "undefined", counts as normal."""
        values = self.per_token("token_type", int)
        if values is None:
            return None
        kinds = {0: PieceType.NORMAL} | {int(kind): kind for kind in PieceType}
        for token_id, value in enumerate(values):
            if value not in kinds:
                raise TokenizerError(f"{self.path}: {_PREFIX}token_type of token {token_id} is {value}")
        return [kinds[value] for value in values]

    def merges(self) -> list[tuple[str, str]]:
        """Return the merges; each is "left right", cut at the first space that is not its first character."""
        merges = []
        for index, entry in enumerate(self._list("merges", str) or ()):
            cut = entry.find(" ", 1)
            if cut < 0 or cut == len(entry) - 1:
                raise TokenizerError(
                    f"{self.path}: {_PREFIX}merges[{index}] is {entry[:80]!r}; two tokens are expected"
                )
            merges.append((entry[:cut], entry[cut + 1 :]))
        if not merges:
            raise TokenizerError(f"{self.path}: {_PREFIX}merges is missing or empty")
        return merges

    def token_id(self, role: str, default: int | None = None) -> int | None:
        """Return the id under "{role}_token_id", or the default where the vocabulary reaches that far."""
        value = self._metadata.get(f"{_PREFIX}{role}_token_id")
        if value is None:
            return default if default is not None and default < len(self.tokens) else None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens):
            last = len(self.tokens) - 1
            raise TokenizerError(f"{self.path}: {_PREFIX}{role}_token_id is {value!r}; ids are 0 to {last}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean key."""
        value = self._metadata.get(_PREFIX + name, default)
        if not isinstance(value, bool):
            raise TokenizerError(f"{self.path}: {_PREFIX}{name} is {value!r}; true or false is expected")
        return value

    def pre_tokenizer(self) -> _PreTokenizer:
        """Return what the name under "pre" stands for."""
        name = self._metadata.get(_PREFIX + "pre")
        if name is None:
            logger.warning(
                "%s: no %spre: llama.cpp's default splits are used, results may be poor", self.path, _PREFIX
            )
            name = "default"
        if name not in _PRE_TOKENIZERS:
            known = ", ".join(_PRE_TOKENIZERS)
            raise TokenizerError(f"{self.path}: {_PREFIX}pre is {name!r}; known for Llama models: {known}")
        return _PRE_TOKENIZERS[name]


def _raw(token: str) -> bytes:
    return token.encode(errors="surrogateescape")


def _read_sentencepiece(reader: _Reader) -> TokenizerParts:
    roles = {
        "bos": reader.token_id("bos", 1),
        "eos": reader.token_id("eos", 2),
        "unk": reader.token_id("unknown", 0),
    }
    types = reader.types() or _guess_types(reader.tokens, roles)
    scores = reader.per_token("scores", (int, float)) or [0.0] * len(types)
    model = SentencePieceModel(
        pieces=tuple(
            Piece(text=_raw(token), score=score, type=_library_type(kind, token_id == roles["unk"]))
            for token_id, (token, score, kind) in enumerate(zip(reader.tokens, scores, types, strict=True))
        ),
        unk_id=_or_none(roles["unk"]),
        bos_id=_or_none(roles["bos"]),
        eos_id=_or_none(roles["eos"]),
        pad_id=_or_none(reader.token_id("padding")),
        byte_fallback=PieceType.BYTE in types,
        add_dummy_prefix=reader.flag("add_space_prefix", True),
    )
    check_pieces(reader.path, model.pieces)
    specials, matched = _split_by_type(reader.tokens, types)
    parts = build_parts(
        reader.path, model, special_tokens=specials, matched_tokens=matched, prefix_everywhere=True
    )
    for token_id in (*specials.values(), *matched.values()):
        parts.token_bytes[token_id] = model.pieces[token_id].text
    return parts


def _or_none(token_id: int | None) -> int:
    return -1 if token_id is None else token_id


def _library_type(kind: PieceType, unknown: bool) -> PieceType:
    """Return the type to tell sentencepiece: one unknown piece, and none that it would match by itself."""
    if unknown:
        return PieceType.UNKNOWN
    return PieceType.CONTROL if kind in (PieceType.UNKNOWN, PieceType.USER_DEFINED) else kind


def _guess_types(tokens: Sequence[str], roles: Mapping[str, int | None]) -> list[PieceType]:
    types = [PieceType.NORMAL if byte_of(token) is None else PieceType.BYTE for token in tokens]
    for token_id in roles.values():
        if token_id is not None:
            types[token_id] = PieceType.CONTROL
    return types


def _split_by_type(
    tokens: Sequence[str], types: Sequence[PieceType]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the special tokens, and those that are matched in any text; a turn's end is always special."""
    specials: dict[str, int] = {}
    matched: dict[str, int] = {}
    for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        user_defined = kind is PieceType.USER_DEFINED
        if kind in (PieceType.CONTROL, PieceType.UNKNOWN) or (user_defined and token in _END_TOKENS):
            specials[token] = token_id
        elif user_defined:
            matched[token] = token_id
    return specials, matched


def _read_bpe(reader: _Reader, pre: _PreTokenizer) -> TokenizerParts:
    roles = {"bos": reader.token_id("bos"), "eos": reader.token_id("eos"), "unk": reader.token_id("unknown")}
    types = reader.types() or _guess_types(reader.tokens, roles)
    plain = (PieceType.NORMAL, PieceType.BYTE)
    vocab: dict[str, int] = {}
    for token_id, (token, kind) in enumerate(zip(reader.tokens, types, strict=True)):
        check_token(token, f"{reader.path}: {_PREFIX}tokens[{token_id}]")
        if kind in plain and vocab.setdefault(token, token_id) != token_id:
            raise TokenizerError(
                f"{reader.path}: {_PREFIX}tokens[{token_id}] repeats token {vocab[token]}, {token!r}"
            )
    specials, matched = _split_by_type(reader.tokens, types)
    return TokenizerParts(
        tokens=[_raw(token).decode(errors="replace") for token in reader.tokens],
        token_bytes=[
            from_alphabet(token) if kind in plain else _raw(token)
            for token, kind in zip(reader.tokens, types, strict=True)
        ],
        encoder=build_encoder(
            vocab, reader.merges(), splits=pre.splits, ignore_merges=pre.ignore_merges, path=reader.path
        ),
        special_tokens=specials,
        matched_tokens=matched,
        bos_token_id=roles["bos"],
        eos_token_id=roles["eos"],
        pad_token_id=reader.token_id("padding"),
        unk_token_id=roles["unk"],
    )


def _templates(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {}
    for key, value in metadata.items():
        if key == _TEMPLATE or key.startswith(_TEMPLATE + "."):
            if not isinstance(value, str):
                raise TokenizerError(f"{path}: {key} is no string")
            templates[key.removeprefix(_TEMPLATE)[1:] or "default"] = value
    return templates
