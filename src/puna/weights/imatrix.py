"""Read and write importance matrices: for each column of a weight, the mean square of what meets it.

Both of llama.cpp's formats are read, the GGUF one and the older .dat; the GGUF one is written. Names
are those of GGUF tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from puna.errors import CheckpointError
from puna.gguf_header import is_gguf
from puna.weights.gguf import GgufFile
from puna.weights.gguf_writer import Value, write_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_FILE_BYTES = 1 << 31
_MAX_NAME_BYTES = 1 << 10


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Hold sums of squares, (matrices, columns), and how many rows were summed in each, (matrices,)."""

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> Tensor:
        """Return the mean squares, ones for a matrix that saw no row; (columns,) for a single matrix."""
        counts = self.counts[:, None]
        mean = torch.where(counts > 0, self.sums / counts.clamp(min=1), 1.0)
        return mean[0] if mean.shape[0] == 1 else mean


def read_imatrix(path: Path | str) -> dict[str, Tensor]:
    """Return the mean square of each weight's inputs: (columns,), or (experts, columns) for stacked experts.

    Raises CheckpointError naming the file for one that is damaged or no importance matrix.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(path, "no such file")
    return _read_gguf(path) if is_gguf(path) else _read_dat(path)


def write_imatrix(
    path: Path | str,
    found: Mapping[str, Activations],
    *,
    datasets: Sequence[str],
    chunk_size: int,
    chunks: int,
) -> None:
    """Write what was seen as a GGUF file."""
    tensors: dict[str, Tensor] = {}
    for name, seen in sorted(found.items()):
        tensors[name + _SUMS] = seen.sums.float().contiguous()
        tensors[name + _COUNTS] = seen.counts.float()[:, None].contiguous()
    metadata: dict[str, Value] = {
        "general.type": "imatrix",
        "imatrix.datasets": list(datasets),
        "imatrix.chunk_count": chunks,
        "imatrix.chunk_size": chunk_size,
    }
    write_gguf(path, metadata, tensors)


def _read_gguf(path: Path) -> dict[str, Tensor]:
    file = GgufFile(path)
    if file.metadata.get("general.type") != "imatrix":
        raise CheckpointError(path, "is no importance matrix: general.type is not 'imatrix'")
    found: dict[str, Tensor] = {}
    for key in file.tensors:
        if not key.endswith(_SUMS):
            continue
        name = key.removesuffix(_SUMS)
        if name + _COUNTS not in file.tensors:
            raise CheckpointError(path, f"tensor {name + _COUNTS!r} is missing")
        sums, counts = file.read(key), file.read(name + _COUNTS)
        if not isinstance(sums, Tensor) or not isinstance(counts, Tensor):
            raise CheckpointError(path, f"tensor {key!r} is quantised")
        sums = sums.reshape(-1, sums.shape[-1])
        if counts.numel() != sums.shape[0]:
            raise CheckpointError(path, f"{key!r} has {sums.shape[0]} rows and {counts.numel()} counts")
        found[name] = Activations(sums=sums.clone(), counts=counts.reshape(-1).clone()).mean
    return found


def _read_dat(path: Path) -> dict[str, Tensor]:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise CheckpointError(path, f"larger than the {_MAX_FILE_BYTES} bytes that such a file may have")
    data = path.read_bytes()
    at = 0

    def take(size: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise CheckpointError(path, f"is no importance matrix, or damaged: {what} at byte {at}")
        at += size
        return data[at - size : at]

    def integer(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    found: dict[str, Tensor] = {}
    for _ in range(integer("the number of entries")):
        length = integer("the length of a name")
        if length > _MAX_NAME_BYTES:
            raise CheckpointError(path, f"is no importance matrix: a name of {length} bytes at byte {at - 4}")
        name = take(length, "a name").decode("utf-8", "replace")
        calls, count = integer("a number of calls"), integer("a number of values")
        values = torch.from_numpy(np.frombuffer(take(4 * count, "values"), dtype="<f4").astype(np.float32))
        found[name] = values / calls if calls > 0 else values
    return found
