"""Encode text to token ids and decode it back, for every vocabulary a Llama comes with.

`load_tokenizer` finds the file (tokenizer.json, Meta's or SentencePiece's tokenizer.model, a .gguf file);
`Tokenizer` is the one class behind all of them. Text is plain by default: the string of a special token in it
is encoded like any other string, so what a user writes cannot end a turn or open another. Ids equal those of
tiktoken, SentencePiece and Transformers for the same files. Knows no chat format and no model.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from puna.errors import ModelNotFoundError, ParameterError, TokenizerError
from puna.gguf_header import is_gguf, list_ggufs, read_metadata
from puna.text.gguf_vocab import read_gguf_vocab
from puna.text.sentencepiece_file import read_sentencepiece
from puna.text.special_split import SpecialSplitter
from puna.text.streaming import StreamDecoder
from puna.text.tiktoken_file import read_tiktoken
from puna.text.tokenizer_config import read_tokenizer_config
from puna.text.tokenizer_json import read_tokenizer_json
from puna.text.vocabulary import TokenizerParts, check_parts

_SENTENCEPIECE_START = b"\n"  # field 1, a piece, as a length-delimited record


class Tokenizer:
    """Encode and decode; every id is in range(vocab_size)."""

    def __init__(self, parts: TokenizerParts, path: Path) -> None:
        """Take what a reader found in the file at `path`."""
        self.path = path
        self.bos_token_id = parts.bos_token_id
        self.eos_token_id = parts.eos_token_id
        self.eos_token_ids = parts.eos_token_ids  # every id that ends a turn
        self.pad_token_id = parts.pad_token_id
        self.unk_token_id = parts.unk_token_id
        self.special_tokens = dict(parts.special_tokens)
        self.chat_templates = dict(parts.chat_templates)
        self._parts = check_parts(parts, path)
        self._special_ids = frozenset(self.special_tokens.values())
        self._matched = SpecialSplitter(parts.matched_tokens)
        self._specials = SpecialSplitter(
            {**parts.matched_tokens, **parts.special_tokens},
            strips_left=parts.strips_left,
            strips_right=parts.strips_right,
        )

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, vocab_size={self.vocab_size})"

    @property
    def vocab_size(self) -> int:
        """Count the ids, special tokens included."""
        return len(self._parts.tokens)

    @property
    def add_bos(self) -> bool:
        """Say whether `encode` begins with BOS by default."""
        return self.bos_token_id is not None and self._parts.prefix_ids[:1] == (self.bos_token_id,)

    @property
    def chat_template(self) -> str | None:
        """Return the default template found beside the vocabulary; `chat_templates` holds it as "default"."""
        return self.chat_templates.get("default")

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of a text, about 1 s a megabyte whatever the text.

        `add_special_tokens` puts in front and behind what the vocabulary asks for (BOS for every Llama).
        `parse_special` turns the strings of special tokens into their ids: for trusted text only. Raises
        `ParameterError` naming the position of a lone surrogate.
        """
        return self.encode_parts(
            self.split_special(text) if parse_special else [text], add_special_tokens=add_special_tokens
        )

    def split_special(self, text: str) -> list[str | int]:
        """Cut a trusted text into plain parts and the ids of the special tokens in it, for `encode_parts`."""
        return list(self._specials.split(text))

    def encode_parts(self, parts: Iterable[str | int], *, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of one prompt made of plain texts and token ids.

        Texts that follow one another are joined before they are encoded, so that where template and content
        meet makes no difference. Raises `ParameterError` for an id outside the vocabulary.
        """
        ids: list[int] = []
        plain: list[str] = []
        at_start = True
        for part in (*parts, None):
            if isinstance(part, str):
                plain.append(part)
                continue
            if text := "".join(plain):
                ids += self._encode_plain(text, at_start=at_start)
            plain.clear()
            at_start = False
            if part is not None:
                self.token_bytes(part)  # raises for an id outside the vocabulary
                ids.append(part)
        if add_special_tokens:
            return [*self._parts.prefix_ids, *ids, *self._parts.suffix_ids]
        return ids

    def _encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ParameterError(
                f"text: character {error.start} is U+{ord(text[error.start]):04X}, half of a surrogate pair"
            ) from None
        ids: list[int] = []
        for part in self._matched.split(text):
            ids += [part] if isinstance(part, int) else self._parts.encoder.encode(part, at_start=at_start)
            at_start = False
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids; what is not UTF-8 becomes U+FFFD.

        Equals what `stream` gives for them. Raises `ParameterError` for an id outside the vocabulary.
        """
        skipped = self._special_ids if skip_special_tokens else frozenset()
        numbers = map(operator.index, ids)
        data = b"".join([self.token_bytes(token_id) for token_id in numbers if token_id not in skipped])
        if self._parts.drops_leading_space:
            data = data.removeprefix(b" ")
        return data.decode(errors=self._parts.utf8_errors)

    def stream(self, *, skip_special_tokens: bool = True, continues: bool = False) -> StreamDecoder:
        """Return a decoder for ids that come one by one.

        With `continues` the text goes on from an earlier one: the space that a SentencePiece vocabulary puts
        in front of its first word is kept.
        """
        return StreamDecoder(
            self.token_bytes,
            skipped_ids=self._special_ids if skip_special_tokens else frozenset(),
            drops_leading_space=self._parts.drops_leading_space and not continues,
            utf8_errors=self._parts.utf8_errors,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token writes; those of a special token are its name."""
        if not 0 <= token_id < self.vocab_size:
            raise ParameterError(f"token id {token_id} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        return self._parts.token_bytes[token_id]

    def id_to_token(self, token_id: int) -> str:
        """Return the token as the vocabulary file spells it."""
        self.token_bytes(token_id)
        return self._parts.tokens[token_id]

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token spelled as in the vocabulary file, or None."""
        return self._ids.get(token)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: token_id for token_id, token in enumerate(self._parts.tokens)}


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load the tokenizer of a model folder in any format, of a .gguf file, or from a tokenizer file.

    In a folder tokenizer.json comes before tokenizer.model, and both before .gguf files. Raises
    `ModelNotFoundError` when there is none and `TokenizerError` for one that cannot be used.
    """
    file = _find_file(Path(path))
    try:
        return Tokenizer(_read(file), file)
    except RecursionError:
        raise TokenizerError(f"{file}: nested too deeply") from None


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelNotFoundError(f"{path}: no such file or folder")
    candidates = [path / "tokenizer.json", path / "tokenizer.model"]
    if (path / "params.json").exists():  # Meta's Llama 2 download keeps one tokenizer for all sizes
        candidates.append(path.parent / "tokenizer.model")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    return _find_gguf(path)


def _find_gguf(folder: Path) -> Path:
    first = list_ggufs(folder)
    if not first:
        raise ModelNotFoundError(
            f"{folder}: no tokenizer.json, no tokenizer.model and no .gguf file in this folder"
        )
    if len(first) > 1:
        raise ModelNotFoundError(
            f"{folder}: several .gguf files, name one of them: {', '.join(f.name for f in first)}"
        )
    return first[0]


def _read(path: Path) -> TokenizerParts:
    if is_gguf(path):
        return read_gguf_vocab(path, read_metadata(path))
    try:
        if path.suffix == ".json":
            return read_tokenizer_json(path, read_tokenizer_config(path.parent))
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    config = read_tokenizer_config(path.parent) if _has_config(path.parent) else None
    if data.startswith(_SENTENCEPIECE_START):
        return read_sentencepiece(path, data, config)
    return read_tiktoken(path, data, config)


def _has_config(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer_config.json", "config.json"))
