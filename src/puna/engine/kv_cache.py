"""Keys and values of sequences while they grow, and the attention over them.

One contiguous cache per sequence, doubled when full. A row of tokens may hold the next tokens of several
sequences, each with its own cache: prompts and single decoding steps mix freely.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puna.model.attention import causal_attention
from puna.model.config import LlamaConfig


class KVCache:
    """Hold the keys and values of one sequence, for every layer (tokens, num_kv_heads, head_dim)."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        capacity: int = 256,
    ) -> None:
        self.token_ids: list[int] = []  # what is in the cache
        layers = config.num_hidden_layers
        shape = (2, capacity, config.num_key_value_heads, config.head_dim)
        self._layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values behind `length`; return all so far, (length + new, kv_heads, head_dim)."""
        end = self.length + k.shape[0]
        if end > self._layers[layer].shape[1]:
            self._grow(layer, end)
        kept = self._layers[layer]
        kept[0, self.length : end] = k
        kept[1, self.length : end] = v
        return kept[0, :end], kept[1, :end]

    @property
    def length(self) -> int:
        """Return how many tokens are held."""
        return len(self.token_ids)

    def keep_prefix(self, token_ids: Sequence[int]) -> None:
        """Keep what is held of the beginning of `token_ids`, but for the last: its logits are needed."""
        same = 0
        for held, wanted in zip(self.token_ids, token_ids[:-1], strict=False):
            if held != wanted:
                break
            same += 1
        del self.token_ids[same:]

    def _grow(self, layer: int, needed: int) -> None:
        old = self._layers[layer]
        capacity = max(needed, 2 * old.shape[1])
        new = torch.empty((2, capacity, *old.shape[2:]), dtype=old.dtype, device=old.device)
        new[:, : self.length] = old[:, : self.length]
        self._layers[layer] = new


class CachedAttention:
    """Attend over the caches of several sequences; each gets `counts[i]` new tokens of the row.

    The caches take the new tokens when `advance` is called, once the forward pass is through.
    """

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int]) -> None:
        self.caches = caches
        self.counts = counts

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, chunk_size: int | None
    ) -> Tensor:
        """See `puna.model.Attention`."""
        parts, start = [], 0
        for cache, count in zip(self.caches, self.counts, strict=True):
            new = slice(start, start + count)
            keys, values = cache.write(layer, k[new], v[new])
            parts.append(_attend_in_chunks(q[new], keys, values, scale, cache.length, chunk_size))
            start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def lengths(self) -> Tensor:
        """See `puna.model.Attention`."""
        totals = [cache.length + count for cache, count in zip(self.caches, self.counts, strict=True)]
        return torch.tensor(totals).repeat_interleave(torch.tensor(self.counts))

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take the row's ids into the caches."""
        start = 0
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.token_ids.extend(token_ids[start : start + count])
            start += count


def _attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first: int, chunk_size: int | None
) -> Tensor:
    """Attend from positions first, first + 1, ...; cut where a chunk of positions ends."""
    if chunk_size is None:
        return causal_attention(q, k, v, scale)
    parts, position, end = [], first, first + q.shape[0]
    while position < end:
        chunk = position // chunk_size * chunk_size
        stop = min(chunk + chunk_size, end)
        rows = slice(position - first, stop - first)
        parts.append(causal_attention(q[rows], k[chunk:stop], v[chunk:stop], scale))
        position = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)
