"""Read the metadata of a GGUF file into `LlamaConfig`.

Keys and defaults are those of llama.cpp; Llama 4's constants, which it hard-codes, are here too, and the keys
of files that Ollama made. The llama3 scaling of RoPE is not in the metadata but in the tensor rope_freqs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.errors import ConfigError, UnsupportedError
from puna.model.config import LlamaConfig, RopeConfig
from puna.model.config_keys import Keys

# Keys that would change what is computed, with the value that changes nothing.
_NEUTRAL = {
    "attention.scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def read(
    metadata: Mapping[str, Any], vocab_size: int, rope_freqs: Sequence[float] | None, tied: bool
) -> LlamaConfig:
    """See `LlamaConfig.from_gguf`."""
    arch = metadata.get("general.architecture")
    if arch not in ("llama", "llama4"):
        raise UnsupportedError(f"general.architecture {arch!r} is not supported: 'llama' and 'llama4' are")
    keys = Keys(metadata, prefix=f"{arch}.")
    heads = keys.integer("attention.head_count", None)
    hidden = keys.integer("embedding_length", None)
    head_dim = keys.optional_integer("attention.key_length", None)
    head_dim = head_dim or keys.optional_integer("attention.head_dim", None)
    if head_dim is None and hidden % heads:
        raise ConfigError(f"{arch}.embedding_length {hidden} is not a multiple of head_count {heads}")
    head_dim = head_dim or hidden // heads
    rotated = keys.optional_integer("rope.dimension_count", None) or head_dim
    value_dim = keys.optional_integer("attention.value_length", None) or head_dim
    if rotated != head_dim or value_dim != head_dim:
        raise UnsupportedError(
            f"head size {head_dim}, rotated {rotated}, value {value_dim}: all must be equal"
        )
    context = keys.integer("context_length", None)
    tokenizer = Keys(metadata, prefix="tokenizer.ggml.")
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": keys.integer("block_count", None, high=1024),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.optional_integer("attention.head_count_kv", None) or heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", None, low=0.0),
        "rope": _rope(keys, context, rope_freqs),
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.optional_integer("bos_token_id", None, low=0),
        "eos_token_ids": tokenizer.integers("eos_token_id"),
    }
    if arch == "llama4":
        return _llama4(keys, shape)
    if keys.integer("expert_count", 0, low=0):
        raise UnsupportedError("expert_count in a 'llama' GGUF is a Mixtral, which is not a Llama")
    return LlamaConfig(
        model_type="llama", intermediate_size=keys.integer("feed_forward_length", None), **shape
    )


def _rope(keys: Keys, context: int, rope_freqs: Sequence[float] | None) -> RopeConfig:
    theta = keys.number("rope.freq_base", 10000.0, low=0.0, exclusive=True)
    factors = None if rope_freqs is None else tuple(float(f) for f in rope_freqs)
    if factors is not None and not all(f > 0 for f in factors):
        raise ConfigError("rope_freqs.weight must be positive")
    for name, neutral in _NEUTRAL.items():
        value = keys.optional_number(name)
        if value is not None and value != neutral:
            raise UnsupportedError(f"{name} {value:g} in a GGUF is not supported: only {neutral:g} is")
    old_factor = keys.optional_number("rope.scale_linear")
    factor = keys.optional_number("rope.scaling.factor") or old_factor or 1.0
    kind = keys.optional_string("rope.scaling.type") or "linear"
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"rope.scaling.type {kind!r} is not supported: none, linear and yarn are")
    if kind == "none" or factor == 1.0:
        return RopeConfig(rope_theta=theta, freq_factors=factors)
    if kind == "linear":
        return RopeConfig(rope_theta=theta, rope_type="linear", factor=factor, freq_factors=factors)
    return RopeConfig(
        rope_theta=theta,
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=keys.optional_integer("rope.scaling.original_context_length", None)
        or context,
        beta_fast=keys.optional_number("rope.scaling.yarn_beta_fast") or 32.0,
        beta_slow=keys.optional_number("rope.scaling.yarn_beta_slow") or 1.0,
        freq_factors=factors,
    )


def _llama4(keys: Keys, shape: dict[str, Any]) -> LlamaConfig:
    """Add what llama.cpp hard-codes for Llama 4; files that Ollama made write some of it under own keys."""
    layers: int = shape["num_hidden_layers"]
    experts = keys.integer("expert_count", 0, low=0)
    step = keys.integer("interleave_moe_layer_step", 1)
    window = keys.optional_integer("attention.sliding_window", None, low=0)
    chunk = keys.optional_integer("attention.chunk_size", None) or 8192
    everywhere_full = window == 0
    expert_size = keys.optional_integer("expert_feed_forward_length", None)
    expert_size = expert_size or keys.integer("intermediate_size_moe", None)
    dense_size = keys.optional_integer("feed_forward_length", None)
    return LlamaConfig(
        model_type="llama4_text",
        intermediate_size=expert_size,
        intermediate_size_mlp=dense_size or keys.integer("intermediate_size", None),
        num_local_experts=experts,
        num_experts_per_tok=keys.integer("expert_used_count", 1),
        moe_layers=tuple(range(step - 1, layers, step)) if experts else (),
        nope_layers=() if everywhere_full else tuple(range(3, layers, 4)),
        attention_chunk_size=None if everywhere_full else chunk,
        use_qk_norm=keys.boolean("use_qk_norm", experts != 128),
        attn_temperature_tuning=True,
        **shape,
    )
