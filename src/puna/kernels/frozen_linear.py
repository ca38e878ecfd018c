"""Products with a weight that is not trained: forward and backward, and never a second whole weight.

A few rows of the weight at a time become numbers that torch multiplies fast on this device, float32 on
processors that do not multiply 16-bit floats, and its own product does the rest. The weight is a matrix that
can write some of its rows: 16-bit floats as they lie, or packed blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna.kernels.native_dtypes import is_native

_BLOCK_VALUES = 1 << 20  # on the CPU: 4 MB of float32, which stay in the cache
_BLOCK_VALUES_ELSEWHERE = 1 << 26


class RowWriter(Protocol):
    """A matrix, (out, in), that writes its rows."""

    @property
    def shape(self) -> torch.Size:
        """Return (out, in)."""

    def write_rows(self, start: int, out: Tensor) -> None:
        """Write the rows from `start` on to out, (rows, in), contiguous, in its dtype."""


@dataclass(frozen=True, eq=False)
class DenseRows:
    """The rows of a plain tensor."""

    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        """See `RowWriter`."""
        return self.weight.shape

    def write_rows(self, start: int, out: Tensor) -> None:
        """See `RowWriter`."""
        out.copy_(self.weight[start : start + out.shape[0]])


def frozen_linear(x: Tensor, weight: RowWriter) -> Tensor:
    """Return x @ weight.T, (..., out), in the dtype of x. The gradient flows to x; nothing is kept for it."""
    out: Tensor = _FrozenProduct.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: RowWriter) -> Tensor:
        ctx.weight = weight
        return multiply(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return multiply_transposed(grads[0], ctx.weight), None


@torch.no_grad()
def multiply(x: Tensor, weight: RowWriter) -> Tensor:
    """Return x @ weight.T, (..., out), in the dtype of x."""
    rows, columns = weight.shape
    wide = x.reshape(-1, columns).to(_dtype_of_products(x))
    out = wide.new_empty(*x.shape[:-1], rows)  # returned itself: a view may not be changed later
    flat = out.view(-1, rows)
    for start, block in _blocks(weight, wide):
        torch.mm(wide, block.T, out=flat[:, start : start + block.shape[0]])
    return out.to(x.dtype)


@torch.no_grad()
def multiply_transposed(grad: Tensor, weight: RowWriter) -> Tensor:
    """Return grad @ weight, (..., in), in the dtype of grad: what flows back through `frozen_linear`."""
    rows, columns = weight.shape
    wide = grad.reshape(-1, rows).to(_dtype_of_products(grad))
    out = wide.new_zeros(*grad.shape[:-1], columns)
    flat = out.view(-1, columns)
    for start, block in _blocks(weight, wide):
        flat.addmm_(wide[:, start : start + block.shape[0]], block)
    return out.to(grad.dtype)


def _blocks(weight: RowWriter, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Write a few rows at a time into one buffer: each block is gone when the next is asked for."""
    rows, columns = weight.shape
    most = _BLOCK_VALUES if like.device.type == "cpu" else _BLOCK_VALUES_ELSEWHERE
    step = max(1, min(rows, most // columns))
    buffer = like.new_empty(step, columns)
    for start in range(0, rows, step):
        block = buffer[: min(step, rows - start)]
        weight.write_rows(start, block)
        yield start, block


def _dtype_of_products(x: Tensor) -> torch.dtype:
    if x.device.type == "cpu" and not is_native(x.dtype):
        return torch.float32
    return x.dtype
