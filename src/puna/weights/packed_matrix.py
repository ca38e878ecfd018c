"""Packed blocks: tensors of them, and a matrix that multiplies without being dequantised as a whole.

A matrix lies in tiles of 16 interleaved rows where there is a compiled kernel for it, which rounds
activations to 8 bits as llama.cpp does; else as rows, and a few rows at a time are dequantised to the
activations' dtype (the reference). Block layouts: `dequantize.py`; kernels: `puna.kernels.cpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from puna.gguf_header import GGMLType
from puna.kernels import compiled
from puna.kernels.frozen_linear import multiply_transposed
from puna.model.linear import is_watched
from puna.weights.dequantize import dequantize, require_supported

if TYPE_CHECKING:
    from puna.kernels.cpu import TiledWeight

# Elements that are dequantised at a time: 16 MiB as float32.
_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """Hold rows of packed blocks: `data` is uint8 (..., rows, row_bytes), `shape` the shape of the values."""

    data: Tensor
    type: GGMLType

    def __post_init__(self) -> None:
        require_supported(self.type)
        if self.data.dtype != torch.uint8 or self.data.ndim < 1 or self.data.shape[-1] % self.type.type_size:
            raise ValueError(
                f"rows of {self.type.name} are uint8 in multiples of {self.type.type_size}, "
                f"got {self.data.dtype} of shape {tuple(self.data.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Return the logical shape, as torch would have it: (out, in) or (experts, out, in)."""
        *rows, row_bytes = self.data.shape
        return torch.Size((*rows, row_bytes // self.type.type_size * self.type.block_size))

    @property
    def num_bytes(self) -> int:
        """Return the size of the packed data."""
        return self.data.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return all values as a new tensor; each is computed in float32 and rounded once to `dtype`."""
        return dequantize(self.data, self.type, torch.empty(self.shape, dtype=dtype, device=self.data.device))

    def rows(self, index: Tensor | slice) -> QuantTensor:
        """Select or reorder rows (the next to last axis) byte by byte, without touching the values."""
        return QuantTensor(self.data[..., index, :], self.type)

    def to(self, device: torch.device | str) -> QuantTensor:
        """Return the same blocks on another device."""
        return QuantTensor(self.data.to(device), self.type)


class PackedMatrix(nn.Module):
    """A matrix of packed blocks, (out, in): multiplies activations, hands out rows.

    Where it lies on the CPU and the compiled kernels know its type, it is kept in their tiles, a permutation
    of the same bytes. Moving it to another device turns it back into rows.
    """

    packed: Tensor

    def __init__(self, weight: QuantTensor) -> None:
        super().__init__()
        if weight.data.ndim != 2:
            raise ValueError(f"a matrix is needed, got the shape {tuple(weight.shape)}")
        self.quant_type = weight.type
        self.out_features, self.in_features = weight.shape
        self._keep(weight)

    @property
    def tiled(self) -> TiledWeight | None:
        """Return the tiles that the kernels read, if it lies in such."""
        return self._tiled

    @property
    def shape(self) -> torch.Size:
        """Return (out_features, in_features)."""
        return torch.Size((self.out_features, self.in_features))

    def write_rows(self, start: int, out: Tensor) -> None:
        """Dequantise the rows from `start` on into out, (rows, in_features), contiguous."""
        dequantize(self.rows(slice(start, start + out.shape[0])).data, self.quant_type, out)

    @property
    def quantized(self) -> QuantTensor:
        """Return the whole matrix as rows, still packed: a view if it is kept so, else a copy."""
        return self.rows(slice(None))

    def rows(self, index: Tensor | slice) -> QuantTensor:
        """Return some rows, still packed."""
        if self._tiled is None:
            return QuantTensor(self.packed[index], self.quant_type)
        if isinstance(index, slice):
            index = torch.arange(*index.indices(self.out_features), device="cpu")
        return QuantTensor(self._tiled.rows(index), self.quant_type)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ matrix.T: (..., in) to (..., out), in the dtype of x. Gradients flow to x."""
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _Multiply.apply(x, self)  # type: ignore[no-untyped-call]
            return out
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """Do what `forward` does, without a gradient."""
        kernels = compiled()
        if self._tiled is not None and kernels is not None and kernels.takes(x):
            return kernels.quant_linear(x, [self._tiled])[0]  # type: ignore[no-any-return]
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for start, weight in self.chunks(x.dtype):
            out[..., start : start + weight.shape[0]] = functional.linear(x, weight)
        return out

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Dequantise a few rows at a time into one buffer: each chunk is gone when the next is asked for."""
        step = max(1, min(self.out_features, _CHUNK // self.in_features))
        buffer = torch.empty(step, self.in_features, dtype=dtype, device=self.packed.device)
        for start in range(0, self.out_features, step):
            rows = self.rows(slice(start, start + step)).data
            yield start, dequantize(rows, self.quant_type, buffer[: rows.shape[0]])

    def _keep(self, weight: QuantTensor) -> None:
        kernels = compiled()
        self._tiled: TiledWeight | None = None
        if kernels is not None and kernels.can_pack(weight.data, int(weight.type)):
            self._tiled = kernels.TiledWeight.pack(weight.data, int(weight.type))
        self.register_buffer("packed", weight.data if self._tiled is None else self._tiled.tiles)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        leaves_the_cpu = fn(torch.empty(0, dtype=torch.uint8, device=self.packed.device)).device.type != "cpu"
        if self._tiled is not None and leaves_the_cpu:
            self.packed, self._tiled = self.quantized.data, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._tiled is None and not leaves_the_cpu:
            self._keep(self.quantized)
        self._use_packed()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._use_packed()

    def _use_packed(self) -> None:
        """Compute with `packed`, which may have become another tensor."""
        if self._tiled is not None and self._tiled.tiles is not self.packed:
            self._tiled = type(self._tiled)(self.packed, self._tiled.kind, self._tiled.shape)

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, type={self.quant_type.name}"


def multiply_all(x: Tensor, matrices: Sequence[PackedMatrix]) -> list[Tensor]:
    """Return [matrix(x) for matrix in matrices]: in one call of the kernels where they take all of them."""
    kernels = compiled()
    tiled = [matrix._tiled for matrix in matrices if matrix._tiled is not None]
    one_by_one = any(map(is_watched, matrices))
    one_by_one |= len(tiled) < len(matrices) or (torch.is_grad_enabled() and x.requires_grad)
    if kernels is None or one_by_one or not kernels.takes(x):
        return [matrix(x) for matrix in matrices]
    outs: list[Tensor] = kernels.quant_linear(x, tiled)
    return outs


class _Multiply(torch.autograd.Function):
    """Keep the packed matrix for the backward pass instead of its values, which are made again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PackedMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return multiply_transposed(grads[0], ctx.matrix), None
