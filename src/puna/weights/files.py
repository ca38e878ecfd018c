"""Read the files that checkpoints are made of: JSON, safetensors, and the zip archives of `torch.save`.

A `TensorFile` knows where each tensor lies and reads it straight into fresh memory: nothing is memory-mapped,
so a load needs its tensors and no more, and a file cut short under us is an error and not a signal. All sizes
are checked against the file before anything of that size is allocated. Pickles are only ever opened here, by
torch's weights-only loader, after a look at every name that they ask for.

Formats: the safetensors format page (8-byte length, JSON, bytes without holes), torch 2.13's serialization.
It does not know which model the tensors belong to.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import CheckpointError

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_MAX_TENSORS = 100_000  # Maverick with split experts has 19,000
_MAX_PICKLE = 64 << 20  # bytes; the pickle of a 405B shard has less than one
_MAX_LISTED = 20
_PART = 32 << 20  # bytes that one thread reads at a time; the time goes into copying and fresh pages
_THREADS = min(4, os.cpu_count() or 1)

_SAFETENSORS_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64,
    "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_FLOAT_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

# All that the pickle of a plain state dict asks for; `_io.BytesIO` is the `_extra_state` of Llama 4's files.
_PICKLE_NAMES = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
        "torch.nn.parameter Parameter",
        "torch Size",
        "_io BytesIO",
        "_codecs encode",
    }
)
_STORAGE_OR_DTYPE = re.compile(r"torch(\.storage)? [A-Z]\w*Storage|torch (bfloat16|float\w+|u?int\d+)")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in its file: `offset` in bytes, `strides` in elements (None: contiguous)."""

    dtype: torch.dtype | None  # None: not a floating point type that weights are computed in
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The tensors of one file by name, and `others`: entries of a pickle that are no tensors."""

    path: Path
    tensors: dict[str, StoredTensor]
    others: tuple[str, ...] = field(default=())

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """Read a tensor into fresh memory, or into `out`, contiguous and of its dtype and shape.

        Raises CheckpointError where the file ends early.
        """
        stored = self.tensors[name]
        if stored.dtype is None:
            raise CheckpointError(self.path, f"{name} is stored as {stored.dtype_name}, not as plain floats")
        if stored.strides is not None:
            return self._read_strided(name, stored, out)
        if out is None:
            out = torch.empty(stored.shape, dtype=stored.dtype)
        self._fill(name, stored, out)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a tensor into fresh memory; raises as `read` does."""
        stored = self.tensors[name]
        if stored.strides is not None or stored.dtype is None:
            return self.read(name)[start:stop].clone()
        row_bytes = stored.num_bytes // max(stored.shape[0], 1)
        stop = min(stop, stored.shape[0])
        rows = replace(
            stored,
            shape=(stop - start, *stored.shape[1:]),
            offset=stored.offset + start * row_bytes,
            num_bytes=(stop - start) * row_bytes,
        )
        out = torch.empty(rows.shape, dtype=stored.dtype)
        self._fill(name, rows, out)
        return out

    def read_bytes(self, name: str) -> Tensor:
        """Read the bytes of a contiguous tensor of any type, uint8 (num_bytes,); raises as `read` does."""
        stored = self.tensors[name]
        if stored.strides is not None:
            raise CheckpointError(self.path, f"{name} is not contiguous")
        out = torch.empty(stored.num_bytes, dtype=torch.uint8)
        self._fill(name, stored, out)
        return out

    def _read_strided(self, name: str, stored: StoredTensor, out: Tensor | None) -> Tensor:
        assert stored.dtype is not None and stored.strides is not None
        span = torch.empty(stored.num_bytes // stored.dtype.itemsize, dtype=stored.dtype)
        self._fill(name, stored, span)
        view = span.as_strided(stored.shape, stored.strides)
        return view.contiguous() if out is None else out.copy_(view)

    def _fill(self, name: str, stored: StoredTensor, out: Tensor) -> None:
        assert out.is_contiguous() and out.numel() * out.element_size() == stored.num_bytes
        if not stored.num_bytes:
            return
        memory = out.reshape(-1).view(torch.uint8).numpy().data
        starts = range(0, stored.num_bytes, _PART)

        def read(start: int) -> None:
            self._read_part(name, memory[start : start + _PART], stored.offset + start)

        if len(starts) == 1:
            read(0)
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(read, starts):  # raises what a part raised
                pass

    def _read_part(self, name: str, rest: memoryview, offset: int) -> None:
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(offset)
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise CheckpointError(self.path, f"the file ends inside {name}")
                    rest = rest[count:]
        except OSError as error:
            raise CheckpointError(self.path, f"cannot read {name}: {error.strerror}") from error


def list_names(names: Iterable[str], limit: int = _MAX_LISTED) -> str:
    """Join names for a message, at most `limit` of them and then "and N more"."""
    shown = [name if name.isprintable() else repr(name) for name in names]
    more = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {more} more" if more > 0 else "")


# ------------------------------------------------------------------------------------------------------ JSON


def read_json_object(path: Path, max_bytes: int = 16 << 20) -> dict[str, Any]:
    """Read a JSON file that holds an object; CheckpointError names the file and the place."""
    _require_regular(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    if len(raw) > max_bytes:
        raise CheckpointError(path, f"is larger than {max_bytes} bytes, too large for what it should hold")
    return _parse_json_object(path, "", raw)


def _parse_json_object(path: Path, part: str, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise CheckpointError(path, f"{part}JSON is nested too deeply") from error
    except ValueError as error:  # bad UTF-8, bad JSON, doubled keys, numbers of thousands of digits
        raise CheckpointError(path, f"{part}not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"{part}JSON must be an object, not {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {doubled!r} is there twice")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _require_regular(path: Path) -> int:
    """Return the size of a file; a folder, a pipe or a device is an error and is not opened."""
    try:
        if not path.is_file():
            raise CheckpointError(path, "is missing" if not path.exists() else "is not a regular file")
        return path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(path, f"cannot be read: {error}") from error


# ----------------------------------------------------------------------------------------------- safetensors


def open_safetensors(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file; CheckpointError names the tensor that is wrong."""
    size = _require_regular(path)
    header, data_start = _read_header(path, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(path, "__metadata__ must map strings to strings")
    tensors = {
        name: _stored_tensor(path, name, entry, data_start, size - data_start)
        for name, entry in header.items()
    }
    _require_exact_cover(path, tensors, data_start, size)
    return TensorFile(path=path, tensors=tensors)


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    try:
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(path, f"has {size} bytes, too few for a safetensors header")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    path,
                    f"its header says {length} bytes: the file has {size}, the format allows {_MAX_HEADER}",
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    if not raw.startswith(b"{"):
        raise CheckpointError(path, "is not safetensors: its header does not begin with '{'")
    if raw.count(b'"data_offsets"') > _MAX_TENSORS:
        raise CheckpointError(path, f"lists more than {_MAX_TENSORS} tensors")
    return _parse_json_object(path, "header: ", raw), 8 + len(raw)


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int, data_size: int) -> StoredTensor:
    def wrong(reason: str) -> CheckpointError:
        return CheckpointError(path, f"tensor {list_names([name])}: {reason}")

    if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
        raise wrong("its name is not valid Unicode")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("must have exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in _SAFETENSORS_BITS:
        raise wrong(f"unknown dtype {_short(dtype_name)}")
    if not _are_sizes(shape) or len(shape) > 64:
        raise wrong(f"shape {_short(shape)} is not a short list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
        raise wrong(f"data_offsets {_short(offsets)} do not lie in order within {data_size} bytes")
    num_bytes = offsets[1] - offsets[0]
    bits = math.prod(shape) * _SAFETENSORS_BITS[dtype_name]
    if bits != num_bytes * 8:
        raise wrong(f"{dtype_name} of shape {_short(shape)} does not take {num_bytes} bytes")
    if 0 in shape and math.prod(size for size in shape if size) > 2**63 - 1:
        raise wrong(f"shape {_short(shape)} is too large")
    return StoredTensor(
        dtype=_FLOAT_DTYPES.get(dtype_name),
        dtype_name=dtype_name,
        shape=tuple(shape),
        offset=data_start + offsets[0],
        num_bytes=num_bytes,
    )


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(_short(item) for item in value[:8])}, ...]"
    shown = repr(value) if isinstance(value, str | int | float | list) else type(value).__name__
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _require_exact_cover(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    end = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if stored.offset != end:
            kind = "overlaps the one before" if stored.offset < end else "leaves a hole before it"
            raise CheckpointError(path, f"tensor {list_names([name])} {kind}, at byte {stored.offset}")
        end += stored.num_bytes
    if end != size:
        raise CheckpointError(path, f"its tensors end at byte {end}, but the file at {size}")


# -------------------------------------------------------------------------------------------- torch archives


def open_torch_file(path: Path) -> TensorFile:
    """Find the tensors in a file of `torch.save`, without reading them and without running its pickle's code.

    The top must be a dict of tensors (or one under "model" or "state_dict"). Raises CheckpointError.
    """
    size = _require_regular(path)
    records, pickle = _archive_records(path)
    if any(offset + length > size for offset, length in records.items()):
        raise CheckpointError(path, f"its archive lists records beyond its {size} bytes")
    _check_pickle_names(path, pickle)
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            loaded = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # whatever a damaged pickle makes of the loader
        raise CheckpointError(path, f"cannot be unpickled: {_first_line(error)}") from error
    entries = _state_dict(path, loaded)
    tensors = {
        name: _stored_in_archive(path, name, value, records)
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }
    others = tuple(name for name, value in entries.items() if not isinstance(value, Tensor))
    return TensorFile(path=path, tensors=tensors, others=others)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _archive_records(path: Path) -> tuple[dict[int, int], bytes]:
    """Return {offset: size} of the archive's records, and its pickle."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(path, f"holds compressed records: {list_names(packed)}")
            pickles = [m for m in members if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
                raise CheckpointError(path, "must hold one data.pkl of moderate size")
            orders = [m for m in members if m.filename.endswith("/byteorder") and m.file_size < 16]
            if any(archive.read(m) != b"little" for m in orders):
                raise CheckpointError(path, "was saved on a big-endian machine")
            pickle = archive.read(pickles[0])
            return {_data_offset(file.seek, file.read, m): m.file_size for m in members}, pickle
    except zipfile.BadZipFile as error:
        reason = f"is not an archive of torch.save, or is cut short ({error}); older formats must be re-saved"
        raise CheckpointError(path, reason) from error
    except (OSError, ValueError, EOFError, struct.error, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(path, f"is a damaged archive: {_first_line(error)}") from error


def _data_offset(seek: Callable[[int], int], read: Callable[[int], bytes], member: zipfile.ZipInfo) -> int:
    seek(member.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", read(4))
    return int(member.header_offset + 30 + name_length + extra_length)


def _check_pickle_names(path: Path, pickle: bytes) -> None:
    """Refuse a pickle that asks for any callable beyond what a state dict needs (it is not run here)."""
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise CheckpointError(path, f"refused: its pickle uses {opcode.name}, no state dict does")
            name = str(argument)  # "module name"
            if (
                opcode.name == "GLOBAL"
                and name not in _PICKLE_NAMES
                and not _STORAGE_OR_DTYPE.fullmatch(name)
            ):
                asked = _short(name.replace(" ", "."))
                raise CheckpointError(path, f"refused: its pickle asks for {asked}, not only for tensors")
    except (ValueError, OverflowError, MemoryError, IndexError, struct.error) as error:
        raise CheckpointError(path, f"its pickle is damaged: {_first_line(error)}") from error


def _state_dict(path: Path, loaded: Any) -> dict[str, Any]:
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(path, f"holds a {type(loaded).__name__}, not a dict of tensors by name")
    if len(loaded) > _MAX_TENSORS:
        raise CheckpointError(path, f"lists more than {_MAX_TENSORS} tensors")
    return loaded


def _stored_in_archive(path: Path, name: str, tensor: Tensor, records: dict[int, int]) -> StoredTensor:
    def wrong(reason: str) -> CheckpointError:
        return CheckpointError(path, f"tensor {list_names([name])}: {reason}")

    dtype_name = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise wrong(f"is a {tensor.layout} tensor of {dtype_name}, not a plain one")
    storage = tensor.untyped_storage()
    offset, num_bytes = getattr(storage, "_checkpoint_offset", None), storage.nbytes()
    if offset is None or records.get(offset) != num_bytes:
        raise wrong(f"its {num_bytes} bytes are no record of the archive")
    itemsize, shape, strides = tensor.dtype.itemsize, tuple(tensor.shape), tuple(tensor.stride())
    if tensor.is_contiguous():
        span = tensor.numel()
    else:
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if (tensor.storage_offset() + span) * itemsize > num_bytes or tensor.numel() > span:
        raise wrong(f"shape {_short(list(shape))} does not fit its {num_bytes} bytes")
    return StoredTensor(
        dtype=tensor.dtype if tensor.dtype in _FLOAT_DTYPES.values() else None,
        dtype_name=dtype_name,
        shape=shape,
        offset=offset + tensor.storage_offset() * itemsize,
        num_bytes=span * itemsize,
        strides=None if tensor.is_contiguous() else strides,
    )
