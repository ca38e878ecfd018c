"""The Llama network: tokens in, logits out, for Llama 2, 3 and 4 alike.

A batch is one row of tokens: there is no batch axis and no padding. Positions say where each token stands in
its sequence; the `attention` object says which tokens belong together and keeps the cache, if any. Attribute
names are the keys of Hugging Face checkpoints.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from puna.kernels.dense_linear import linear
from puna.kernels.layer_ops import rms_norm, rotate
from puna.model.attention import Attention
from puna.model.config import LlamaConfig
from puna.model.linear import Linear, apply_all
from puna.model.mlp import MLP, RMSNorm
from puna.model.moe import Experts, MixtureOfExperts
from puna.model.rope import Rope


class SelfAttention(nn.Module):
    """Project to q, k, v; rotate; attend; project back."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.interleaved = config.is_llama4
        self.uses_rope = layer not in config.nope_layers
        self.chunk_size = config.attention_chunk_size if self.uses_rope else None
        self.qk_norm_eps = config.rms_norm_eps if config.use_qk_norm and self.uses_rope else None
        self.tempered = config.attn_temperature_tuning and not self.uses_rope
        self.floor_scale, self.attn_scale = config.floor_scale, config.attn_scale
        hidden, bias = config.hidden_size, config.attention_bias
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden, q_size, bias=bias)
        self.k_proj = Linear(hidden, kv_size, bias=bias)
        self.v_proj = Linear(hidden, kv_size, bias=bias)
        self.o_proj = Linear(q_size, hidden, bias=bias)

    def forward(
        self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], attention: Attention
    ) -> Tensor:
        """Map (tokens, hidden) to (tokens, hidden)."""
        tokens = x.shape[0]
        projected = apply_all(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (each.view(tokens, -1, self.head_dim) for each in projected)
        if self.uses_rope:
            q = rotate(q, *rope, interleaved=self.interleaved)
            k = rotate(k, *rope, interleaved=self.interleaved)
        if self.qk_norm_eps is not None:
            q, k = rms_norm(q, None, self.qk_norm_eps), rms_norm(k, None, self.qk_norm_eps)
        if self.tempered:
            q = (q * self._temperature(positions)).to(q.dtype)
        out = attention(q, k, v, layer=self.layer, scale=self.scale, chunk_size=self.chunk_size)
        return cast(Tensor, self.o_proj(out.reshape(tokens, -1)))

    def _temperature(self, positions: Tensor) -> Tensor:
        """Return what sharpens the queries of far positions in layers without RoPE, (tokens, 1, 1)."""
        steps = torch.floor((positions.float() + 1.0) / self.floor_scale)
        return (1.0 + self.attn_scale * torch.log1p(steps))[:, None, None]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual path."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.is_llama4:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        elif layer in config.moe_layers:
            self.feed_forward: nn.Module = MixtureOfExperts(config)
        else:
            self.feed_forward = MLP(config.hidden_size, config.intermediate_size_mlp, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], attention: Attention
    ) -> Tensor:
        """Map (tokens, hidden) to (tokens, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), positions, rope, attention)
        mlp = self.mlp if hasattr(self, "mlp") else self.feed_forward
        return x + cast(Tensor, mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything before the output head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config.rope, config.head_dim, config.max_position_embeddings)

    def forward(self, input_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Map (tokens,) to the last hidden states, (tokens, hidden), before the final norm."""
        x: Tensor = self.embed_tokens(input_ids)
        lengths = attention.lengths().to(positions.device) if self.rope.needs_lengths else None
        rope = self.rope(positions, lengths)
        for layer in self.layers:
            x = layer(x, positions, rope, attention)
        return x


class Llama(nn.Module):
    """The whole model. Linears and embeddings may be swapped from outside (quantised, LoRA, parallel)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head: nn.Module | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids: Tensor, positions: Tensor, attention: Attention, select: Tensor | None = None
    ) -> Tensor:
        """Return logits, (tokens, vocab), or (len(select), vocab) for the token indices in `select`.

        input_ids, positions: (tokens,) integers.
        """
        x = self.hidden_states(input_ids, positions, attention, select)
        return self.logits(x)

    def hidden_states(
        self, input_ids: Tensor, positions: Tensor, attention: Attention, select: Tensor | None = None
    ) -> Tensor:
        """Return what the output head sees, (tokens or len(select), hidden)."""
        x = self.model(input_ids, positions, attention)
        normed: Tensor = self.model.norm(x if select is None else x[select])
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head, or the transposed embedding where they are tied."""
        if self.lm_head is not None:
            return cast(Tensor, self.lm_head(hidden))
        embedding = self.model.embed_tokens
        if isinstance(embedding, nn.Embedding):
            return linear(hidden, embedding.weight)
        return cast(Tensor, embedding.logits(hidden))  # a quantised table knows how to be a head

    def num_parameters(self) -> int:
        """Count all parameters; tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Count the parameters that one token passes: of the experts only the chosen ones."""
        idle = 0
        for module in self.modules():
            if isinstance(module, Experts):
                expert = sum(p[0].numel() for p in module.parameters())
                idle += expert * (self.config.num_local_experts - self.config.num_experts_per_tok)
        return self.num_parameters() - idle
