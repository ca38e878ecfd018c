"""Hold a SentencePiece BPE model, and read and write the protocol buffer that it is stored as.

Only the fields that decide how text is cut are kept; their numbers are those of
`sentencepiece_model.proto`. GGUF vocabularies of kind "llama" become the same object. Knows no library.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from puna.errors import TokenizerError
from puna.text.token_bytes import byte_of
from puna.text.vocabulary import check_token

SPACE = b"\xe2\x96\x81"
"""U+2581, which stands for a space in pieces."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _SUFFIX_SPACES, _BYTE_FALLBACK = 3, 24, 35
_UNK, _BOS, _EOS, _PAD = 40, 41, 42, 43
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_BPE = 2

_MAX_FILE_BYTES = 1 << 26


class PieceType(IntEnum):
    """Number the kinds of pieces as SentencePiece and GGUF both do."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One entry of the vocabulary: its bytes, its score (higher merges first), its type."""

    text: bytes
    score: float
    type: PieceType

    @property
    def token(self) -> str:
        """Return the text as a string, U+FFFD for bytes that are not UTF-8."""
        return self.text.decode(errors="replace")

    @property
    def decoded(self) -> bytes:
        """Return what the piece writes: its byte, or its text with spaces."""
        if self.type is PieceType.BYTE and (byte := byte_of(self.token)) is not None:
            return byte
        return self.text.replace(SPACE, b" ")


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What decides how text is cut; ids are positions in `pieces`, -1 where there is none."""

    pieces: tuple[Piece, ...]
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""

    def to_bytes(self) -> bytes:
        """Serialise for the sentencepiece library."""
        ids = ((_UNK, self.unk_id), (_BOS, self.bos_id), (_EOS, self.eos_id), (_PAD, self.pad_id))
        trainer = _number(_MODEL_TYPE, _BPE) + _number(_BYTE_FALLBACK, self.byte_fallback)
        trainer += b"".join(_number(field, token_id) for field, token_id in ids)
        normalizer = _bytes(_CHARSMAP, self.charsmap) + _number(_DUMMY_PREFIX, self.add_dummy_prefix)
        normalizer += _number(_REMOVE_SPACES, self.remove_extra_whitespaces)
        pieces = (_bytes(_PIECES, _piece_record(piece)) for piece in self.pieces)
        return b"".join([*pieces, _bytes(_TRAINER, trainer), _bytes(_NORMALIZER, normalizer)])


def _piece_record(piece: Piece) -> bytes:
    score = bytes([_PIECE_SCORE << 3 | _FIXED32]) + struct.pack("<f", piece.score)
    return _bytes(_PIECE_TEXT, piece.text) + score + _number(_PIECE_TYPE, piece.type)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value


def parse_model(path: Path, data: bytes) -> SentencePieceModel:
    """Read a serialised model; raise `TokenizerError` naming the damaged byte, or what no Llama has."""
    if len(data) > _MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: {len(data)} bytes; a tokenizer has at most {_MAX_FILE_BYTES}")
    root = _Message(path, data, 0, len(data))
    trainer, normalizer = root.last_message(_TRAINER), root.last_message(_NORMALIZER)
    if (kind := trainer.number(_MODEL_TYPE, 1)) != _BPE:
        raise TokenizerError(f"{path}: a SentencePiece model of type {kind}; every Llama has BPE (2)")
    if trainer.number(_SUFFIX_SPACES, 0) or not normalizer.number(_ESCAPE_SPACES, 1):
        raise TokenizerError(f"{path}: spaces as suffixes, or not escaped: no Llama has that")
    model = SentencePieceModel(
        pieces=tuple(
            _parse_piece(path, index, message) for index, message in enumerate(root.messages(_PIECES))
        ),
        unk_id=trainer.number(_UNK, 0),
        bos_id=trainer.number(_BOS, 1),
        eos_id=trainer.number(_EOS, 2),
        pad_id=trainer.number(_PAD, -1),
        byte_fallback=bool(trainer.number(_BYTE_FALLBACK, 0)),
        add_dummy_prefix=bool(normalizer.number(_DUMMY_PREFIX, 1)),
        remove_extra_whitespaces=bool(normalizer.number(_REMOVE_SPACES, 1)),
        charsmap=normalizer.bytes(_CHARSMAP),
    )
    check_pieces(path, model.pieces)
    return model


def _parse_piece(path: Path, index: int, message: _Message) -> Piece:
    kind = message.number(_PIECE_TYPE, 1)
    if kind not in set(PieceType):
        raise TokenizerError(f"{path}: piece {index} is of the unknown type {kind}")
    (score,) = struct.unpack("<f", message.bytes(_PIECE_SCORE) or bytes(4))
    return Piece(text=message.bytes(_PIECE_TEXT), score=score, type=PieceType(kind))


def check_pieces(path: Path, pieces: tuple[Piece, ...]) -> None:
    """Raise `TokenizerError` for no pieces at all, an empty or repeated one, or a score that is no number."""
    if not pieces:
        raise TokenizerError(f"{path}: the vocabulary is empty")
    first: dict[bytes, int] = {}
    for index, piece in enumerate(pieces):
        check_token(piece.text, f"{path}: piece {index}")
        if first.setdefault(piece.text, index) != index:
            raise TokenizerError(f"{path}: piece {index} repeats piece {first[piece.text]}, {piece.token!r}")
        if not math.isfinite(piece.score):
            raise TokenizerError(f"{path}: the score of piece {index} is {piece.score}")


class _Message:
    """One protocol buffer message: the last value of each field, and all of those that are messages."""

    def __init__(self, path: Path, data: bytes, start: int, stop: int) -> None:
        self._path = path
        self._data = data
        self._fields: dict[int, list[tuple[int, int, int]]] = {}  # field: (wire type, start, stop or value)
        while start < stop:
            start = self._read_field(start, stop)

    def _fail(self, offset: int, reason: str) -> TokenizerError:
        return TokenizerError(
            f"{self._path}: neither a SentencePiece model nor a tiktoken file: {reason} at byte {offset}"
        )

    def _read_varint(self, offset: int, stop: int) -> tuple[int, int]:
        value = 0
        for position in range(offset, min(offset + 10, stop)):
            byte = self._data[position]
            value |= (byte & 0x7F) << 7 * (position - offset)
            if byte < 0x80:
                return value, position + 1
        raise self._fail(offset, "a number that does not end")

    def _read_field(self, offset: int, stop: int) -> int:
        key, start = self._read_varint(offset, stop)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, end = self._read_varint(start, stop)
            self._fields.setdefault(field, []).append((wire, value, end))
            return end
        if wire == _BYTES:
            length, start = self._read_varint(start, stop)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise self._fail(offset, f"the unknown wire type {wire}")
        if length > stop - start:
            raise self._fail(offset, f"a field of {length} bytes where {stop - start} are left")
        self._fields.setdefault(field, []).append((wire, start, start + length))
        return start + length

    def number(self, field: int, default: int) -> int:
        """Return the signed integer in a field."""
        if field not in self._fields:
            return default
        wire, value, _ = self._fields[field][-1]
        if wire != _VARINT:
            raise self._fail(value, f"field {field} is no integer")
        return value - (1 << 64) if value >= 1 << 63 else value

    def bytes(self, field: int) -> bytes:
        """Return the bytes in a field, or the four of a float; empty where it is absent."""
        if field not in self._fields:
            return b""
        wire, start, stop = self._fields[field][-1]
        if wire not in (_BYTES, _FIXED32):
            raise self._fail(stop, f"field {field} is no string")
        return self._data[start:stop]

    def messages(self, field: int) -> Iterator[_Message]:
        """Yield the messages in a field."""
        for wire, start, stop in self._fields.get(field, ()):
            if wire != _BYTES:
                raise self._fail(stop, f"field {field} is no message")
            yield _Message(self._path, self._data, start, stop)

    def last_message(self, field: int) -> _Message:
        """Return the last message in a field, or an empty one."""
        found = list(self.messages(field))
        return found[-1] if found else _Message(self._path, b"", 0, 0)
