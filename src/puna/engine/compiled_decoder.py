"""All layers of a dense Llama in one call of the compiled kernels: a short cut around the modules.

The modules of `puna.model` say what a layer does, and they are used wherever something is otherwise: experts,
layers without RoPE, biases, adapters, hooks, whole float32 weights, other devices. For one token, a return to
Python after each operation would cost a fifth of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from puna.engine.paged_cache import PagedAttention
from puna.kernels import compiled
from puna.kernels.dense_linear import prefers_kernel
from puna.model.linear import Linear, is_watched
from puna.model.llama import DecoderLayer, Llama, SelfAttention
from puna.model.lora_serving import Served
from puna.model.mlp import MLP, RMSNorm
from puna.weights.quant import QuantLinear

if TYPE_CHECKING:
    from puna.kernels.cpu import TiledWeight

    Held = Tensor | TiledWeight

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class _Part(NamedTuple):
    """A norm or linear, what the kernel reads of it, and where that lies."""

    module: nn.Module
    held: Held
    address: int


class CompiledDecoder:
    """Compute what `Llama.hidden_states` does with a `PagedAttention`, without gradients."""

    def __init__(self, model: Llama, kernel: Any, parts: list[_Part]) -> None:
        self._model = model
        self._kernel = kernel
        self._parts = parts
        self._dtype = model.model.norm.weight.dtype
        self._only_quantized = all(isinstance(part.module, QuantLinear | RMSNorm) for part in parts)

    @classmethod
    def of(cls, model: Llama) -> Self | None:
        """Return the decoder of a model, or None where it must be computed by its modules."""
        kernels = compiled()
        parts = None if kernels is None else _parts_of(model)
        dtype = model.model.norm.weight.dtype
        if kernels is None or parts is None or not kernels.computes(model.model.norm.weight.detach()):
            return None
        from puna.kernels.decoder import Decoder  # needs the compiled kernels

        try:
            kernel = Decoder(model.config, dtype, [part.held for part in parts])
        except ValueError:  # a layer has another shape than the config says
            return None
        return cls(model, kernel, parts)

    def takes(self, attention: PagedAttention, num_tokens: int) -> bool:
        """Say whether the model is still what it was, and this batch one that the kernels compute."""
        kernels = compiled()
        if kernels is None or attention.compiled_batch is None:
            return False
        if attention.cache.keys[0].dtype == torch.float8_e4m3fn:
            return False
        if not self._only_quantized and not prefers_kernel(self._dtype, num_tokens):
            return False
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._model.parameters()):
            return False
        if not kernels.computes(self._model.model.norm.weight.detach()):  # such as under autocast
            return False
        current = _parts_of(self._model)
        if current is None or len(current) != len(self._parts):
            return False
        return all(map(_same, current, self._parts))

    def hidden_states(
        self, input_ids: Tensor, positions: Tensor, attention: PagedAttention, select: Tensor
    ) -> Tensor:
        """Return what the output head sees for the tokens in `select`; see `Llama.hidden_states`."""
        decoder = self._model.model
        x: Tensor = decoder.embed_tokens(input_ids)
        if x.dtype != self._dtype:  # the layers compute in the dtype of the embedding
            return self._model.hidden_states(input_ids, positions, attention, select)
        x = x.clone(memory_format=torch.contiguous_format)  # it is changed in place
        lengths = attention.lengths() if decoder.rope.needs_lengths else None
        cos, sin = decoder.rope(positions, lengths)
        self._kernel.run(x, cos, sin, attention.compiled_batch, attention.slots, attention.cache)
        hidden: Tensor = decoder.norm(x[select])
        return hidden


def _parts_of(model: Llama) -> list[_Part] | None:
    """Return the norms and linears of all layers in the order of the kernel, behind what serves adapters.

    None: the kernel cannot stand for the modules.
    """
    decoder = model.model
    if type(decoder.norm) is not RMSNorm or is_watched(decoder):
        return None
    parts: list[_Part] = []
    dtype = decoder.norm.weight.dtype
    for index, layer in enumerate(decoder.layers):
        if not _is_plain(layer, index):
            return None
        for module in _modules_of(layer):
            held = _held(module, dtype)
            if held is None:
                return None
            parts.append(_Part(module, held, _address(held)))
    return parts


def _is_plain(layer: nn.Module, index: int) -> bool:
    """Say whether a layer does nothing that the kernels do not."""
    if type(layer) is not DecoderLayer or type(getattr(layer, "mlp", None)) is not MLP:
        return False
    attention = layer.self_attn
    if is_watched(layer) or is_watched(attention) or is_watched(layer.mlp):
        return False
    return (
        type(attention) is SelfAttention
        and attention.layer == index
        and attention.uses_rope
        and not attention.interleaved
        and not attention.tempered
        and attention.chunk_size is None
        and attention.qk_norm_eps is None
        and attention.head_dim % 2 == 0
    )


def _modules_of(layer: nn.Module) -> list[nn.Module]:
    """Return the norms and linears of a layer, in the order of the kernel, without what serves adapters."""
    modules = layer._modules
    attention, mlp = modules["self_attn"], modules["mlp"]
    parts = [modules["input_layernorm"], modules["post_attention_layernorm"]]
    parts += [attention._modules[name] for name in _ATTENTION]  # type: ignore[union-attr]
    parts += [mlp._modules[name] for name in _MLP]  # type: ignore[union-attr]
    served = (type(part) is Served and not is_watched(part) for part in parts)
    return [
        part.base_layer if inside else part  # type: ignore[union-attr, misc]
        for part, inside in zip(parts, served, strict=True)
    ]


def _held(module: nn.Module, dtype: torch.dtype) -> Held | None:
    """Return what the kernel reads of a norm or linear, or None where it cannot stand for the module."""
    if is_watched(module):
        return None
    if type(module) is QuantLinear:
        return None if module.bias is not None or is_watched(module.matrix) else module.matrix.tiled
    if type(module) is not RMSNorm and (type(module) is not Linear or module.bias is not None):
        return None
    weight = module.weight
    is_norm = type(module) is RMSNorm
    known = weight.is_cpu and weight.is_contiguous() and weight.dtype == dtype
    return weight if known and (is_norm or dtype != torch.float32) else None


def _same(one: _Part, other: _Part) -> bool:
    return one.module is other.module and one.held is other.held and one.address == other.address


def _address(held: Held) -> int:
    """Return where the values lie: tensors are moved without becoming other objects."""
    return (held if isinstance(held, Tensor) else held.tiles).data_ptr()
