"""Read Meta's `params.json` into `LlamaConfig`.

The file leaves much out: the width of the MLP follows from a formula, the context and the scaling of RoPE
from which Llama it is. Rules: llama-models 0.3 (`llama3/args.py`, `llama4/args.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puna.errors import ConfigError, UnsupportedError
from puna.model.config import LlamaConfig, RopeConfig
from puna.model.config_keys import Keys

_IGNORED = frozenset(
    {"vision_args", "max_batch_size", "model", "use_fp8", "multiple_of", "ffn_dim_multiplier"}
)


def read(params: Mapping[str, Any], vocab_size: int | None, tied: bool) -> LlamaConfig:
    """See `LlamaConfig.from_meta`."""
    nested = params.get("model")
    keys = Keys(nested if isinstance(nested, Mapping) else params)
    for name in ("quantization_args", "lora_args"):
        if keys.optional_mapping(name):
            raise UnsupportedError(f"{name} in params.json is not supported: take the bfloat16 checkpoint")
    hidden = keys.integer("dim", None)
    heads = keys.integer("n_heads", None)
    layers = keys.integer("n_layers", None, high=1024)
    vocab = keys.integer("vocab_size", -1, low=-1)
    head_dim = keys.optional_integer("head_dim", None)
    if head_dim is None and hidden % heads:
        raise ConfigError(f"dim {hidden} is not a multiple of n_heads {heads}")
    moe = keys.optional_mapping("moe_args")
    is_llama4 = moe is not None or keys.has("nope_layer_interval")
    scaled = keys.boolean("use_scaled_rope", False)
    theta = keys.number("rope_theta", 500000.0 if is_llama4 else 10000.0, low=0.0, exclusive=True)
    vocab = vocab_size if vocab_size is not None else vocab
    if vocab < 1:
        raise ConfigError(f"vocab_size {vocab} in params.json: give the size of the embedding")
    shape: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.optional_integer("n_kv_heads", None) or heads,
        "head_dim": head_dim or hidden // heads,
        "rms_norm_eps": keys.number("norm_eps", 1e-5, low=0.0),
        "tie_word_embeddings": tied,
    }
    if is_llama4:
        return _llama4(keys, Keys(moe or {}, where="moe_args"), shape, theta, scaled)
    config = LlamaConfig(
        model_type="llama",
        intermediate_size=_ffn_size(keys, hidden),
        max_position_embeddings=keys.optional_integer("max_seq_len", None)
        or (131072 if scaled else 8192 if theta == 500000.0 else 4096),
        rope=_scaled_rope(theta, (hidden, layers)) if scaled else RopeConfig(rope_theta=theta),
        **shape,
    )
    keys.warn_of_unused(_IGNORED)
    return config


def _scaled_rope(theta: float, size: tuple[int, int]) -> RopeConfig:
    """Give the llama3 scaling that params.json only hints at: factor 8, but 32 for the 3.2 1B and 3B."""
    return RopeConfig(
        rope_theta=theta,
        rope_type="llama3",
        factor=32.0 if size in ((2048, 16), (3072, 28)) else 8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def _ffn_size(keys: Keys, hidden: int) -> int:
    size = int(2 * 4 * hidden / 3)
    multiplier = keys.optional_number("ffn_dim_multiplier")
    if multiplier is not None:
        size = int(multiplier * size)
    return _round_up(size, keys.integer("multiple_of", 256))


def _llama4(keys: Keys, moe: Keys, shape: dict[str, Any], theta: float, scaled: bool) -> LlamaConfig:
    layers: int = shape["num_hidden_layers"]
    interval = keys.optional_integer("nope_layer_interval", 4)
    experts = moe.integer("num_experts", 0, low=0)
    dense = int(2 * int(keys.number("ffn_exp", 4.0) * shape["hidden_size"]) / 3)
    dense = int((keys.optional_number("ffn_dim_multiplier") or 1.0) * dense)
    multiple_of = keys.integer("multiple_of", 256)
    expert = dense
    if moe.boolean("auto_scale_F", True):
        expert = int(dense / (moe.number("capacity_factor", 1.0) + moe.integer("top_k", 1)))
    step = moe.integer("interleave_moe_layer_step", 1)
    rope = RopeConfig(rope_theta=theta)
    if scaled:
        rope = RopeConfig(
            rope_theta=theta,
            rope_type="llama3",
            factor=keys.optional_number("rope_scaling_factor") or 16.0,
            low_freq_factor=1.0,
            high_freq_factor=keys.optional_number("rope_high_freq_factor") or 1.0,
            original_max_position_embeddings=8192,
        )
    config = LlamaConfig(
        model_type="llama4_text",
        intermediate_size=_round_up(expert, multiple_of),
        intermediate_size_mlp=_round_up(dense, multiple_of),
        max_position_embeddings=keys.optional_integer("max_seq_len", None) or 262144,
        rope=rope,
        num_local_experts=experts,
        num_experts_per_tok=moe.integer("top_k", 1),
        moe_layers=tuple(range(step - 1, layers, step)) if experts else (),
        nope_layers=tuple(i for i in range(layers) if (i + 1) % interval == 0) if interval else (),
        attention_chunk_size=keys.optional_integer("attention_chunk_size", None),
        use_qk_norm=keys.boolean("use_qk_norm", False),
        attn_temperature_tuning=keys.boolean("attn_temperature_tuning", False),
        floor_scale=keys.number("floor_scale", 8192.0, low=1.0),
        attn_scale=keys.number("attn_scale", 0.1, low=0.0),
        **shape,
    )
    keys.warn_of_unused(_IGNORED)
    return config


def _round_up(size: int, multiple: int) -> int:
    return multiple * -(-size // multiple)
