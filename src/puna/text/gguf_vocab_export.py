"""Say a tokenizer in GGUF's metadata: the way back of `gguf_vocab.py`.

Every vocabulary becomes one of GGUF's two kinds: "gpt2", byte-level BPE with its merges, or "llama",
SentencePiece with a score for each token. Keys: llama.cpp's `llama-vocab.cpp` and `gguf-py`. Files say more
than GGUF has keys for; what is left out is refused where it would change ids, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.errors import UnsupportedError
from puna.gguf_header import Value, is_gguf, read_metadata
from puna.text.byte_level import GPT2_SPLIT, LLAMA3_SPLIT, LLAMA4_SPLIT, SMAUG_SPLIT
from puna.text.sentencepiece_model import PieceType, parse_model
from puna.text.token_bytes import byte_of
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.text.tokenizer_config import read_json

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_PRE_NAMES = {
    LLAMA3_SPLIT: "llama-bpe",
    LLAMA4_SPLIT: "llama4",
    SMAUG_SPLIT: "smaug-bpe",
    GPT2_SPLIT: "gpt-2",
}
_IGNORE_MERGES = ("llama-bpe", "llama4")
_ADDED_SCORE = -1000.0


def gguf_vocabulary(path: Path | str, *, vocab_size: int) -> dict[str, Value]:
    """Return the keys under `tokenizer.` for the tokenizer of a model folder or file.

    `vocab_size` is the model's: rows without a token get a name that nothing spells. Raises what
    `load_tokenizer` does, and UnsupportedError for a tokenizer that GGUF cannot describe.
    """
    tokenizer = load_tokenizer(path)
    file = tokenizer.path
    if is_gguf(file):
        return {key: value for key, value in read_metadata(file).items() if key.startswith("tokenizer.")}
    if file.suffix == ".json":
        keys = _from_json(tokenizer, read_json(file))
    elif file.read_bytes()[:1] == b"\n":
        keys = _from_sentencepiece(tokenizer)
    else:
        keys = _from_ranks(tokenizer)
    return {
        **{_PREFIX + key: value for key, value in _padded(keys, vocab_size).items()},
        **{_PREFIX + key: value for key, value in _roles(tokenizer).items()},
        **_templates(tokenizer.chat_templates),
    }


def _tokens(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(token_id) for token_id in range(tokenizer.vocab_size)]


def _types(tokenizer: Tokenizer, matched: Mapping[str, int]) -> list[int]:
    """Return the type of each token: control for the special ones, user-defined for others matched whole."""
    types = [int(PieceType.NORMAL)] * tokenizer.vocab_size
    for token_id in matched.values():
        types[token_id] = int(PieceType.USER_DEFINED)
    for token_id in tokenizer.special_tokens.values():
        types[token_id] = int(PieceType.CONTROL)
    return types


def _padded(keys: dict[str, Value], vocab_size: int) -> dict[str, Value]:
    """Give the lists of tokens one entry for each row of the embedding."""
    tokens = keys["tokens"]
    assert isinstance(tokens, list)
    if len(tokens) > vocab_size:
        raise UnsupportedError(
            f"the tokenizer has {len(tokens)} tokens, the model {vocab_size} rows: a GGUF holds one list"
        )
    missing = range(len(tokens), vocab_size)
    filler: dict[str, list[Any]] = {
        "tokens": [f"[PAD{token_id}]" for token_id in missing],
        "token_type": [int(PieceType.UNUSED)] * len(missing),
        "scores": [_ADDED_SCORE] * len(missing),
    }
    return {
        key: [*value, *filler[key]] if key in filler and isinstance(value, list) else value
        for key, value in keys.items()
    }


def _roles(tokenizer: Tokenizer) -> dict[str, Value]:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
    }
    ends = sorted(tokenizer.eos_token_ids - {tokenizer.eos_token_id})
    for role, name in (("eom_token_id", "eom"), ("eot_token_id", "eot")):
        named = [token_id for token_id in ends if name in tokenizer.id_to_token(token_id)]
        ids[role] = named[0] if named else None
    if ids["eot_token_id"] is None:
        left = [token_id for token_id in ends if token_id != ids["eom_token_id"]]
        ids["eot_token_id"] = left[0] if left else None
    added_ids = tokenizer.encode("")
    flags: dict[str, Value] = {
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": bool(added_ids) and added_ids[-1] == tokenizer.eos_token_id,
    }
    return {**{key: value for key, value in ids.items() if value is not None}, **flags}


def _templates(templates: Mapping[str, str]) -> dict[str, Value]:
    keys: dict[str, Value] = {
        f"{_TEMPLATE}.{name}": text for name, text in templates.items() if name != "default"
    }
    if keys:
        keys["tokenizer.chat_templates"] = [name for name in templates if name != "default"]
    return keys | ({_TEMPLATE: templates["default"]} if "default" in templates else {})


# ------------------------------------------------------------------------------------------- tokenizer.json


def _from_json(tokenizer: Tokenizer, data: Mapping[str, Any]) -> dict[str, Value]:
    model = data["model"]
    added = {entry["content"]: entry["id"] for entry in data.get("added_tokens", [])}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else (m[0], m[1]) for m in model["merges"]]
    if model.get("byte_fallback"):
        return _scored(tokenizer, data, added, merges)
    pre = _pre_name(tokenizer.path, data)
    if bool(model.get("ignore_merges")) != (pre in _IGNORE_MERGES):
        raise UnsupportedError(f"{tokenizer.path}: ignore_merges is not what GGUF's {pre!r} stands for")
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": _tokens(tokenizer),
        "token_type": _types(tokenizer, added),
        "merges": [f"{left} {right}" for left, right in merges],
    }


def _pre_name(path: Path, data: Mapping[str, Any]) -> str:
    """Return GGUF's name for the way in which the text is split before merging."""
    if data.get("normalizer") is not None:
        raise UnsupportedError(f"{path}: a byte-level tokenizer with a normalizer cannot be written to GGUF")
    regexes = []
    for step in _steps(data.get("pre_tokenizer")):
        if step.get("type") == "Split":
            regexes.append(step["pattern"].get("Regex"))
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            raise UnsupportedError(f"{path}: add_prefix_space cannot be written to GGUF")
        if step.get("type") == "ByteLevel" and step.get("use_regex", True):
            regexes.append(GPT2_SPLIT)
    if len(regexes) != 1 or regexes[0] not in _PRE_NAMES:
        raise UnsupportedError(f"{path}: GGUF has no name for its way of splitting text, {regexes}")
    return _PRE_NAMES[regexes[0]]


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(step, dict):
        yield step
        for key in ("normalizers", "pretokenizers"):
            for inner in step.get(key) or ():
                yield from _steps(inner)


def _scored(
    tokenizer: Tokenizer,
    data: Mapping[str, Any],
    added: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
) -> dict[str, Value]:
    """Describe BPE with byte fallback (Llama 2) as SentencePiece: what merges first has the highest score."""
    tokens = _tokens(tokenizer)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    last = float(len(merges))
    types = _types(tokenizer, added)
    for token_id, token in enumerate(tokens):
        if byte_of(token) is not None and types[token_id] == PieceType.NORMAL:
            types[token_id] = int(PieceType.BYTE)
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(PieceType.UNKNOWN)
    steps = [*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))]
    prefixed = any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [-float(ranks.get(token, last)) for token in tokens],
        "token_type": types,
        "add_space_prefix": prefixed,
    }


# ------------------------------------------------------------------------------------------ tokenizer.model


def _from_sentencepiece(tokenizer: Tokenizer) -> dict[str, Value]:
    model = parse_model(tokenizer.path, tokenizer.path.read_bytes())
    beyond = range(len(model.pieces), tokenizer.vocab_size)
    types = [int(piece.type) for piece in model.pieces] + [int(PieceType.USER_DEFINED)] * len(beyond)
    for token_id in tokenizer.special_tokens.values():
        if types[token_id] != PieceType.UNKNOWN:
            types[token_id] = int(PieceType.CONTROL)
    texts = [piece.text.decode("utf-8", "surrogateescape") for piece in model.pieces]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [*texts, *(tokenizer.id_to_token(token_id) for token_id in beyond)],
        "scores": [*(float(piece.score) for piece in model.pieces), *([_ADDED_SCORE] * len(beyond))],
        "token_type": types,
        "add_space_prefix": model.add_dummy_prefix,
    }


def _from_ranks(tokenizer: Tokenizer) -> dict[str, Value]:
    """Describe Meta's tokenizer of Llama 3 or 4, a list of byte pairs by rank, with the merges it implies."""
    specials = set(tokenizer.special_tokens.values())
    tokens = _tokens(tokenizer)
    base = [token for token_id, token in enumerate(tokens) if token_id not in specials]
    llama3 = "<|start_header_id|>" in tokenizer.special_tokens
    return {
        "model": "gpt2",
        "pre": "llama-bpe" if llama3 else "llama4",
        "tokens": tokens,
        "token_type": _types(tokenizer, {}),
        "merges": [f"{left} {right}" for left, right in _implied_merges(base)],
    }


def _implied_merges(tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield for each token the last pair that merging by rank joins to make it, in rank order.

    A few tokens cannot be made of lower ranks; all ways to cut these in two are yielded.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank, token in enumerate(tokens):
        parts = _merged_below(token, rank, ranks)
        if len(parts) == 2:
            yield parts[0], parts[1]
        elif len(parts) > 2:
            cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            yield from ((left, right) for left, right in cuts if left in ranks and right in ranks)


def _merged_below(token: str, rank: int, ranks: Mapping[str, int]) -> list[str]:
    """Merge the characters of a token by ranks below its own, down to two parts or as far as it goes."""
    parts = list(token)
    while len(parts) > 2:
        joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(joined)
        if best >= rank:
            break
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
