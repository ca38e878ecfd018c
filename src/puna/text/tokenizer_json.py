"""Read a Hugging Face tokenizer.json: byte-level BPE (Llama 3, 4) or BPE with byte fallback (Llama 2).

The pipeline written in the file is run by the `tokenizers` library; this module decides whether it is one
that a Llama uses, because a split pattern from an unknown file can be made to run for hours. Special tokens
are taken out of the pipeline and of the model's vocabulary, so plain text cannot become one whatever the file
says. How tokens become bytes is in `token_bytes.py`, what the files beside it say in `tokenizer_config.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken as MatchedToken
from tokenizers import Tokenizer as Pipeline
from tokenizers import models

from puna.errors import TokenizerError
from puna.text.byte_level import BYTE_ALPHABET, KNOWN_SPLITS, PipelineEncoder
from puna.text.token_bytes import TokenBytes
from puna.text.tokenizer_config import HfTokenizerConfig, apply_config, is_id, read_json
from puna.text.vocabulary import TokenizerParts, check_token, list_by_id

logger = logging.getLogger(__name__)

_Json = dict[str, Any]

_ALLOWED = {
    "normalizer": frozenset({"Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD"}),
    "pre_tokenizer": frozenset({"Sequence", "Split", "ByteLevel", "Metaspace", "Digits"}),
    "decoder": frozenset({"Sequence", "ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}),
    "post_processor": frozenset({"Sequence", "ByteLevel", "TemplateProcessing"}),
}
_LIST_KEYS = ("normalizers", "pretokenizers", "decoders", "processors")


def read_tokenizer_json(path: Path, config: HfTokenizerConfig) -> TokenizerParts:
    """Read a tokenizer.json and apply what the files beside it say.

    Raises `TokenizerError` naming the file and the key for a file that is damaged, has holes or duplicates in
    its ids, or asks for a step or split pattern that no Llama uses.
    """
    data = read_json(path)
    for key in _ALLOWED:
        _check_steps(path, key, data.get(key))
    vocab = _read_vocab(path, data)
    added = _read_added_tokens(path, data, vocab)
    _add_configured_tokens(path, vocab, added, config)
    tokens = list_by_id([*vocab.items(), *((token, entry["id"]) for token, entry in added.items())], path)
    specials = {token: entry["id"] for token, entry in added.items() if entry["special"]}
    to_bytes = TokenBytes.from_decoder(path, data.get("decoder"))
    prefix, suffix = _template_ids(path, data.get("post_processor"))
    parts = TokenizerParts(
        tokens=tokens,
        token_bytes=to_bytes.table(path, tokens, added),
        encoder=_build_encoder(path, data, vocab, added),
        special_tokens=specials,
        strips_left=frozenset(entry["id"] for entry in added.values() if entry["lstrip"]),
        strips_right=frozenset(entry["id"] for entry in added.values() if entry["rstrip"]),
        bos_token_id=prefix[0] if prefix else None,
        prefix_ids=prefix,
        suffix_ids=suffix,
        drops_leading_space=to_bytes.drops_leading_space,
        utf8_errors=to_bytes.utf8_errors,
    )
    return apply_config(parts, config, path)


def _steps(step: object) -> Iterator[_Json]:
    """Yield a pipeline step and the steps inside it; anything that is no object is yielded as {}."""
    if not isinstance(step, dict):
        yield {}
        return
    yield step
    for key in _LIST_KEYS:
        for inner in step.get(key) or ():
            yield from _steps(inner)


def _check_steps(path: Path, key: str, root: object) -> None:
    if root is None:
        return
    for step in _steps(root):
        kind = step.get("type")
        if kind not in _ALLOWED[key]:
            raise TokenizerError(f"{path}: {key} has a step of type {kind!r}, which no Llama uses")
        if kind in ("Split", "Replace"):
            _check_pattern(path, key, step.get("pattern"))


def _check_pattern(path: Path, key: str, pattern: object) -> None:
    match pattern:
        case {"String": str()}:
            return
        case {"Regex": str(regex)} if regex in KNOWN_SPLITS:
            return
    raise TokenizerError(f"{path}: {key} has the pattern {str(pattern)[:200]!r}, which no Llama uses")


def _read_vocab(path: Path, data: _Json) -> dict[str, int]:
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise TokenizerError(f"{path}: model is of type {kind!r}; every Llama has BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise TokenizerError(f"{path}: model.{key} is {model[key]!r}, which no Llama uses")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{path}: model.vocab is no object, or empty")
    for token, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0:
            raise TokenizerError(f"{path}: model.vocab: {token[:40]!r} has the id {token_id!r}")
    check_token(min(vocab, key=len), f"{path}: model.vocab")
    check_token(max(vocab, key=len), f"{path}: model.vocab")
    return vocab


def _read_added_tokens(path: Path, data: _Json, vocab: Mapping[str, int]) -> dict[str, _Json]:
    entries = data.get("added_tokens", [])
    if not isinstance(entries, list):
        raise TokenizerError(f"{path}: added_tokens is no list")
    added: dict[str, _Json] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: added_tokens[{index}]"
        match entry:
            case {"content": str(content), "id": int(token_id)} if token_id >= 0:
                check_token(content, where)
            case _:
                raise TokenizerError(f"{where}: an object with id and content is expected")
        if content in added or vocab.get(content, token_id) != token_id:
            raise TokenizerError(f"{where}: {content!r} has a second id, {token_id}")
        added[content] = _added_entry(token_id, entry)
        if added[content]["special"] and added[content]["single_word"]:
            raise TokenizerError(f"{where}: a special token with single_word, which no Llama uses")
    return added


def _added_entry(token_id: int, entry: Mapping[str, Any]) -> _Json:
    special = bool(entry.get("special", False))
    flags = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word")}
    return {
        "id": token_id,
        "special": special,
        "normalized": bool(entry.get("normalized", not special)),
        **flags,
    }


def _add_configured_tokens(
    path: Path, vocab: Mapping[str, int], added: dict[str, _Json], config: HfTokenizerConfig
) -> None:
    """Mark the tokens that the config calls special, and append those that the vocabulary lacks."""
    for token_id, token in config.added_tokens.items():
        known = added[token.content]["id"] if token.content in added else vocab.get(token.content, token_id)
        if known != token_id:
            raise TokenizerError(
                f"{path}: {token.content!r} is {known}; tokenizer_config.json calls it {token_id}"
            )
        entry = added.setdefault(token.content, _added_entry(token_id, {}))
        entry["special"] |= token.special
    for name in config.special_tokens:
        if name not in added:
            next_id = 1 + max(max(vocab.values()), max((e["id"] for e in added.values()), default=0))
            added[name] = _added_entry(vocab.get(name, next_id), {})
        added[name]["special"] = True


def _template_ids(path: Path, root: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post processor puts before and after a text."""
    before: list[int] = []
    after: list[int] = []
    for step in _steps(root) if root is not None else ():
        if step.get("type") != "TemplateProcessing":
            continue
        target = before
        for item in step.get("single") or ():
            match item:
                case {"Sequence": _}:
                    target = after
                case {"SpecialToken": {"id": str(name)}}:
                    target += _special_ids(path, step, name)
                case _:
                    raise TokenizerError(f"{path}: post_processor: {str(item)[:80]} is no template item")
    return tuple(before), tuple(after)


def _special_ids(path: Path, step: _Json, name: str) -> list[int]:
    match step.get("special_tokens"):
        case {**tokens}:
            entry = tokens.get(name)
            ids = entry.get("ids") if isinstance(entry, dict) else None
            if isinstance(ids, list) and all(is_id(token_id) for token_id in ids):
                return ids
    raise TokenizerError(f"{path}: post_processor: special_tokens has no ids for {name!r}")


def _build_encoder(
    path: Path, data: _Json, vocab: Mapping[str, int], added: Mapping[str, _Json]
) -> PipelineEncoder:
    """Build the pipeline for plain text: the model without special tokens, other added tokens matched."""
    model = data["model"]
    unknown = model.get("unk_token")
    removed = {token for token, entry in added.items() if entry["special"] and token != unknown}
    matched = {token: entry for token, entry in added.items() if not entry["special"]}
    plain = {token: token_id for token, token_id in vocab.items() if token not in removed}
    plain |= {token: entry["id"] for token, entry in matched.items()}
    if unknown is not None and unknown not in plain:
        raise TokenizerError(f"{path}: model.unk_token {unknown!r} is not in the vocabulary")
    try:
        bpe = models.BPE(
            vocab=plain,
            merges=_read_merges(
                path, model, {token for token in vocab if token in removed or token == unknown}
            ),
            unk_token=unknown,
            fuse_unk=bool(model.get("fuse_unk")),
            byte_fallback=bool(model.get("byte_fallback")),
            ignore_merges=bool(model.get("ignore_merges")),
        )
        pipeline = _build_pipeline(data, bpe, matched)
        inner = None
        if any(step.get("prepend_scheme") == "first" for step in _steps(data.get("pre_tokenizer"))):
            inner = _build_pipeline(_without_prefix(data), bpe, matched)
    except Exception as error:  # the library raises bare Exception
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: {error}") from error
    _warn_of_missing_bytes(path, data, plain)
    return PipelineEncoder(pipeline, inner)


def _build_pipeline(data: _Json, bpe: models.BPE, matched: Mapping[str, _Json]) -> Pipeline:
    steps = {key: data.get(key) for key in ("normalizer", "pre_tokenizer")}
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    pipeline = Pipeline.from_str(json.dumps({"version": "1.0", "added_tokens": [], **steps, "model": empty}))
    pipeline.model = bpe
    pipeline.add_tokens(
        [
            MatchedToken(
                token, **{key: entry[key] for key in ("lstrip", "rstrip", "single_word", "normalized")}
            )
            for token, entry in matched.items()
        ]
    )
    return pipeline


def _without_prefix(data: _Json) -> _Json:
    """Return the pipeline for text that follows a token, where "first" means no space in front."""
    changed: _Json = json.loads(json.dumps({key: data.get(key) for key in ("normalizer", "pre_tokenizer")}))
    for step in _steps(changed["pre_tokenizer"]):
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return changed


def _read_merges(path: Path, model: _Json, unreachable: set[str]) -> list[tuple[str, str]]:
    entries = model.get("merges")
    if not isinstance(entries, list):
        raise TokenizerError(f"{path}: model.merges is no list")
    pairs = [tuple(entry.split(" ") if isinstance(entry, str) else _as_list(entry)) for entry in entries]
    for index, pair in enumerate(pairs):
        if len(pair) != 2 or not (pair[0] and pair[1] and type(pair[0]) is type(pair[1]) is str):
            shown = str(entries[index])[:80]
            raise TokenizerError(f"{path}: model.merges[{index}] is {shown!r}; two tokens are expected")
    merges: list[tuple[str, str]] = pairs
    if unreachable:
        merges = [(a, b) for a, b in merges if unreachable.isdisjoint((a, b, a + b))]
    return merges


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _warn_of_missing_bytes(path: Path, data: _Json, vocab: Mapping[str, int]) -> None:
    """Say so where the library would drop characters without a word, as Transformers does."""
    if not any(step.get("type") == "ByteLevel" for step in _steps(data.get("pre_tokenizer"))):
        return
    missing = [byte for byte, character in enumerate(BYTE_ALPHABET) if character not in vocab]
    if missing and data["model"].get("unk_token") is None:
        logger.warning("%s: no token for %d of the 256 bytes: they are dropped from text", path, len(missing))
