"""The paged key/value cache, and attention over it.

Keys and values of all sequences lie in one tensor per layer, cut into blocks; a block table says where each
sequence's tokens are. On the CPU the compiled kernel reads the blocks where they lie. Elsewhere a sequence in
one run is read in place, and one in pieces a few thousand positions at a time with an online softmax: neither
the cache nor a score matrix is ever put together as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from puna.kernels import compiled
from puna.model.attention import causal_attention
from puna.model.config import LlamaConfig


def bytes_per_block(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return the memory of one block over all layers, keys and values."""
    each = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)  # a head, and its scale
    return 2 * config.num_hidden_layers * config.num_key_value_heads * each * block_size


class PagedKVCache:
    """Hold the keys and values of every layer, each (num_blocks, block_size, num_kv_heads, head_dim).

    Those of int8 have scales: of each head of a token its largest magnitude / 127, in float32.
    """

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
        scaled = layers if dtype == torch.int8 else ()
        self.key_scales = [torch.empty(shape[:3], dtype=torch.float32, device=device) for _ in scaled]
        self.value_scales = [torch.empty(shape[:3], dtype=torch.float32, device=device) for _ in scaled]

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the scales of a layer's keys and values, or None where they have none."""
        return (self.key_scales[layer], self.value_scales[layer]) if self.key_scales else None

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v (tokens, num_kv_heads, head_dim) into `slots` (tokens,): block * block_size + offset."""
        scales = self.scales(layer)
        if scales is not None:
            _write_scaled(self.keys[layer], scales[0], slots, k)
            _write_scaled(self.values[layer], scales[1], slots, v)
            return
        kernels = compiled()
        for kept, new in ((self.keys[layer], k), (self.values[layer], v)):
            if kernels is not None and kernels.can_store(new, kept):
                kernels.store(new, kept.flatten(0, 1), slots)
                continue
            limit = torch.finfo(kept.dtype).max
            if limit < torch.finfo(new.dtype).max:  # large values would become NaN or infinity
                new = new.float().clamp(-limit, limit)  # bfloat16 would round the limit up
            kept.flatten(0, 1)[slots] = new.to(kept.dtype)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each, in every layer."""
        for source, target in copies:
            for kept in (*self.keys, *self.values, *self.key_scales, *self.value_scales):
                kept[target] = kept[source]


def _write_scaled(kept: Tensor, scales: Tensor, slots: Tensor, new: Tensor) -> None:
    """Put new (tokens, num_kv_heads, head_dim) into `slots` as int8, and their scales."""
    kernels = compiled()
    if kernels is not None and kernels.takes(new) and kept.device.type == "cpu":
        kernels.store_int8(new, kept.flatten(0, 1), scales.flatten(0, 1), slots)
        return
    wide = new.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    kept.flatten(0, 1)[slots] = torch.where(scale > 0, wide / scale, 0.0).round().nan_to_num().to(torch.int8)
    scales.flatten(0, 1)[slots] = scale.squeeze(-1)


class PagedAttention:
    """Attend over the paged cache; sequence i brings `counts[i]` new tokens after `starts[i]` cached ones.

    An object serves one step, over all layers. `use_compiled=False` gives the form in torch also on the CPU.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        block_tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        prompt_lengths: Sequence[int] | None = None,
        *,
        use_compiled: bool = True,
    ) -> None:
        self.cache = cache
        self.prompt_lengths = prompt_lengths
        self.block_tables = block_tables
        self.starts = starts
        self.counts = counts
        device = cache.keys[0].device
        self.slots = torch.tensor(self._slots(), dtype=torch.int64, device=device)
        self._cpu = compiled() if use_compiled and device.type == "cpu" else None
        self.compiled_batch = None if self._cpu is None else self._compiled_batch(self._cpu)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, chunk_size: int | None
    ) -> Tensor:
        """See `puna.model.Attention`."""
        self.cache.write(layer, self.slots, k, v)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self._cpu is not None and self._cpu.can_attend(q.dtype, keys):
            kernel: Tensor = self._cpu.paged_attention(
                q,
                keys,
                values,
                self.compiled_batch,
                scale=scale,
                chunk_size=chunk_size,
                scales=self.cache.scales(layer),
            )
            return kernel
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
        """See `puna.model.Attention`.

        With prompt_lengths it does not matter how a sequence is cut: a token of the prompt counts the whole
        prompt, one behind it everything up to itself.
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

    def _compiled_batch(self, cpu: ModuleType) -> object:
        """Make what the kernel asks of a step, for all layers: one tensor holds all block tables."""
        keys, size = self.cache.keys[0], self.cache.block_size
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        tables = torch.zeros(len(ends), -(-max(ends, default=0) // size), dtype=torch.int32)
        for row, table, end in zip(tables, self.block_tables, ends, strict=True):
            needed = -(-end // size)
            row[:needed] = torch.tensor(table[:needed], dtype=torch.int32)
        starts, counts = (torch.tensor(numbers, dtype=torch.int64) for numbers in (self.starts, self.counts))
        batch: object = cpu.PagedBatch(tables, starts, counts, num_blocks=keys.shape[0], block_size=size)
        return batch

    def _attend(
        self, q: Tensor, layer: int, table: Sequence[int], begin: int, end: int, scale: float
    ) -> Tensor:
        """Attend from the last len(q) of the positions [begin, end) to all of them, causally."""
        keys, values = (
            kept.view(-1, *kept.shape[2:]) for kept in (self.cache.keys[layer], self.cache.values[layer])
        )
        runs = _runs(table, begin, end, self.cache.block_size)
        if len(runs) == 1 and keys.dtype == q.dtype:
            first, last = runs[0]
            return causal_attention(q, keys[first:last], values[first:last], scale)
        slots = torch.cat([torch.arange(first, last, device=q.device) for first, last in runs])
        outs, before = [], slots.shape[0] - q.shape[0]
        for row in range(0, q.shape[0], _QUERY_PIECE):
            piece = q[row : row + _QUERY_PIECE]
            seen = slots[: before + row + piece.shape[0]]
            outs.append(_attend_in_pieces(piece, keys, values, seen, scale, self.cache.scales(layer)))
        return torch.cat(outs)


_QUERY_PIECE, _KEY_PIECE = 128, 2048  # bound the scores and what is widened at a time


def _attend_in_pieces(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    scale: float,
    scales: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Attend from the last len(q) of the positions at `slots` to all of them, causally, in float32."""
    tokens, heads, head_dim = q.shape
    kv_heads, first = keys.shape[1], slots.shape[0] - tokens
    # Heads that share a kv head are rows: (kv_heads, tokens * group, head_dim).
    rows = q.float().view(tokens, kv_heads, -1, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    own = torch.arange(first, first + tokens, device=q.device).repeat_interleave(heads // kv_heads)[:, None]
    maximum = rows.new_full((*rows.shape[:2], 1), -torch.inf)
    total, out = torch.zeros_like(maximum), torch.zeros_like(rows)
    for start in range(0, slots.shape[0], _KEY_PIECE):
        piece = slots[start : start + _KEY_PIECE]
        k, v = (kept[piece].float() for kept in (keys, values))
        if scales is not None:
            k, v = (
                part * each.flatten(0, 1)[piece, :, None] for part, each in zip((k, v), scales, strict=True)
            )
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        scores = (rows @ k.transpose(1, 2)).mul_(scale)
        if start + piece.shape[0] > first + 1:
            seen = torch.arange(start, start + piece.shape[0], device=q.device)
            scores.masked_fill_(seen > own, -torch.inf)
        larger = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weights, shrink = scores.sub_(larger).exp_(), (maximum - larger).exp_()
        total = total * shrink + weights.sum(-1, keepdim=True)
        out, maximum = out * shrink + weights @ v, larger
    out = (out / total).view(kv_heads, tokens, -1, head_dim).transpose(0, 1)
    return out.reshape(tokens, heads, head_dim).to(q.dtype)


def _cut_at_chunks(first: int, end: int, chunk_size: int | None) -> list[tuple[int, int]]:
    """Cut the positions [first, end) where a chunk of positions ends."""
    if chunk_size is None:
        return [(first, end)]
    borders = range((first // chunk_size + 1) * chunk_size, end, chunk_size)
    return list(pairwise([first, *borders, end]))


def _runs(table: Sequence[int], begin: int, end: int, block_size: int) -> list[tuple[int, int]]:
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
