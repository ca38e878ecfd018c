"""The two plain building blocks of a layer: SwiGLU and RMSNorm (arXiv 2002.05202, 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puna.kernels.layer_ops import rms_norm, swiglu
from puna.model.linear import Linear, apply_all


class MLP(nn.Module):
    """Compute down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (tokens, hidden) to (tokens, hidden)."""
        gate, up = apply_all(x, self.gate_proj, self.up_proj)
        out: Tensor = self.down_proj(swiglu(gate, up))
        return out


class RMSNorm(nn.Module):
    """Divide by the root mean square, then multiply by a weight, in that order of casts."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        return rms_norm(x, self.weight, self.eps)
