"""The compiled kernels (csrc/, built as `_cpu`), as functions of tensors.

Tensors are handed over as addresses, since the usual protocol costs more than a small product; what the
address must point at (dtype, device, layout) is checked here, sizes again in C++.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch  # first: it brings the OpenMP library whose threads the kernels share
from torch import Tensor

import puna.kernels._cpu as _cpu  # not `from`, whose error would speak of a circular import
from puna.errors import ConfigError

TILE_ROWS = 16

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# ggml's ids of the block types that the kernels know: (values in a block, bytes of a block).
_BLOCKS = {
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    20: (32, 18),  # IQ4_NL
    23: (256, 136),  # IQ4_XS
}


def usable() -> list[str]:
    """Return the names of the instruction sets that can run here, best first."""
    return _cpu.usable()


def chosen() -> str:
    """Return the name of the instruction set in use."""
    return _cpu.chosen()


def choose(isa: str) -> None:
    """Use another instruction set from now on. Raises ConfigError if it cannot run here."""
    if isa not in usable():
        raise ConfigError(f"this processor cannot run the kernels {isa!r}; it can run {', '.join(usable())}")
    _cpu.choose(isa)


def num_threads() -> int:
    """Return how many threads a kernel uses."""
    return _cpu.num_threads()


def can_pack(rows: Tensor, kind: int) -> bool:
    """Say whether there is a kernel for packed rows, uint8 (rows, row_bytes), of ggml's type `kind`."""
    known = kind in _BLOCKS and rows.device.type == "cpu" and rows.ndim == 2 and rows.numel() > 0
    return known and rows.shape[1] % _BLOCKS[kind][1] == 0


def takes(x: Tensor) -> bool:
    """Say whether the kernels take these activations: on the CPU, float32, float16 or bfloat16."""
    return x.device.type == "cpu" and x.dtype in _DTYPE_CODES and x.numel() > 0


class TiledWeight:
    """A quantised matrix with 16 rows interleaved: a permutation of the bytes of its rows.

    tiles: uint8 (bytes of the tiles,); rows of zeros fill up the last tile.
    """

    def __init__(self, tiles: Tensor, kind: int, shape: tuple[int, int]) -> None:
        self.tiles = tiles
        self.kind = kind
        self.shape = shape
        self.matrix = _cpu.QuantMatrix(tiles, kind, *shape)

    @classmethod
    def pack(cls, rows: Tensor, kind: int) -> TiledWeight:
        """Interleave packed rows, uint8 (rows, row_bytes). Raises ValueError without a kernel for them."""
        if kind not in _BLOCKS or rows.ndim != 2 or rows.dtype != torch.uint8:
            raise ValueError(f"no kernel for ggml type {kind} in {rows.dtype} {tuple(rows.shape)}")
        block, size = _BLOCKS[kind]
        count, row_bytes = rows.shape
        tiles = torch.empty(-(-count // TILE_ROWS) * TILE_ROWS * row_bytes, dtype=torch.uint8)
        weight = cls(tiles, kind, (count, row_bytes // size * block))
        weight.matrix.pack(rows.contiguous())
        return weight

    def __reduce__(self) -> tuple[type[TiledWeight], tuple[Tensor, int, tuple[int, int]]]:
        """Copy and pickle by the tiles: what is compiled cannot be."""
        return TiledWeight, (self.tiles, self.kind, self.shape)

    def rows(self, index: Tensor) -> Tensor:
        """Return the packed rows with these numbers, (len(index), row_bytes), as `pack` was given them."""
        block, size = _BLOCKS[self.kind]
        out = torch.empty(index.shape[0], self.shape[1] // block * size, dtype=torch.uint8)
        self.matrix.unpack(index.to(torch.int64).contiguous(), out)
        return out


def quant_linear(x: Tensor, weights: Sequence[TiledWeight]) -> list[Tensor]:
    """Return [x @ w.T for w in weights], in the dtype of x, with activations rounded to int8 per 32 columns.

    x: (..., columns) on the CPU, float32, float16 or bfloat16. Raises ValueError for anything else.
    """
    flat, code, stride = _rows_of(x)
    tokens, columns = flat.shape
    outs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    _cpu.linear(
        flat.data_ptr(),
        code,
        tokens,
        columns,
        stride,
        [weight.matrix for weight in weights],
        [out.data_ptr() for out in outs],
        [out.numel() for out in outs],
    )
    return outs


def dense_linear(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return [x @ w.T for w in weights], in the dtype of x, summed in float32; no gradient flows.

    x: (..., columns) on the CPU, float32, float16 or bfloat16; weights: contiguous (rows, columns), all
    float16 or all bfloat16. Raises ValueError for anything else.
    """
    flat, code, stride = _rows_of(x)
    tokens, columns = flat.shape
    kinds = {weight.dtype for weight in weights}
    if len(kinds) != 1 or not kinds <= {torch.float16, torch.bfloat16}:
        raise ValueError(f"the weights must be all float16 or all bfloat16, got {sorted(map(str, kinds))}")
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != columns:
            raise ValueError(f"the input has {columns} columns, a weight the shape {tuple(weight.shape)}")
        if weight.device.type != "cpu" or not weight.is_contiguous():
            raise ValueError("the weights must be contiguous, on the CPU")
    outs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    _cpu.dense_linear(
        flat.data_ptr(),
        code,
        tokens,
        columns,
        stride,
        _DTYPE_CODES[weights[0].dtype],
        [weight.data_ptr() for weight in weights],
        [weight.numel() for weight in weights],
        [out.data_ptr() for out in outs],
        [out.numel() for out in outs],
    )
    return outs


def _rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """Return x as a matrix whose rows have no gaps, the code of its dtype, and how far apart rows are."""
    code = _DTYPE_CODES.get(x.dtype)
    if code is None or x.device.type != "cpu":
        raise ValueError(
            f"the kernels take float32, float16 or bfloat16 on the CPU, got {x.dtype} on {x.device}"
        )
    flat = x.reshape(-1, x.shape[-1])
    tokens, columns = flat.shape
    if flat.stride(1) != 1 or (tokens > 1 and flat.stride(0) < columns):
        flat = flat.contiguous()
    return flat, code, flat.stride(0) if tokens > 1 else columns
