"""Write a GGUF file: metadata, then tensors one at a time, as llama.cpp and its `gguf` package read it.

Version 3, little-endian, aligned to 32 bytes, tensors without gaps in the order in which they were announced
(llama.cpp refuses anything else); they may come in any order. The file appears whole or not at all: it is
written beside its place, made safe on disk, and renamed. Knows the container, not what keys mean. Rules: ggml
`docs/gguf.md`.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import torch
from torch import Tensor

from puna.errors import CheckpointError
from puna.gguf_header import DEFAULT_ALIGNMENT, MAGIC, GGMLType
from puna.weights.packed_matrix import QuantTensor

_MAX_NAME_BYTES = 63
_BOOL, _STRING, _ARRAY = 7, 8, 9
_UINT32, _INT32, _FLOAT32, _UINT64, _INT64 = 4, 5, 6, 10, 11
_FLOATS = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """Announce a tensor: its name, its shape in torch's order, and the type that it is stored in."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def num_bytes(self) -> int:
        """Return the size in the file without padding."""
        return prod(self.shape) // self.type.block_size * self.type.type_size


class GgufWriter:
    """A GGUF file being written: `with GgufWriter(...) as file`, then `write` every tensor once.

    Integers in the metadata become uint32 (int32 where negative, 64 bits where needed) and floats float32,
    as llama.cpp wants them. Strings may hold surrogate escapes, which are written as their bytes.
    """

    def __init__(
        self, path: Path | str, metadata: Mapping[str, Value], tensors: Iterable[PlannedTensor]
    ) -> None:
        """Check the plan; raises ValueError for a doubled or long name, a shape that is no whole blocks."""
        self.path = Path(path)
        self._part = self.path.with_name(f".{self.path.name}.part")
        plan = list(tensors)
        self._missing = {tensor.name: tensor for tensor in plan}
        if len(self._missing) < len(plan):
            raise ValueError("two tensors have the same name")
        for tensor in plan:
            _check(tensor)
        self._offsets, self._size = _offsets(plan)
        header = _header(metadata, plan, self._offsets)
        self._header = header + bytes(-len(header) % DEFAULT_ALIGNMENT)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Open the file beside its place. Raises CheckpointError if that cannot be done."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")
        except OSError as error:
            raise CheckpointError(self.path, f"cannot be written: {error.strerror}") from error
        try:
            self._file.write(self._header)
            self._file.truncate(len(self._header) + self._size)
        except OSError as error:
            self._drop()
            raise CheckpointError(self.path, f"cannot be written: {error.strerror}") from error
        return self

    def write(self, name: str, value: Tensor | QuantTensor) -> None:
        """Put a tensor in its place; floats are stored in the type that was announced.

        Raises ValueError where it is not what was announced, CheckpointError for a full disk.
        """
        assert self._file is not None
        if name not in self._missing:
            raise ValueError(f"{name} was not announced, or is there already")
        tensor = self._missing[name]
        fits = value.type is tensor.type if isinstance(value, QuantTensor) else tensor.type in _FLOATS
        if tuple(value.shape) != tensor.shape or not fits:
            raise ValueError(f"{name} was announced as {tensor.type.name} {list(tensor.shape)}")
        data = value.data if isinstance(value, QuantTensor) else value.to(_FLOATS[tensor.type])
        flat = data.detach().cpu().contiguous().flatten().view(torch.uint8)
        try:
            self._file.seek(len(self._header) + self._offsets[name])
            self._file.write(flat.numpy().data)
        except OSError as error:
            raise CheckpointError(self.path, f"cannot be written: {error.strerror}") from error
        del self._missing[name]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the file in its place, or remove what there is of it after an error or with tensors missing."""
        assert self._file is not None
        try:
            if kind is None and self._missing:
                raise ValueError(f"{next(iter(self._missing))} was announced and not written")
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._part.replace(self.path)
                _sync_folder(self.path.parent)
        except OSError as problem:
            raise CheckpointError(self.path, f"cannot be written: {problem.strerror}") from problem
        finally:
            self._drop()

    def _drop(self) -> None:
        """Remove what lies beside the file's place, if it is still there."""
        assert self._file is not None
        with contextlib.suppress(OSError):  # there may be no room for what is buffered, which is dropped too
            self._file.close()
        self._part.unlink(missing_ok=True)


def write_gguf(path: Path | str, metadata: Mapping[str, Value], tensors: Mapping[str, Tensor]) -> None:
    """Write float tensors that are all in memory, each in its own dtype."""
    kinds = {dtype: kind for kind, dtype in _FLOATS.items()}
    plan = [
        PlannedTensor(name=name, shape=tuple(tensor.shape), type=kinds[tensor.dtype])
        for name, tensor in tensors.items()
    ]
    with GgufWriter(path, metadata, plan) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def _check(tensor: PlannedTensor) -> None:
    if not 1 <= len(tensor.name.encode()) <= _MAX_NAME_BYTES:
        raise ValueError(f"a tensor name has 1 to {_MAX_NAME_BYTES} bytes: {tensor.name!r}")
    if not 1 <= len(tensor.shape) <= 4 or 0 in tensor.shape:
        raise ValueError(f"{tensor.name} has the shape {list(tensor.shape)}: 1 to 4 dimensions are needed")
    if tensor.shape[-1] % tensor.type.block_size:
        raise ValueError(f"{tensor.name}: rows of {tensor.shape[-1]} are no whole {tensor.type.name} blocks")


def _offsets(plan: Sequence[PlannedTensor]) -> tuple[dict[str, int], int]:
    """Return where each tensor starts behind the header, and how long all are with their padding."""
    offsets: dict[str, int] = {}
    size = 0
    for tensor in plan:
        offsets[tensor.name] = size
        size += -(-tensor.num_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    return offsets, size


def _header(
    metadata: Mapping[str, Value], plan: Sequence[PlannedTensor], offsets: Mapping[str, int]
) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(plan), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _typed(key, value)]
    for tensor in plan:
        dims = tensor.shape[::-1]
        parts += [_string(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", int(tensor.type), offsets[tensor.name]))
    return b"".join(parts)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _typed(key: str, value: Value) -> bytes:
    """Return the type of a value and the value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool | int | float):
        kind, data = _numbers([value])
        return struct.pack("<I", kind) + data
    items = list(value)
    head = struct.pack("<I", _ARRAY)
    if all(isinstance(item, str) for item in items) and items:
        strings = b"".join(_string(str(item)) for item in items)
        return head + struct.pack("<IQ", _STRING, len(items)) + strings
    if not all(isinstance(item, bool | int | float) for item in items):
        raise ValueError(f"key {key!r} mixes strings with other values")
    kind, data = _numbers(items, in_array=True)
    return head + struct.pack("<IQ", kind, len(items)) + data


def _numbers(values: Sequence[object], *, in_array: bool = False) -> tuple[int, bytes]:
    """Return the type that all the numbers fit in, and their bytes; arrays of integers are signed."""
    if all(isinstance(value, bool) for value in values) and values:
        return _BOOL, np.array(values, dtype=np.uint8).tobytes()
    if any(isinstance(value, float) for value in values):
        return _FLOAT32, np.array(values, dtype="<f4").tobytes()
    numbers = [int(value) for value in values if isinstance(value, int)]
    low, high = min(numbers, default=0), max(numbers, default=0)
    if not in_array and low >= 0 and high < 1 << 32:
        return _UINT32, np.array(numbers, dtype="<u4").tobytes()
    if low >= -(1 << 31) and high < 1 << 31:
        return _INT32, np.array(numbers, dtype="<i4").tobytes()
    if low >= 0:
        return _UINT64, np.array(numbers, dtype="<u8").tobytes()
    return _INT64, np.array(numbers, dtype="<i8").tobytes()


def _sync_folder(folder: Path) -> None:
    """Make the new name safe on disk too, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
