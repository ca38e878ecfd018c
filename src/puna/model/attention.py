"""What a layer asks of attention, and the plain form of it: several sequences packed in one row.

The model never knows how keys and values are kept: it hands q, k, v to the `attention` object that the caller
passed. `PackedAttention` keeps nothing (training, scoring); caches live in `puna.engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Attention(Protocol):
    """Attend causally, each sequence of the row for itself, and remember what is needed for later."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, chunk_size: int | None
    ) -> Tensor:
        """Return (tokens, num_heads, head_dim).

        q: (tokens, num_heads, head_dim); k, v: (tokens, num_kv_heads, head_dim). With `chunk_size`, position
        p sees only positions from p // chunk_size * chunk_size on.
        """

    def lengths(self) -> Tensor:
        """Return (tokens,): how long the sequence of each token is by now, in tokens."""


class PackedAttention:
    """Attend within each of several sequences that start at position 0, without a cache.

    cu_seqlens: where each sequence starts, and the end: [0, len_0, len_0 + len_1, ...].
    """

    def __init__(self, cu_seqlens: Sequence[int]) -> None:
        self.cu_seqlens = list(cu_seqlens)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, chunk_size: int | None
    ) -> Tensor:
        """See `Attention`."""
        borders = self.cu_seqlens if chunk_size is None else self._chunk_borders(chunk_size)
        parts = [
            causal_attention(q[start:end], k[start:end], v[start:end], scale)
            for start, end in zip(borders, borders[1:], strict=False)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def lengths(self) -> Tensor:
        """See `Attention`."""
        sizes = torch.tensor(self.cu_seqlens).diff()
        return sizes.repeat_interleave(sizes)

    def _chunk_borders(self, chunk_size: int) -> list[int]:
        borders = [
            border
            for start, end in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)
            for border in range(start, end, chunk_size)
        ]
        return [*borders, self.cu_seqlens[-1]]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend from the last rows of k on: query i sees keys up to len(k) - len(q) + i.

    Shapes as in `Attention`, with at least as many keys as queries; the score matrix is never whole.
    """
    queries, keys = q.shape[0], k.shape[0]
    if queries == 1:
        return _attend_to_all(q, k, v, scale)
    if queries == keys:
        return _attend(q, k, v, scale, causal=True)
    blocks = []
    for start in range(0, queries, _QUERY_BLOCK):
        block = q[start : start + _QUERY_BLOCK]
        seen = keys - queries + start + block.shape[0]
        rows = torch.arange(seen - block.shape[0], seen, device=q.device)
        mask = rows[:, None] >= torch.arange(seen, device=q.device)
        blocks.append(_attend(block, k[:seen], v[:seen], scale, mask=mask))
    return torch.cat(blocks)


_QUERY_BLOCK = 512  # bounds the mask of a continued prompt


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend with one query: the heads that share a kv head become rows, so k and v are read once."""
    kv_heads = k.shape[1]
    rows = q.view(kv_heads, -1, q.shape[2]).transpose(0, 1)  # (group, kv_heads, head_dim)
    out = _attend(rows, k, v, scale)
    return out.transpose(0, 1).reshape(1, -1, q.shape[2])
