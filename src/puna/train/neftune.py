"""NEFTune: noise on the embeddings of what is trained on (arXiv 2310.05914)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from puna.model.llama import Llama


@contextmanager
def embedding_noise(network: Llama, cu_seqlens: Sequence[int], alpha: float) -> Iterator[None]:
    """Within the block, add uniform noise of at most alpha / sqrt(length * hidden size) to embeddings.

    The length is that of the example a token belongs to, so that packing changes nothing. Draws from torch's
    global generator; an alpha of 0 draws nothing.
    """
    if not alpha:
        yield
        return
    lengths = torch.tensor(cu_seqlens).diff()
    bounds = (alpha / (lengths * network.config.hidden_size).sqrt()).repeat_interleave(lengths)

    def add(module: nn.Module, inputs: object, embedded: Tensor) -> Tensor:
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * bounds.to(embedded)[:, None]

    handle = network.model.embed_tokens.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
