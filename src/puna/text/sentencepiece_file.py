"""Read SentencePiece's tokenizer.model (Llama 2), and encode the way SentencePiece does.

The merging is the library's: there pieces of equal score merge from the left, which no list of merges can
say. Pieces that a config calls special are taken out of the reach of plain text. Text after a token follows
Transformers' `legacy` flag: with it, every such text gets the space that SentencePiece puts in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import sentencepiece

from puna.errors import TokenizerError
from puna.text.sentencepiece_model import PieceType, SentencePieceModel, parse_model
from puna.text.tokenizer_config import HfTokenizerConfig, apply_config
from puna.text.vocabulary import BYTEWISE_ERRORS, TokenizerParts

_HIDDEN = (PieceType.CONTROL, PieceType.UNKNOWN)


def read_sentencepiece(path: Path, data: bytes, config: HfTokenizerConfig | None) -> TokenizerParts:
    """Read a SentencePiece BPE model, with the files beside it in a Hugging Face folder.

    Without a config (Meta's folders) BOS is added and every text after a token gets a space in front, as when
    each is encoded alone. Raises `TokenizerError` naming the file and the byte or piece.
    """
    model = parse_model(path, data)
    config = config or HfTokenizerConfig(legacy=True)
    model = replace(model, add_dummy_prefix=model.add_dummy_prefix and config.add_prefix_space)
    added = _added_tokens(path, model, config)
    model, specials = _hide_specials(model, added, config)
    parts = build_parts(
        path,
        model,
        special_tokens=specials,
        matched_tokens={token: token_id for token, token_id in added.items() if token not in specials},
        prefix_everywhere=config.legacy,
    )
    bos = specials.get(config.role_tokens.get("bos", ""), parts.bos_token_id)
    eos = specials.get(config.role_tokens.get("eos", ""), parts.eos_token_id)
    parts = replace(
        parts,
        prefix_ids=() if bos is None or config.add_bos is False else (bos,),
        suffix_ids=(eos,) if eos is not None and config.add_eos else (),
    )
    return apply_config(parts, config, path)


def build_parts(
    path: Path,
    model: SentencePieceModel,
    *,
    special_tokens: Mapping[str, int],
    matched_tokens: Mapping[str, int],
    prefix_everywhere: bool,
) -> TokenizerParts:
    """Build all that follows from the pieces; tokens with ids past the last piece are appended."""
    listed = {token_id: token for token, token_id in {**special_tokens, **matched_tokens}.items()}
    beyond = [listed[token_id] for token_id in sorted(listed) if token_id >= len(model.pieces)]
    return TokenizerParts(
        tokens=[piece.token for piece in model.pieces] + beyond,
        token_bytes=[piece.decoded for piece in model.pieces] + [token.encode() for token in beyond],
        encoder=SentencePieceEncoder(path, model, prefix_everywhere=prefix_everywhere),
        special_tokens=special_tokens,
        matched_tokens=matched_tokens,
        bos_token_id=_role(model.bos_id),
        eos_token_id=_role(model.eos_id),
        pad_token_id=_role(model.pad_id),
        unk_token_id=_role(model.unk_id),
        eos_token_ids=frozenset({model.eos_id} if model.eos_id >= 0 else ()),
        drops_leading_space=model.add_dummy_prefix,
        utf8_errors=BYTEWISE_ERRORS,
    )


def _role(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _added_tokens(path: Path, model: SentencePieceModel, config: HfTokenizerConfig) -> dict[str, int]:
    """Return the config's tokens that the model lacks, with their ids from the end of the pieces on."""
    known = {piece.token: token_id for token_id, piece in enumerate(model.pieces)}
    added: dict[str, int] = {}
    for token_id, token in sorted(config.added_tokens.items()):
        place = known.get(token.content, len(model.pieces) + len(added))
        if token_id != place:
            raise TokenizerError(
                f"{path}: {token.content!r} has the id {token_id} in the files beside it, not {place}"
            )
        if token.content not in known:
            added[token.content] = token_id
    for name in config.special_tokens:
        if name not in known and name not in added:
            added[name] = len(model.pieces) + len(added)
    return added


def _hide_specials(
    model: SentencePieceModel, added: Mapping[str, int], config: HfTokenizerConfig
) -> tuple[SentencePieceModel, dict[str, int]]:
    """Return the model with every special token out of reach of plain text, and those tokens."""
    named = {
        *config.special_tokens,
        *(token.content for token in config.added_tokens.values() if token.special),
    }
    pieces = [
        replace(piece, type=PieceType.CONTROL)
        if piece.token in named and piece.type not in _HIDDEN
        else piece
        for piece in model.pieces
    ]
    specials = {piece.token: token_id for token_id, piece in enumerate(pieces) if piece.type in _HIDDEN}
    specials |= {token: token_id for token, token_id in added.items() if token in named}
    return replace(model, pieces=tuple(pieces)), specials


class SentencePieceEncoder:
    """Encode plain text with the sentencepiece library."""

    def __init__(self, path: Path, model: SentencePieceModel, *, prefix_everywhere: bool) -> None:
        """Load the model; text after a token gets no space in front unless `prefix_everywhere`."""
        self._processor = self._inner = _load(path, model)
        if model.add_dummy_prefix and not prefix_everywhere:
            self._inner = _load(path, replace(model, add_dummy_prefix=False))

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Return the ids; about 0.2 s a megabyte whatever the text."""
        ids: list[int] = (self._processor if at_start else self._inner).encode(text)
        return ids


def _load(path: Path, model: SentencePieceModel) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model.to_bytes())
    except Exception as error:  # the library raises RuntimeError and OSError alike
        raise TokenizerError(f"{path}: SentencePiece refuses the model: {error}") from error
