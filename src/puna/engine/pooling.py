"""One vector for a text: the final hidden state of its last token, or the mean over all tokens.

`PoolingParams` has vLLM's names; what Puna lacks of them is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from puna.errors import ParameterError, UnsupportedError
from puna.model import Llama, PackedAttention

Pooling = Literal["last", "mean", "all"]
PoolingTask = Literal["embed", "token_embed"]


@dataclass
class PoolingParams:
    """Say what to make of the hidden states of a prompt. `use_activation` None: vectors of length 1."""

    use_activation: bool | None = None
    dimensions: int | None = None  # refused
    task: str | None = None
    step_tag_id: int | None = None  # refused
    returned_token_ids: Sequence[int] | None = None  # refused
    skip_reading_prefix_cache: bool | None = None  # pooling never reads it
    extra_kwargs: dict[str, Any] | None = None  # refused

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            raise UnsupportedError(
                f"dimensions={self.dimensions}: Llama's hidden states are not Matryoshka vectors"
            )
        for name in ("step_tag_id", "returned_token_ids", "extra_kwargs"):
            if getattr(self, name):
                raise UnsupportedError(f"{name}={getattr(self, name)!r} is not supported")
        if self.task in ("classify", "score", "token_classify", "plugin"):
            raise UnsupportedError(f"task {self.task!r} needs a model with a head for it; 'embed' does not")
        if self.task not in (None, "embed", "token_embed"):
            raise ParameterError(f"task must be 'embed' or 'token_embed', got {self.task!r}")

    @property
    def normalize(self) -> bool:
        """Say whether vectors get length 1."""
        return self.use_activation is not False

    def clone(self) -> PoolingParams:
        """Return an independent copy."""
        return PoolingParams(**vars(self))


@torch.inference_mode()
def pool(model: Llama, ids: Sequence[int], pooling: Pooling, *, normalize: bool, max_len: int) -> Tensor:
    """Return (hidden,) in float32, of length 1 if `normalize`; (tokens, hidden) where pooling is "all"."""
    if not ids or len(ids) > max_len:
        raise ParameterError(f"a text to embed must have 1 to {max_len} tokens, got {len(ids)}")
    if pooling not in ("last", "mean", "all"):
        raise ParameterError(f"pooling must be 'last', 'mean' or 'all', got {pooling!r}")
    device = model.model.norm.weight.device
    states = model.hidden_states(
        torch.tensor(list(ids), device=device),
        torch.arange(len(ids), device=device),
        PackedAttention([0, len(ids)]),
    ).float()
    pooled = {"last": states[-1], "mean": states.mean(dim=0), "all": states}[pooling]
    return functional.normalize(pooled, dim=-1) if normalize else pooled
