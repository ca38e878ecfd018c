"""The paged key/value cache, and attention over it.

Keys and values of all sequences lie in one tensor per layer, cut into blocks; a block table says where each
sequence's tokens are. Blocks that follow each other are read in place as one piece; pieces are merged by
their log-sum-exp, so nothing is copied together for decoding, and no score matrix is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from puna.model.attention import causal_attention
from puna.model.config import LlamaConfig


def bytes_per_block(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return the memory of one block over all layers, keys and values."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * block_size * dtype.itemsize


class PagedKVCache:
    """Hold the keys and values of every layer, each (num_blocks, block_size, num_kv_heads, head_dim)."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.block_size = block_size
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v (tokens, num_kv_heads, head_dim) into `slots` (tokens,): block * block_size + offset."""
        for kept, new in ((self.keys[layer], k), (self.values[layer], v)):
            kept.view(-1, *kept.shape[2:])[slots] = new.to(kept.dtype)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each, in every layer."""
        for source, target in copies:
            for kept in (*self.keys, *self.values):
                kept[target] = kept[source]


class PagedAttention:
    """Attend over the paged cache; sequence i brings `counts[i]` new tokens after `starts[i]` cached ones."""

    def __init__(
        self,
        cache: PagedKVCache,
        block_tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        prompt_lengths: Sequence[int] | None = None,
    ) -> None:
        self.cache = cache
        self.prompt_lengths = prompt_lengths
        self.block_tables = block_tables
        self.starts = starts
        self.counts = counts
        device = cache.keys[0].device
        self.slots = torch.tensor(self._slots(), device=device)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, chunk_size: int | None
    ) -> Tensor:
        """See `puna.model.Attention`."""
        self.cache.write(layer, self.slots, k, v)
        out = torch.empty_like(q)
        row = 0
        for table, start, count in zip(self.block_tables, self.starts, self.counts, strict=True):
            for first, end in _cut_at_chunks(start, start + count, chunk_size):
                rows = slice(row, row + end - first)
                begin = 0 if chunk_size is None else first // chunk_size * chunk_size
                out[rows] = self._attend(q[rows], layer, table, begin, end, scale)
                row += end - first
        return out

    def lengths(self) -> Tensor:
        """See `puna.model.Attention`. With prompt_lengths it does not matter how a sequence is cut:

        a token of the prompt counts the whole prompt, one behind it everything up to itself.
        """
        if self.prompt_lengths is None:
            totals = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
            return torch.tensor(totals).repeat_interleave(torch.tensor(self.counts))
        rows = zip(self.starts, self.counts, self.prompt_lengths, strict=True)
        ends = [torch.arange(start + 1, start + count + 1).clamp(min=prompt) for start, count, prompt in rows]
        return torch.cat(ends)

    def _slots(self) -> list[int]:
        size = self.cache.block_size
        return [
            table[position // size] * size + position % size
            for table, start, count in zip(self.block_tables, self.starts, self.counts, strict=True)
            for position in range(start, start + count)
        ]

    def _attend(
        self, q: Tensor, layer: int, table: Sequence[int], begin: int, end: int, scale: float
    ) -> Tensor:
        """Attend from the last len(q) of the positions [begin, end) to all of them, causally."""
        pieces = [
            (self.cache.keys[layer], self.cache.values[layer], first, last)
            for first, last in _pieces(table, begin, end, self.cache.block_size)
        ]
        flat = [
            (keys.view(-1, *keys.shape[2:])[first:last], values.view(-1, *values.shape[2:])[first:last])
            for keys, values, first, last in pieces
        ]
        if flat[0][0].dtype != q.dtype:  # an 8-bit cache is widened piece by piece
            flat = [(keys.to(q.dtype), values.to(q.dtype)) for keys, values in flat]
        if len(flat) == 1:
            return causal_attention(q, *flat[0], scale)
        if q.shape[0] == 1 and q.device.type == "cpu":
            return _merge([_decode_piece(q, keys, values, scale) for keys, values in flat]).to(q.dtype)
        keys, values = (torch.cat(parts) for parts in zip(*flat, strict=True))
        return causal_attention(q, keys, values, scale)


def _cut_at_chunks(first: int, end: int, chunk_size: int | None) -> list[tuple[int, int]]:
    """Cut the positions [first, end) where a chunk of positions ends."""
    if chunk_size is None:
        return [(first, end)]
    borders = range((first // chunk_size + 1) * chunk_size, end, chunk_size)
    return list(pairwise([first, *borders, end]))


def _pieces(table: Sequence[int], begin: int, end: int, block_size: int) -> list[tuple[int, int]]:
    """Return the slots of the positions [begin, end) as few runs (first, last + 1)."""
    runs: list[tuple[int, int]] = []
    position = begin
    while position < end:
        block, offset = divmod(position, block_size)
        first = table[block] * block_size + offset
        size = min(block_size - offset, end - position)
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], first + size)
        else:
            runs.append((first, first + size))
        position += size
    return runs


def _decode_piece(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with one query to one run; return (num_heads, head_dim) and log-sum-exp (num_heads,)."""
    kv_heads = k.shape[1]
    rows = q.view(1, kv_heads, -1, q.shape[2])  # heads that share a kv head are rows
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), scale=scale
    )
    return out.reshape(-1, q.shape[2]), lse.reshape(-1)


def _merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Combine attention over disjoint keys, each weighted by its share of the softmax."""
    outs = torch.stack([out.float() for out, _ in parts])
    weights = torch.stack([lse.float() for _, lse in parts]).softmax(dim=0)
    return (outs * weights.unsqueeze(-1)).sum(dim=0).unsqueeze(0)
