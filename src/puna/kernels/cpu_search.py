"""The compiled searches for the scales of quantised weights, as functions of tensors.

What is tried and what is minimised is said in torch, in `puna.weights.quantize_search` and `quantize_super`;
this is their fast form. `cpu.py` hands it out together with the other kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch  # first: it brings the OpenMP library whose threads the kernels share
from torch import Tensor

import puna.kernels._cpu as _cpu


@dataclass(frozen=True, kw_only=True)
class FoundBlocks:
    """Hold d, dmin, (blocks,) float16, scales, minima, (blocks, groups), and levels, as x, all int8.

    Without minima, dmin and minima hold nothing.
    """

    d: Tensor
    dmin: Tensor
    scales: Tensor
    minima: Tensor
    levels: Tensor


def search_scales(
    x: Tensor,
    weights: Tensor | None,
    levels: tuple[int, int],
    table: Tensor | None,
    trials: Sequence[float],
    *,
    affine: bool = False,
    free_minimum: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the scales, and minima if `affine`, with which rows of x, (groups, 16 or 32), lose least.

    weights: (some groups, as x), used again and again. Raises ValueError for another dtype or shape.
    """
    x, weights, table = _searched(x, weights, table, ndim=2)
    scales = x.new_empty(x.shape[0])
    minima = x.new_empty(x.shape[0] if affine else 0)
    _cpu.quantize(
        *_search_input(x, weights), affine, free_minimum, *levels, _address(table), list(trials),
        0, 0, 0, 0, 0, scales.data_ptr(), _address(minima), 0, torch.get_num_threads(),
    )  # fmt: skip
    return scales, minima


def search_blocks(
    x: Tensor,
    weights: Tensor | None,
    levels: tuple[int, int],
    table: Tensor | None,
    trials: Sequence[float],
    scale_range: tuple[int, int],
    *,
    affine: bool = False,
) -> FoundBlocks:
    """Quantise whole blocks, x: (blocks, 8 or 16 groups, 16 or 32).

    weights: (some blocks, as x), used again and again. d may be infinite where x is too large. Raises
    ValueError for another dtype or shape.
    """
    x, weights, table = _searched(x, weights, table, ndim=3)
    blocks, groups, _ = x.shape
    d = torch.empty(blocks, dtype=torch.float16)
    dmin = torch.empty(blocks if affine else 0, dtype=torch.float16)
    scales = torch.empty(blocks, groups, dtype=torch.int8)
    minima = torch.empty(blocks if affine else 0, groups, dtype=torch.int8)
    found = torch.empty(x.shape, dtype=torch.int8)
    _cpu.quantize(
        *_search_input(x, weights), affine, False, *levels, _address(table), list(trials),
        groups, *scale_range, d.data_ptr(), _address(dmin), scales.data_ptr(), _address(minima),
        found.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return FoundBlocks(d=d, dmin=dmin, scales=scales, minima=minima, levels=found)


def _searched(
    x: Tensor, weights: Tensor | None, table: Tensor | None, *, ndim: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check what a search reads; its addresses are handed over."""
    if x.ndim != ndim or x.shape[-1] not in (16, 32):
        raise ValueError(f"a search takes {ndim} dimensions, groups of 16 or 32 last, got {tuple(x.shape)}")
    for tensor in (x, weights, table):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            raise ValueError(f"a search takes float32 on the CPU, got {tensor.dtype} on {tensor.device}")
    if weights is not None and (weights.shape[1:] != x.shape[1:] or weights.shape[0] == 0):
        raise ValueError(f"weights {tuple(weights.shape)} do not fit {tuple(x.shape)}")
    if table is not None and tuple(table.shape) != (512,):
        raise ValueError(f"a table has 512 levels, got {tuple(table.shape)}")
    return (
        x.contiguous(),
        None if weights is None else weights.contiguous(),
        None if table is None else table.contiguous(),
    )


def _search_input(x: Tensor, weights: Tensor | None) -> tuple[int, int, int, int, int]:
    size = x.shape[-1]
    counted = 0 if weights is None else weights.numel() // size
    return x.data_ptr(), x.numel() // size, size, _address(weights), counted


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()
