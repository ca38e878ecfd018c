"""All layers of a dense Llama in one call of the compiled kernels: a short cut around the modules.

The modules of `puna.model` say what a layer does, and they are used wherever something is otherwise: experts,
layers without RoPE, biases, adapters, hooks, whole float32 weights, other devices. For one token, a return to
Python after each operation would cost a fifth of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from puna.engine.paged_cache import PagedAttention
from puna.kernels import compiled
from puna.kernels.dense_linear import prefers_kernel
from puna.model.linear import Linear
from puna.model.llama import DecoderLayer, Llama, SelfAttention
from puna.model.lora_serving import Served
from puna.model.mlp import MLP, RMSNorm
from puna.weights.quant import QuantLinear

if TYPE_CHECKING:
    from puna.kernels.cpu import TiledWeight

    Held = Tensor | TiledWeight

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class CompiledDecoder:
    """Compute what `Llama.hidden_states` does with a `PagedAttention`, without gradients."""

    def __init__(self, model: Llama, kernel: Any, parts: list[tuple[nn.Module, Held]]) -> None:
        self._model = model
        self._kernel = kernel
        self._parts = parts
        self._dtype = model.model.norm.weight.dtype
        self._only_quantized = all(isinstance(module, QuantLinear | RMSNorm) for module, _ in parts)

    @classmethod
    def of(cls, model: Llama) -> Self | None:
        """Return the decoder of a model, or None where it must be computed by its modules."""
        if compiled() is None:
            return None
        from puna.kernels.decoder import Decoder  # needs the compiled kernels

        layers = list(model.model.layers)
        if type(model.model.norm) is not RMSNorm or not all(map(_is_plain, layers)):
            return None
        dtype = model.model.norm.weight.dtype
        parts: list[tuple[nn.Module, Held]] = []
        for layer in layers:
            for module in _parts_of(layer):
                held = _held(module, dtype)
                if held is None:
                    return None
                parts.append((module, held))
        return cls(model, Decoder(model.config, dtype, [held for _, held in parts]), parts)

    def takes(self, attention: PagedAttention, num_tokens: int) -> bool:
        """Say whether the model is still what it was, and this batch one that the kernels compute."""
        if attention.compiled_batch is None or attention.cache.keys[0].dtype == torch.float8_e4m3fn:
            return False
        if not self._only_quantized and not prefers_kernel(self._dtype, num_tokens):
            return False
        current = (part for layer in self._model.model.layers for part in _parts_of(layer))
        return all(
            module is part and _held(module, self._dtype) is held
            for part, (module, held) in zip(current, self._parts, strict=True)
        )

    def hidden_states(
        self, input_ids: Tensor, positions: Tensor, attention: PagedAttention, select: Tensor
    ) -> Tensor:
        """Return what the output head sees for the tokens in `select`; see `Llama.hidden_states`."""
        decoder = self._model.model
        x: Tensor = decoder.embed_tokens(input_ids).to(self._dtype).contiguous()
        lengths = attention.lengths() if decoder.rope.needs_lengths else None
        cos, sin = decoder.rope(positions, lengths)
        self._kernel.run(x, cos, sin, attention.compiled_batch, attention.slots, attention.cache)
        hidden: Tensor = decoder.norm(x[select])
        return hidden


def _is_plain(layer: nn.Module) -> bool:
    """Say whether a layer does nothing that the kernels do not."""
    if type(layer) is not DecoderLayer or type(getattr(layer, "mlp", None)) is not MLP:
        return False
    attention = layer.self_attn
    return (
        type(attention) is SelfAttention
        and attention.uses_rope
        and not attention.interleaved
        and not attention.tempered
        and attention.chunk_size is None
        and attention.qk_norm_eps is None
        and attention.head_dim % 2 == 0
    )


def _parts_of(layer: nn.Module) -> list[nn.Module]:
    """Return the norms and linears of a layer, in the order of the kernel, without what serves adapters."""
    modules = layer._modules
    attention, mlp = modules["self_attn"], modules["mlp"]
    parts = [modules["input_layernorm"], modules["post_attention_layernorm"]]
    parts += [attention._modules[name] for name in _ATTENTION]  # type: ignore[union-attr]
    parts += [mlp._modules[name] for name in _MLP]  # type: ignore[union-attr]
    return [part.base_layer if type(part) is Served else part for part in parts]  # type: ignore[misc]


def _held(module: nn.Module, dtype: torch.dtype) -> Held | None:
    """Return what the kernel reads of a norm or linear, or None where it cannot stand for the module."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is QuantLinear:
        return module.matrix.tiled if module.bias is None else None
    if type(module) is not RMSNorm and (type(module) is not Linear or module.bias is not None):
        return None
    weight = module.weight
    is_norm = type(module) is RMSNorm
    known = weight.is_cpu and weight.is_contiguous() and weight.dtype == dtype
    return weight if known and (is_norm or dtype != torch.float32) else None
