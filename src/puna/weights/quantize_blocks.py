"""Quantise rows of floats to ggml's block types: the inverse of `dequantize.py`.

Every type gives less error than llama.cpp's quantiser for it: scales are searched for the simple types too,
levels are chosen for the scales as they are stored, in half precision, and rows keep their length. An
importance matrix (for each column the mean square of the activations that meet it) says which errors matter;
without it all count the same. Layouts: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from puna.errors import UnsupportedError
from puna.gguf_header import GGMLType
from puna.kernels import compiled
from puna.weights.dequantize import IQ4_VALUES, dequantize
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quantize_search import Levels, fit_affine, fit_symmetric, reciprocal, table_places
from puna.weights.quantize_super import (
    AffineBlocks,
    affine_blocks,
    by_column,
    expanded,
    symmetric_blocks,
    to_half,
)

# Weights that are worked on at a time: enough to busy all threads of the compiled search; for the one in
# torch, so few that what it keeps of them fits into a cache.
_RUN, _RUN_IN_TORCH = 1 << 21, 1 << 18

# (blocks, block_size), weights of the errors in the blocks of a row or None -> packed bytes
_Formula = Callable[[Tensor, Tensor | None], Tensor]


def quantize(rows: Tensor, kind: GGMLType, importance: Tensor | None = None) -> QuantTensor:
    """Return rows of floats, (..., row_length), as packed blocks.

    `importance`, (row_length,), is not negative, and the same for all rows. Takes the memory of the result
    and a few MiB. Raises UnsupportedError for a type that cannot be written, ValueError for rows that are no
    whole number of blocks or hold what is not finite, and for an importance of a wrong shape or sign.
    """
    formula = _FORMULAS.get(kind)
    if formula is None:
        names = ", ".join(known.name for known in _FORMULAS)
        raise UnsupportedError(f"quantising to {kind.name} is not supported (supported: {names})")
    length = rows.shape[-1]
    if length % kind.block_size:
        raise ValueError(f"rows of {length} weights are no whole {kind.name} blocks of {kind.block_size}")
    if importance is not None:
        _check_importance(importance, length)
    weights = None if importance is None else _weights(importance, kind)
    row_bytes = length // kind.block_size * kind.type_size
    out = torch.empty(*rows.shape[:-1], row_bytes, dtype=torch.uint8)
    packed, flat = out.view(-1, row_bytes), rows.reshape(-1, length)
    step = max(1, (_RUN_IN_TORCH if compiled() is None else _RUN) // length)
    for start in range(0, flat.shape[0], step):
        values = flat[start : start + step].float()
        if not bool(values.isfinite().all()):
            raise ValueError("the weights hold values that are not finite")
        found = formula(values.reshape(-1, kind.block_size), weights).view(-1, row_bytes)
        if kind in _SCALES:
            _stretch(found, kind, values, importance)
        packed[start : start + step] = found
    return QuantTensor(out, kind)


# Where d, and dmin, lie in the blocks of the types that shorten a row by more than half precision can tell.
_SCALES = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
}


def _stretch(packed: Tensor, kind: GGMLType, values: Tensor, importance: Tensor | None) -> None:
    """Multiply the scales of each row so that its product with what it stands for is that one's square.

    What least squares find is shorter than what it stands for, by the square of the error. So every layer
    would answer a little too weakly, all in the same direction, which hurts more than the rounding that
    remains: of Q2_K it takes a sixth of the KL divergence, for 4% of the error.
    """
    counted = values if importance is None else values * importance.to(values)
    length = (counted * values).sum(1)
    found = (counted * dequantize(packed, kind)).sum(1)
    factor = torch.where(found > 0, length / found, 1.0).clamp_(1.0, 1.1)
    blocks = packed.view(packed.shape[0], -1, kind.type_size)
    for at in _SCALES[kind]:
        scale = blocks[..., at : at + 2].contiguous().view(torch.float16)
        blocks[..., at : at + 2] = to_half(scale.float() * factor[:, None, None]).view(torch.uint8)


def can_quantize(kind: GGMLType) -> bool:
    """Say whether `quantize` knows a type."""
    return kind in _FORMULAS


def _check_importance(importance: Tensor, length: int) -> None:
    if tuple(importance.shape) != (length,):
        raise ValueError(f"an importance of shape {[length]} is needed, got {list(importance.shape)}")
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise ValueError("an importance is negative or not finite")


def _weights(importance: Tensor, kind: GGMLType) -> Tensor:
    """Return how much an error counts in the blocks of a row, (blocks, block_size).

    Within a block only proportions matter, and sums of them must neither vanish nor overflow.
    """
    blocks = importance.detach().cpu().float().view(-1, kind.block_size)
    largest = blocks.amax(dim=1, keepdim=True)
    return torch.where(largest > 0, blocks / largest, 1.0).clamp_(min=1e-5)


# ---------------------------------------------------------------------------------------------- packing bits


def _fold(values: Tensor, count: int, group: int, bits: int) -> Tensor:
    """Put `count` values of few bits into each byte, runs of `group` after one another, the first lowest.

    (blocks, n) uint8 to (blocks, n / count).
    """
    parts = values.view(values.shape[0], -1, count, group)
    out = parts[:, :, 0].clone()
    for place in range(1, count):
        out |= parts[:, :, place] << (bits * place)
    return out.view(values.shape[0], -1)


def _bytes_of(half: Tensor) -> Tensor:
    return half.view(-1, 1).view(torch.uint8)


def _grouped(blocks: Tensor, groups: int) -> Tensor:
    """Turn (blocks, groups * n) into (blocks, groups, n)."""
    return blocks.reshape(blocks.shape[0], groups, -1)


def _maybe(weights: Tensor | None, groups: int) -> Tensor | None:
    return None if weights is None else _grouped(weights, groups)


def _codes(levels: Tensor, offset: int = 0) -> Tensor:
    """Turn levels, (blocks, ...), into uint8, (blocks, block_size)."""
    return (levels + offset).to(torch.uint8).reshape(levels.shape[0], -1)


# ---------------------------------------------------------------------------------- blocks of 32, one by one


def _symmetric_32(
    blocks: Tensor, weights: Tensor | None, grid: Levels, anchors: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return d, (blocks,) float16, and levels (blocks, 32)."""
    kernels = compiled()
    if kernels is not None and blocks.device.type == "cpu":
        scale, _ = kernels.search_scales(blocks, weights, (grid.low, grid.high), grid.table, anchors)
    else:
        x = _grouped(blocks, 1)
        scale = fit_symmetric(by_column(x), expanded(_maybe(weights, 1), x), grid, anchors)[:, 0]
    d = to_half(scale)
    return d, grid.assign(blocks * reciprocal(d.float())[:, None])


def _anchors(low: int) -> list[float]:
    """Return places for the extreme weight: about the lowest level, and about the highest."""
    steps = [0.1 * step for step in range(-8, 9, 2)]
    return [low - step for step in steps] + [-low - 1 + step for step in steps]


# Slightly wider steps cost hardly anything, and some of them happen to hit the other weights better.
_Q8_ANCHORS = [127.0 - step for step in range(9)]


def _q4_0(blocks: Tensor, weights: Tensor | None) -> Tensor:
    d, levels = _symmetric_32(blocks, weights, Levels(low=-8, high=7), _anchors(-8))
    return torch.cat((_bytes_of(d), _fold(_codes(levels, 8), 2, 16, 4)), dim=1)


def _q5_0(blocks: Tensor, weights: Tensor | None) -> Tensor:
    d, levels = _symmetric_32(blocks, weights, Levels(low=-16, high=15), _anchors(-16))
    codes = _codes(levels, 16)
    return torch.cat((_bytes_of(d), _fold(codes >> 4, 8, 1, 1), _fold(codes & 15, 2, 16, 4)), dim=1)


_OFFSETS = [-1.0 + 0.25 * step for step in range(11)]


def _affine_32(blocks: Tensor, weights: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    """Return d and minimum side by side, as bytes (blocks, 4), and codes (blocks, 32)."""
    middle = blocks.mean(1, keepdim=True)  # taken away for the search, where squares cancel
    centred, kernels = blocks - middle, compiled()
    if kernels is not None and blocks.device.type == "cpu":
        scale, minimum = kernels.search_scales(
            centred, weights, (0, top), None, _OFFSETS, affine=True, free_minimum=True
        )
    else:
        x = _grouped(centred, 1)
        found = fit_affine(by_column(x), expanded(_maybe(weights, 1), x), top, _OFFSETS, free_minimum=True)
        scale, minimum = (values[:, 0] for values in found)
    d, m = to_half(scale), to_half(minimum + middle[:, 0])
    levels = (blocks - m.float()[:, None]).mul_(reciprocal(d.float())[:, None])
    return torch.cat((_bytes_of(d), _bytes_of(m)), dim=1), _codes(levels.round_().clamp_(0, top))


def _q4_1(blocks: Tensor, weights: Tensor | None) -> Tensor:
    head, codes = _affine_32(blocks, weights, 15)
    return torch.cat((head, _fold(codes, 2, 16, 4)), dim=1)


def _q5_1(blocks: Tensor, weights: Tensor | None) -> Tensor:
    head, codes = _affine_32(blocks, weights, 31)
    return torch.cat((head, _fold(codes >> 4, 8, 1, 1), _fold(codes & 15, 2, 16, 4)), dim=1)


def _q8_0(blocks: Tensor, weights: Tensor | None) -> Tensor:
    d, levels = _symmetric_32(blocks, weights, Levels(low=-127, high=127), _Q8_ANCHORS)
    levels *= d.sign().float()[
        :, None
    ]  # the levels are symmetric: d need not be negative, and usually is not
    return torch.cat((_bytes_of(d.abs()), levels.to(torch.int8).view(torch.uint8)), dim=1)


_IQ4_ANCHORS = [
    *(IQ4_VALUES[0] + float(step) for step in range(-40, 17, 8)),
    *(IQ4_VALUES[-1] + float(step) for step in range(-16, 41, 8)),
]


def _iq4_tables() -> tuple[Levels, Tensor]:
    """Return the levels of IQ4, and the numbers of those in their table."""
    levels = torch.tensor(IQ4_VALUES, dtype=torch.float32)
    starts = torch.arange(-256, 256) / 2
    codes = torch.bucketize(starts, (levels[1:] + levels[:-1]) / 2, right=True)
    grid = Levels(low=IQ4_VALUES[0], high=IQ4_VALUES[-1], table=levels[codes])
    return grid, codes.to(torch.uint8)


def _iq4_codes(levels: Tensor, codes: Tensor) -> Tensor:
    return codes.index_select(0, table_places(levels.reshape(-1).float())).view(levels.shape[0], -1)


def _iq4_nl(blocks: Tensor, weights: Tensor | None) -> Tensor:
    grid, codes = _iq4_tables()
    d, levels = _symmetric_32(blocks, weights, grid, _IQ4_ANCHORS)
    return torch.cat((_bytes_of(d), _fold(_iq4_codes(levels, codes), 2, 16, 4)), dim=1)


# ------------------------------------------------------------------------------------------- blocks of 256


def _q2_k(blocks: Tensor, weights: Tensor | None) -> Tensor:
    offsets = [-0.5 + 0.25 * step for step in range(13)]
    found = affine_blocks(_grouped(blocks, 16), _maybe(weights, 16), 3, offsets, 15)
    scales = found.scales.to(torch.uint8) | found.minima.to(torch.uint8) << 4
    quants = _fold(_codes(found.levels), 4, 32, 2)
    return torch.cat((scales, quants, _bytes_of(found.d), _bytes_of(found.dmin)), dim=1)


def _q3_k(blocks: Tensor, weights: Tensor | None) -> Tensor:
    found = symmetric_blocks(
        _grouped(blocks, 16), _maybe(weights, 16), Levels(low=-4, high=3), _anchors(-4), -32
    )
    codes, scales = _codes(found.levels, 4), (found.scales + 32).to(torch.uint8)
    packed_scales = torch.cat((_fold(scales & 15, 2, 8, 4), _fold(scales >> 4, 4, 4, 2)), dim=1)
    mask, quants = _fold(codes >> 2, 8, 32, 1), _fold(codes & 3, 4, 32, 2)
    return torch.cat((mask, quants, packed_scales, _bytes_of(found.d)), dim=1)


def _six_bits(found: AffineBlocks) -> Tensor:
    """Pack the 8 scales and the 8 minima of Q4_K and Q5_K into 12 bytes."""
    scales, minima = found.scales.to(torch.uint8), found.minima.to(torch.uint8)
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    return torch.cat((first, second, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4), dim=1)


def _q4_k(blocks: Tensor, weights: Tensor | None) -> Tensor:
    found = affine_blocks(_grouped(blocks, 8), _maybe(weights, 8), 15, _OFFSETS, 63)
    quants = _fold(_codes(found.levels), 2, 32, 4)
    return torch.cat((_bytes_of(found.d), _bytes_of(found.dmin), _six_bits(found), quants), dim=1)


def _q5_k(blocks: Tensor, weights: Tensor | None) -> Tensor:
    found = affine_blocks(_grouped(blocks, 8), _maybe(weights, 8), 31, _OFFSETS, 63)
    codes = _codes(found.levels)
    head = torch.cat((_bytes_of(found.d), _bytes_of(found.dmin), _six_bits(found)), dim=1)
    return torch.cat((head, _fold(codes >> 4, 8, 32, 1), _fold(codes & 15, 2, 32, 4)), dim=1)


def _q6_k(blocks: Tensor, weights: Tensor | None) -> Tensor:
    found = symmetric_blocks(
        _grouped(blocks, 16), _maybe(weights, 16), Levels(low=-32, high=31), _anchors(-32), -128
    )
    codes, scales = _codes(found.levels, 32), found.scales.to(torch.int8).view(torch.uint8)
    low, high = _fold(codes & 15, 2, 64, 4), _fold(codes >> 4, 4, 32, 2)
    return torch.cat((low, high, scales, _bytes_of(found.d)), dim=1)


def _iq4_xs(blocks: Tensor, weights: Tensor | None) -> Tensor:
    grid, codes = _iq4_tables()
    found = symmetric_blocks(_grouped(blocks, 8), _maybe(weights, 8), grid, _IQ4_ANCHORS, -32)
    scales = (found.scales + 32).to(torch.uint8)
    packed_scales = torch.cat((_fold(scales >> 4, 4, 1, 2), _fold(scales & 15, 2, 1, 4)), dim=1)
    quants = _fold(_iq4_codes(found.levels, codes), 2, 16, 4)
    return torch.cat((_bytes_of(found.d), packed_scales, quants), dim=1)


_FORMULAS: dict[GGMLType, _Formula] = {
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
}
