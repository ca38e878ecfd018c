"""Read the header of a GGUF file: its metadata and where its tensors lie.

Knows the container only, neither torch nor what a key means, so the tokenizers read vocabularies through it
too. The file is not trusted: every count and length is compared with the bytes that are left before anything
is allocated, in Python's unbounded integers, and every error names the key or tensor and the byte. The rules
are those of the GGUF specification (version 2 and 3, ggml `docs/gguf.md`) and of llama.cpp's loader, with two
more: a boolean is 0 or 1, and a key has at most 65,535 bytes. Unlike llama.cpp, gaps between tensors and any
order of them are allowed.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np

from puna.errors import CheckpointError

Value: TypeAlias = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
TOKENS_KEY = "tokenizer.ggml.tokens"

_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_ARRAY = 1 << 24
_MAX_ALIGNMENT = 1 << 24
_MAX_KEY_BYTES = (1 << 16) - 1
_MAX_NAME_BYTES = 63
_MIN_KEY_RECORD = 8 + 1 + 4 + 1
_MIN_TENSOR_RECORD = 8 + 1 + 4 + 8 + 4 + 8

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_UINT32 = 4


class GGMLType(IntEnum):
    """Name ggml's tensor types by their ids, each with its block: elements in it, and bytes that it takes."""

    block_size: int
    type_size: int

    def __new__(cls, value: int, block_size: int, type_size: int) -> GGMLType:
        member = int.__new__(cls, value)
        member._value_ = value
        member.block_size = block_size
        member.type_size = type_size
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 36
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18
    Q2_0 = 42, 64, 18


_TYPES = {int(kind): kind for kind in GGMLType}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Say where a tensor lies: torch's order of dimensions, bytes counted from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Hold what stands before the tensor data; `vocab_size` is how many tokens it lists, None if no list."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    vocab_size: int | None
    file_bytes: int


def read_metadata(path: Path | str) -> dict[str, Value]:
    """Return the keys and values of a GGUF file, arrays as lists; vocabulary-only files have them too.

    Strings in arrays that are not UTF-8 (tokens may be raw bytes) carry those bytes as surrogate escapes.
    Raises CheckpointError naming the file, the key and the byte.
    """
    return dict(read_header(path).metadata)


def read_header(path: Path | str, *, vocabulary: bool = True) -> GgufHeader:
    """Parse and check the header of the GGUF file at `path`, in one pass, without touching tensor data.

    With `vocabulary` false the arrays under `tokenizer.` are checked and left out of the metadata.
    Raises CheckpointError naming the file, the key or tensor, and the byte.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(path, "not a regular file")
        if path.stat().st_size == 0:  # mmap refuses to map nothing
            raise CheckpointError(path, "the file is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _HeaderReader(path, content, vocabulary).read()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error


class _HeaderReader:
    """Walk through the header; `place` says what is being read, for the errors."""

    def __init__(self, path: Path, content: mmap.mmap, vocabulary: bool) -> None:
        self.path = path
        self.content = content
        self.vocabulary = vocabulary
        self.end = len(content)
        self.at = 0
        self.place = "the header"
        self.vocab_size: int | None = None

    def read(self) -> GgufHeader:
        version = self._version()
        num_tensors = self._count("tensors", _MAX_TENSORS)
        num_keys = self._count("keys", _MAX_KEYS)
        self._fits(num_keys * _MIN_KEY_RECORD + num_tensors * _MIN_TENSOR_RECORD, "keys and tensors")
        metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            self._key_value(metadata)
        alignment = self._alignment(metadata)
        relative: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            self._tensor_info(relative, alignment)
        tensors = self._placed(relative, alignment)
        return GgufHeader(
            path=self.path,
            version=version,
            metadata=metadata,
            tensors=tensors,
            vocab_size=self.vocab_size,
            file_bytes=self.end,
        )

    def _fail(self, what: str, at: int | None = None) -> NoReturn:
        raise CheckpointError(self.path, f"{self.place}: {what} at byte {self.at if at is None else at}")

    def _fits(self, size: int, what: str) -> None:
        left = self.end - self.at
        if size > left:
            self._fail(f"truncated or damaged: {what} take {size} bytes, {left} are left")

    def _version(self) -> int:
        magic = self.content[:4]
        if magic != MAGIC:
            self._fail(f"not a GGUF file (it starts with {magic!r})")
        self.at = 4
        version = self._u32("the version")
        if version in (2, 3):
            return version
        if version and version & 0xFFFF == 0:
            self._fail("a big-endian GGUF file, which is not supported; convert it to little-endian", 4)
        self._fail(f"GGUF version {version} is not supported (only 2 and 3)", 4)

    def _u32(self, what: str) -> int:
        self._fits(4, what)
        (value,) = _U32.unpack_from(self.content, self.at)
        self.at += 4
        return int(value)

    def _u64(self, what: str) -> int:
        self._fits(8, what)
        (value,) = _U64.unpack_from(self.content, self.at)
        self.at += 8
        return int(value)

    def _count(self, what: str, limit: int) -> int:
        at = self.at
        count = self._u64(f"the number of {what}")
        if count > limit:
            self._fail(f"{count} {what}, more than the {limit} that a file may have", at)
        return count

    def _string_bytes(self, what: str, limit: int | None = None) -> bytes:
        at = self.at
        size = self._u64(f"the length of {what}")
        if limit is not None and not 1 <= size <= limit:
            self._fail(f"{what} is {size} bytes long (1 to {limit} are allowed)", at)
        self._fits(size, what)
        self.at += size
        return self.content[self.at - size : self.at]

    def _name(self, what: str, limit: int) -> str:
        at = self.at
        name = self._string_bytes(what, limit)
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what} {name[:80]!r} is not UTF-8", at)

    def _key_value(self, metadata: dict[str, Value]) -> None:
        at = self.at
        self.place = "the header"
        key = self._name("a key", _MAX_KEY_BYTES)
        self.place = f"key {_shown(key)}"
        if key in metadata:
            self._fail("written twice", at)
        kind = self._u32("the type of the value")
        if key == "general.alignment" and kind != _UINT32:
            self._fail(f"its type is {kind}, not {_UINT32} (uint32)", self.at - 4)
        if kind == _ARRAY:
            self._array(key, metadata)
        elif kind == _STRING:
            metadata[key] = self._string_bytes("the string").decode("utf-8", "replace")
        else:
            metadata[key] = self._numbers(kind, 1)[0]

    def _array(self, key: str, metadata: dict[str, Value]) -> None:
        kind = self._u32("the type of the elements")
        if kind == _ARRAY:
            self._fail("nested arrays are not supported", self.at - 4)
        count = self._count("elements", _MAX_ARRAY)
        wanted = self.vocabulary or not key.startswith("tokenizer.")
        values = self._strings(count, wanted) if kind == _STRING else self._numbers(kind, count)
        if key == TOKENS_KEY:
            self.vocab_size = count
        if wanted:
            metadata[key] = values

    def _numbers(self, kind: int, count: int) -> list[bool] | list[int] | list[float]:
        dtype = _NUMBERS.get(kind)
        if dtype is None:
            self._fail(f"unknown value type {kind}", self.at - 4)
        self._fits(count * dtype.itemsize, "the values")
        # A copy: a view would keep the map from being closed.
        values = np.frombuffer(self.content[self.at : self.at + count * dtype.itemsize], dtype)
        if kind == _BOOL:
            if count and values.max() > 1:
                self._fail(f"the boolean {values.max()} is neither 0 nor 1")
            values = values.astype(np.bool_)
        self.at += count * dtype.itemsize
        numbers: list[bool] | list[int] | list[float] = values.tolist()
        return numbers

    def _strings(self, count: int, wanted: bool) -> list[str]:
        """Read or skip `count` strings; a plain loop over locals, since vocabularies are long."""
        self._fits(count * 8, "the strings")
        content, at, end, unpack = self.content, self.at, self.end, _U64.unpack_from
        strings: list[str] = []
        append = strings.append
        for index in range(count):
            if end - at < 8:
                self._fail(f"truncated or damaged: string {index} of {count} starts past the end", at)
            start = at + 8
            at = start + unpack(content, at)[0]
            if at > end:
                self._fail(
                    f"string {index} of {count} is {at - start} bytes long, more than are left", start - 8
                )
            if not wanted:
                continue
            try:
                append(content[start:at].decode())
            except UnicodeDecodeError:
                append(content[start:at].decode("utf-8", "surrogateescape"))
        self.at = at
        return strings

    def _alignment(self, metadata: Mapping[str, Value]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        power_of_two = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
        if not isinstance(alignment, int) or not power_of_two or alignment > _MAX_ALIGNMENT:
            self.place = "key 'general.alignment'"
            self._fail(f"{alignment} is not a power of two up to {_MAX_ALIGNMENT}; read")
        return alignment

    def _tensor_info(self, tensors: dict[str, TensorInfo], alignment: int) -> None:
        at = self.at
        self.place = "the header"
        name = self._name("a tensor name", _MAX_NAME_BYTES)
        self.place = f"tensor {_shown(name)}"
        if name in tensors:
            self._fail("listed twice", at)
        num_dims = self._u32("the number of dimensions")
        if not 1 <= num_dims <= 4:
            self._fail(f"{num_dims} dimensions (1 to 4 are allowed)", self.at - 4)
        dims = tuple(self._u64("the dimensions") for _ in range(num_dims))
        if 0 in dims or prod(dims) >= 1 << 63:
            self._fail(f"impossible dimensions {list(dims)}", self.at - 8 * num_dims)
        kind = self._type(dims[0])
        offset = self._u64("the offset")
        if offset % alignment:
            self._fail(f"offset {offset} is not a multiple of the alignment {alignment}", self.at - 8)
        num_bytes = prod(dims) // kind.block_size * kind.type_size
        tensors[name] = TensorInfo(name=name, shape=dims[::-1], type=kind, offset=offset, num_bytes=num_bytes)

    def _type(self, row_length: int) -> GGMLType:
        number = self._u32("the type")
        kind = _TYPES.get(number)
        if kind is None:
            self._fail(f"unknown or withdrawn tensor type {number}", self.at - 4)
        if row_length % kind.block_size:
            self._fail(f"rows of {row_length} elements are not whole {kind.name} blocks of {kind.block_size}")
        return kind

    def _placed(self, relative: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """Count offsets from the start of the file; check that all lie inside it and none overlap.

        Sizes and offsets are unbounded integers, so together these hold the sum of the padded sizes too.
        """
        start = -(-self.at // alignment) * alignment
        free = start
        placed = {}
        for info in sorted(relative.values(), key=lambda info: (info.offset, info.name)):
            self.place = f"tensor {_shown(info.name)}"
            offset = start + info.offset
            if offset < free:
                self._fail("overlaps the tensor before it", offset)
            if offset + info.num_bytes > self.end:
                self._fail(
                    f"truncated or damaged: {info.num_bytes} bytes, the file ends at {self.end}; data", offset
                )
            free = offset + info.num_bytes
            placed[info.name] = TensorInfo(
                name=info.name, shape=info.shape, type=info.type, offset=offset, num_bytes=info.num_bytes
            )
        return {name: placed[name] for name in relative}


def _shown(name: str) -> str:
    """Return a name for an error: quoted, never longer than a line."""
    return repr(name if len(name) <= 100 else name[:100] + "...")


_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


def is_gguf(path: Path) -> bool:
    """Say whether a file is a GGUF, by its name or its first bytes (Ollama's blobs have no suffix)."""
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def list_ggufs(folder: Path) -> list[Path]:
    """Return the GGUF models of a folder, the first file of each split one; projectors are no models."""
    paths = sorted(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))
    parts = {path: _PART.search(path.name) for path in paths}
    return [p for p, part in parts.items() if part is None or int(part[1]) == 1] or paths[:1]
