"""Read and write importance matrices: for each column of a weight, the mean square of what meets it.

Both of llama.cpp's formats are read, the GGUF one and the older .dat; the GGUF one is written. Names
are those of GGUF tensors. How the squares are found: `imatrix_collect.py`.
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
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
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


@dataclass(frozen=True, kw_only=True)
class ImportanceMatrix:
    """Hold the mean square of each weight's inputs, by GGUF names, and what text they come from.

    A mean is (columns,), or for stacked experts (experts, columns); the older files have these as
    (experts * columns,). `chunks` is 0 where a file does not say how many there were.
    """

    means: Mapping[str, Tensor]
    datasets: tuple[str, ...] = ()
    chunks: int = 0


def read_imatrix(path: Path | str) -> ImportanceMatrix:
    """Read a file of either format.

    Raises CheckpointError naming the file for one that is damaged or no importance matrix.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(path, "no such file")
    found = _read_gguf(path) if is_gguf(path) else _read_dat(path)
    for name, mean in found.means.items():
        if not bool((mean.isfinite() & (mean >= 0)).all()):
            raise CheckpointError(path, f"the mean squares of {name} are negative or not finite")
    return found


def write_imatrix(
    path: Path | str,
    found: Mapping[str, Activations],
    *,
    datasets: Sequence[str],
    chunk_size: int,
    chunks: int,
) -> None:
    """Write what was seen as a GGUF file; `chunk_size` is in tokens."""
    tensors: dict[str, Tensor] = {}
    for name, seen in sorted(found.items()):
        tensors[name + _SUMS] = seen.sums.float().contiguous()
        tensors[name + _COUNTS] = seen.counts.float()[:, None].contiguous()
    metadata: dict[str, Value] = {
        "general.type": "imatrix",
        _DATASETS: list(datasets),
        _CHUNKS: chunks,
        _CHUNK_SIZE: chunk_size,
    }
    write_gguf(path, metadata, tensors)


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = GgufFile(path)
    if file.metadata.get("general.type") != "imatrix":
        raise CheckpointError(path, "is no importance matrix: general.type is not 'imatrix'")
    means: dict[str, Tensor] = {}
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
        means[name] = Activations(sums=sums.clone(), counts=counts.reshape(-1).clone()).mean
    datasets, chunks = file.metadata.get(_DATASETS), file.metadata.get(_CHUNKS)
    return ImportanceMatrix(
        means=means,
        datasets=tuple(map(str, datasets)) if isinstance(datasets, list) else (),
        chunks=chunks if isinstance(chunks, int) else 0,
    )


def _read_dat(path: Path) -> ImportanceMatrix:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise CheckpointError(path, f"larger than the {_MAX_FILE_BYTES} bytes that such a file may have")
    reader = _Dat(path, path.read_bytes())
    count = reader.integer("the number of entries")
    if count < 1:
        raise CheckpointError(path, f"is no importance matrix: it has {count} entries")
    means: dict[str, Tensor] = {}
    for _ in range(count):
        name = reader.text("a name")
        calls, size = reader.integer("a number of calls"), reader.integer("a number of values")
        values = np.frombuffer(reader.take(4 * size, "values"), dtype="<f4").astype(np.float32)
        means[name] = torch.from_numpy(values) / max(calls, 1)
    if reader.at_end:  # the oldest files end here
        return ImportanceMatrix(means=means)
    chunks, dataset = reader.integer("the number of chunks"), reader.text("the data's name")
    return ImportanceMatrix(means=means, datasets=(dataset,) if dataset else (), chunks=chunks)


class _Dat:
    """The bytes of an older file, read one field after another; a field that is cut off is an error."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.place = path, data, 0

    @property
    def at_end(self) -> bool:
        return self.place == len(self.data)

    def take(self, size: int, what: str) -> bytes:
        if not 0 <= size <= len(self.data) - self.place:
            raise CheckpointError(
                self.path, f"is no importance matrix, or damaged: {what} at byte {self.place}"
            )
        self.place += size
        return self.data[self.place - size : self.place]

    def integer(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    def text(self, what: str) -> str:
        length = self.integer(f"the length of {what}")
        if length > _MAX_NAME_BYTES:
            raise CheckpointError(
                self.path,
                f"is no importance matrix: {what} of {length} bytes at byte {self.place - 4}",
            )
        return self.take(length, what).decode("utf-8", "replace")
