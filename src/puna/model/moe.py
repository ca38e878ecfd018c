"""Mixture of experts as Llama 4 has it: the guide's picture of it is wrong in four places.

A router in each such layer picks the top k experts (k is 1) for a token; the sigmoid of the logit scales the
expert's *input*; a shared expert sees every token, unscaled; an expert is a SwiGLU MLP without attention.
Source: Transformers 5.23 `models/llama4/modeling_llama4.py`, equal to Meta's `llama4/moe.py`. Only the chosen
experts are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puna.kernels.layer_ops import swiglu
from puna.model.config import LlamaConfig
from puna.model.linear import Linear
from puna.model.mlp import MLP


class Experts(nn.Module):
    """Hold the experts of one layer in two stacked weights, as Hugging Face files do."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * width))  # used as x @ weight
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs, (tokens, hidden).

        x: (tokens, hidden); scores, chosen: (tokens, k), the factor of the input and the expert's number.
        """
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            scaled = x[rows] * scores[rows, place, None]
            gate, up = (scaled @ self.gate_up_proj[expert]).chunk(2, dim=-1)
            out = out.index_add(0, rows, (swiglu(gate, up)) @ self.down_proj[expert])
        return out


class MixtureOfExperts(nn.Module):
    """Send each token to its experts and to the shared one."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (tokens, hidden) to (tokens, hidden)."""
        logits, chosen = self.router(x).topk(self.top_k, dim=-1)
        scores = torch.sigmoid(logits.float()).to(x.dtype)
        shared: Tensor = self.shared_expert(x)
        routed: Tensor = self.experts(x, scores, chosen)
        return shared + routed
