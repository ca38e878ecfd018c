"""Say a model in GGUF's words: metadata of its config, names and row order of its tensors.

The way back of `gguf.py`: rows of q and k are put in the order in which rotary pairs are neighbours, stacked
experts are split into gate and up and turned to (experts, out, in), and Llama 3's stretched rotary
frequencies become a tensor. Keys and names are those that llama.cpp's `convert_hf_to_gguf.py` writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from puna.errors import UnsupportedError
from puna.gguf_header import Value
from puna.model.config import LlamaConfig, RopeConfig
from puna.model.rope import inverse_frequencies
from puna.weights.gguf import BLOCK_NAMES, EXPERT_NAMES, TOP_NAMES
from puna.weights.packed_matrix import QuantTensor

ROPE_FREQS = "rope_freqs.weight"

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERTS = re.compile(r"model\.layers\.(\d+)\.feed_forward\.experts\.(gate_up|gate|up|down)_proj")
_TOP = {ours: theirs for theirs, ours in TOP_NAMES.items()}
_PARTS = {
    ours.format(mlp=mlp): theirs for theirs, ours in BLOCK_NAMES.items() for mlp in ("mlp", "feed_forward")
}
_EXPERT_PARTS = {ours.removesuffix("_proj"): theirs for theirs, ours in EXPERT_NAMES.items()}


def gguf_metadata(config: LlamaConfig, name: str) -> dict[str, Value]:
    """Return the keys that describe the network. Raises UnsupportedError for what GGUF has no key for."""
    arch = "llama4" if config.is_llama4 else "llama"
    keys: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope.rope_theta),
        **_rope_keys(config.rope),
    }
    if config.is_llama4:
        keys |= _llama4_keys(config)
    general: dict[str, Value] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
    }
    return general | {f"{arch}.{key}": value for key, value in keys.items()}


def _rope_keys(rope: RopeConfig) -> dict[str, Value]:
    if rope.rope_type in ("default", "llama3"):
        return {}
    if rope.rope_type == "dynamic":
        raise UnsupportedError("rope_type 'dynamic' cannot be written to GGUF, which has no key for it")
    keys: dict[str, Value] = {
        "rope.scaling.type": rope.rope_type,
        "rope.scaling.factor": float(rope.factor),
    }
    if rope.rope_type == "yarn":
        if rope.attention_factor is not None or rope.mscale or rope.mscale_all_dim or not rope.truncate:
            raise UnsupportedError("yarn with an attention factor of its own cannot be written to GGUF")
        if rope.original_max_position_embeddings is not None:
            keys["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
        keys["rope.scaling.yarn_beta_fast"] = float(rope.beta_fast)
        keys["rope.scaling.yarn_beta_slow"] = float(rope.beta_slow)
    return keys


def _llama4_keys(config: LlamaConfig) -> dict[str, Value]:
    step = config.moe_layers[0] + 1 if config.moe_layers else 1
    layers = config.num_hidden_layers
    if config.moe_layers and config.moe_layers != tuple(range(step - 1, layers, step)):
        raise UnsupportedError(f"moe_layers {list(config.moe_layers)} are not evenly spaced: GGUF has no key")
    usual = (tuple(range(3, layers, 4)), 8192)
    if (config.nope_layers, config.attention_chunk_size) not in (usual, ((), None)):
        raise UnsupportedError("nope_layers, attention_chunk_size are not Llama 4's: GGUF has no key")
    if (config.floor_scale, config.attn_scale) != (8192.0, 0.1) or not config.attn_temperature_tuning:
        raise UnsupportedError("attention temperatures are not Llama 4's: GGUF has no key for them")
    if config.use_qk_norm == (config.num_local_experts == 128):
        raise UnsupportedError("use_qk_norm is not as GGUF infers it from the number of experts")
    return {
        "feed_forward_length": config.intermediate_size_mlp,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "interleave_moe_layer_step": step,
        "attention.sliding_window": config.attention_chunk_size or 0,
    }


def rope_factors(config: LlamaConfig) -> Tensor | None:
    """Return what rotary frequencies are divided by, (head_dim / 2,), or None where it is all in the keys."""
    rope = config.rope
    if rope.rope_type == "llama3":
        plain = RopeConfig(rope_theta=rope.rope_theta)
        return inverse_frequencies(plain, config.head_dim) / inverse_frequencies(rope, config.head_dim)
    if rope.freq_factors is not None:
        return torch.tensor(rope.freq_factors, dtype=torch.float32)
    return None


def gguf_shapes(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors that a parameter of our model becomes: GGUF name and shape."""
    experts = _EXPERTS.fullmatch(name)
    if experts is None:
        yield _plain_name(name), shape
        return
    count, size_in, size_out = shape
    for part in _expert_parts(experts[2]):
        wide = size_out // 2 if experts[2] == "gate_up" else size_out
        yield f"blk.{experts[1]}.{_EXPERT_PARTS[part]}.weight", (count, wide, size_in)


def gguf_tensors(
    name: str, value: Tensor | QuantTensor, config: LlamaConfig
) -> Iterator[tuple[str, Tensor | QuantTensor]]:
    """Yield (GGUF name, tensor) for a tensor under our name, float or packed."""
    experts = _EXPERTS.fullmatch(name)
    if experts is None:
        theirs = _plain_name(name)
        yield theirs, _permuted(theirs, value, config)
        return
    parts = _expert_parts(experts[2])
    if isinstance(value, QuantTensor):  # packed as (experts, out, in) already, one part by itself
        yield f"blk.{experts[1]}.{_EXPERT_PARTS[parts[0]]}.weight", value
        return
    for part, piece in zip(parts, value.chunk(len(parts), dim=-1), strict=True):
        yield f"blk.{experts[1]}.{_EXPERT_PARTS[part]}.weight", piece.transpose(1, 2)


def _expert_parts(projection: str) -> tuple[str, ...]:
    return ("gate", "up") if projection == "gate_up" else (projection,)


def _plain_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _PARTS:
        raise UnsupportedError(f"{name} has no name in GGUF")
    return f"blk.{match[1]}.{_PARTS[match[2]]}.{match[3]}"


def _permuted(name: str, value: Tensor | QuantTensor, config: LlamaConfig) -> Tensor | QuantTensor:
    """Put the rows of q and k of Llama 2 and 3 in GGUF's order: rotary pairs side by side."""
    part = name.split(".")[2] if name.startswith("blk.") else ""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
    if config.is_llama4 or heads is None:
        return value
    order = torch.arange(value.shape[0]).view(heads, 2, config.head_dim // 2).transpose(1, 2).reshape(-1)
    return value.rows(order) if isinstance(value, QuantTensor) else value[order]
