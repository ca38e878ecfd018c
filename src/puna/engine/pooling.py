"""One vector for a text: the final hidden state of its last token, or the mean over all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from puna.errors import ParameterError
from puna.model import Llama, PackedAttention

Pooling = Literal["last", "mean"]


@torch.inference_mode()
def pool(model: Llama, ids: Sequence[int], pooling: Pooling, *, normalize: bool, max_len: int) -> Tensor:
    """Return (hidden,) in float32, of length 1 if `normalize`."""
    if not ids or len(ids) > max_len:
        raise ParameterError(f"a text to embed must have 1 to {max_len} tokens, got {len(ids)}")
    if pooling not in ("last", "mean"):
        raise ParameterError(f"pooling must be 'last' or 'mean', got {pooling!r}")
    device = model.model.norm.weight.device
    states = model.hidden_states(
        torch.tensor(list(ids), device=device),
        torch.arange(len(ids), device=device),
        PackedAttention([0, len(ids)]),
    ).float()
    vector = states[-1] if pooling == "last" else states.mean(dim=0)
    return functional.normalize(vector, dim=0) if normalize else vector
