"""Read a Hugging Face `config.json` into `LlamaConfig`.

Both dialects of rotary settings are read: Transformers 4.57 (`rope_theta`, `rope_scaling`) and 5.23
(`rope_parameters`). Defaults are those of Transformers' classes, which a file may leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puna.errors import ConfigError, UnsupportedError
from puna.model.config import LlamaConfig, RopeConfig
from puna.model.config_keys import Keys

# Keys that every Transformers config may carry and that do not change what the network computes.
_IGNORED = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    architectures attention_dropout auto_map cache_implementation chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id finetuning_task for_llm_compressor id2label
    initializer_range is_decoder is_encoder_decoder label2id model_type output_attentions
    output_hidden_states output_router_logits prefix pretraining_tp problem_type pruned_heads
    quantization_config return_dict router_aux_loss_coef router_jitter_noise sep_token_id
    task_specific_params tf_legacy_loss tie_encoder_decoder torchscript transformers_version
    unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)


def read(values: Mapping[str, Any]) -> LlamaConfig:
    """See `LlamaConfig.from_hf`."""
    model_type = values.get("model_type")
    if model_type == "llama":
        return _llama(Keys(values))
    if model_type == "llama4_text":
        return _llama4(Keys(values))
    if model_type == "llama4":
        text = values.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError(f"text_config must be an object, got {text!r}")
        inherited = {k: values[k] for k in ("dtype", "torch_dtype") if k in values and k not in text}
        return _llama4(Keys({**inherited, **text}))
    raise UnsupportedError(
        f"model_type {model_type!r} is not supported: Puna runs 'llama', 'llama4' and 'llama4_text'"
    )


def _llama(keys: Keys) -> LlamaConfig:
    heads = keys.integer("num_attention_heads", 32)
    hidden = keys.integer("hidden_size", 4096)
    max_positions = keys.integer("max_position_embeddings", 2048)
    _require_silu(keys)
    sizes = _sizes(keys, heads, hidden, 1e-6)
    rope = _rope(keys, 10000.0, max_positions, default_type="default")
    config = LlamaConfig(
        model_type="llama",
        vocab_size=keys.integer("vocab_size", 32000),
        intermediate_size=keys.integer("intermediate_size", 11008),
        num_hidden_layers=keys.integer("num_hidden_layers", 32, high=1024),
        max_position_embeddings=max_positions,
        rope=rope,
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        attention_bias=keys.boolean("attention_bias", False),
        mlp_bias=keys.boolean("mlp_bias", False),
        **sizes,
    )
    keys.warn_of_unused(_IGNORED)
    return config


def _llama4(keys: Keys) -> LlamaConfig:
    heads = keys.integer("num_attention_heads", 40)
    hidden = keys.integer("hidden_size", 5120)
    layers = keys.integer("num_hidden_layers", 48, high=1024)
    max_positions = keys.integer("max_position_embeddings", 131072)
    experts = keys.integer("num_local_experts", 16, low=0)
    _require_silu(keys)
    nope_layers = _nope_layers(keys, layers)
    _check_layer_types(keys, layers, nope_layers)
    keys.default("num_key_value_heads", 8)
    keys.default("head_dim", 128)
    sizes = _sizes(keys, heads, hidden, 1e-5)
    config = LlamaConfig(
        model_type="llama4_text",
        vocab_size=keys.integer("vocab_size", 202048),
        intermediate_size=keys.integer("intermediate_size", 8192),
        intermediate_size_mlp=keys.integer("intermediate_size_mlp", 16384),
        num_hidden_layers=layers,
        max_position_embeddings=max_positions,
        rope=_rope(keys, 500000.0, max_positions, default_type="llama3"),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        attention_bias=keys.boolean("attention_bias", False),
        num_local_experts=experts,
        num_experts_per_tok=keys.integer("num_experts_per_tok", 1),
        moe_layers=_moe_layers(keys, layers, experts),
        nope_layers=nope_layers,
        attention_chunk_size=keys.optional_integer("attention_chunk_size", 8192),
        use_qk_norm=keys.boolean("use_qk_norm", True),
        attn_temperature_tuning=keys.boolean("attn_temperature_tuning", True),
        floor_scale=keys.number("floor_scale", 8192.0, low=1.0),
        attn_scale=keys.number("attn_scale", 0.1, low=0.0),
        **sizes,
    )
    keys.warn_of_unused(_IGNORED)
    return config


def _sizes(keys: Keys, heads: int, hidden: int, default_eps: float) -> dict[str, Any]:
    head_dim = keys.optional_integer("head_dim", None)
    if head_dim is None:
        if hidden % heads:
            raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    dtype = keys.optional_string("dtype") or keys.optional_string("torch_dtype")
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.optional_integer("num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("rms_norm_eps", default_eps, low=0.0),
        "bos_token_id": _token_id(keys, "bos_token_id"),
        "eos_token_ids": tuple(i for i in keys.integers("eos_token_id") if i >= 0),
        "pad_token_id": _token_id(keys, "pad_token_id"),
        "dtype": dtype.removeprefix("torch.") if dtype else None,
    }


def _token_id(keys: Keys, name: str) -> int | None:
    """Return a token id; old files write -1 for none."""
    value = keys.optional_integer(name, None, low=-1)
    return None if value == -1 else value


def _require_silu(keys: Keys) -> None:
    activation = keys.optional_string("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"hidden_act {activation!r} is not supported: every Llama uses 'silu'")


def _moe_layers(keys: Keys, layers: int, experts: int) -> tuple[int, ...]:
    step = keys.integer("interleave_moe_layer_step", 1, low=0)
    listed = keys.optional_integers("moe_layers")
    if experts == 0:
        return ()
    if listed is not None:
        return listed
    if step == 0:
        raise ConfigError("interleave_moe_layer_step 0 needs moe_layers")
    return tuple(range(step - 1, layers, step))


def _nope_layers(keys: Keys, layers: int) -> tuple[int, ...]:
    interval = keys.integer("no_rope_layer_interval", 4)
    uses_rope = keys.optional_integers("no_rope_layers")  # sic: 1 means that the layer uses RoPE
    if not uses_rope:  # absent, null, or the empty list of the hub's files
        return tuple(i for i in range(layers) if (i + 1) % interval == 0)
    if len(uses_rope) != layers:
        raise ConfigError(f"no_rope_layers has {len(uses_rope)} entries for {layers} layers")
    return tuple(i for i, used in enumerate(uses_rope) if not used)


def _check_layer_types(keys: Keys, layers: int, nope_layers: tuple[int, ...]) -> None:
    """Refuse `layer_types` that say something else than the layers without RoPE do."""
    types = keys.optional_strings("layer_types")
    implied = tuple("full_attention" if i in nope_layers else "chunked_attention" for i in range(layers))
    chunked = keys.optional_integer("attention_chunk_size", 8192) is not None
    if types is not None and chunked and types != implied:
        raise UnsupportedError("layer_types must be full_attention just where no_rope_layers has 0")


def _rope(keys: Keys, default_theta: float, max_positions: int, default_type: str) -> RopeConfig:
    """Read both dialects: `rope_theta` + `rope_scaling` (Transformers 4) and `rope_parameters` (5).

    As in Transformers 5, `rope_scaling` replaces `rope_parameters` where a file has both. `default_type` is
    what a scaling dict without a type means: Transformers 4 takes every one of Llama 4 as llama3.
    """
    theta = keys.number("rope_theta", default_theta, low=0.0, exclusive=True)
    top_original = keys.optional_integer("original_max_position_embeddings", None)
    parameters, scaling = keys.optional_mapping("rope_parameters"), keys.optional_mapping("rope_scaling")
    rope = Keys(scaling or parameters or {"rope_type": "default"}, where="rope_scaling")
    if parameters is not None and scaling is not None:
        theta = Keys(parameters, where="rope_parameters").number("rope_theta", theta, low=0.0, exclusive=True)
    named = rope.optional_string("rope_type")
    old_name = rope.optional_string("type")
    rope_type = named or old_name or (default_type if scaling else "default")
    if rope_type not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise UnsupportedError(
            f"rope type {rope_type!r} is not supported: default, linear, dynamic, llama3 and yarn are"
        )
    if rope.number("partial_rotary_factor", 1.0) != 1.0 or keys.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError("partial_rotary_factor other than 1 is not supported: no Llama uses it")
    original = rope.optional_integer("original_max_position_embeddings", None)
    needs_original = rope_type in ("llama3", "yarn")
    is_llama3 = rope_type == "llama3"
    config = RopeConfig(
        rope_theta=rope.number("rope_theta", theta, low=0.0, exclusive=True),
        rope_type=rope_type,  # type: ignore[arg-type]
        factor=1.0 if rope_type == "default" else rope.number("factor", None, low=0.0, exclusive=True),
        low_freq_factor=rope.number("low_freq_factor", None if is_llama3 else 1.0, low=0.0, exclusive=True),
        high_freq_factor=rope.number("high_freq_factor", None if is_llama3 else 4.0, low=0.0, exclusive=True),
        original_max_position_embeddings=(top_original or original or max_positions)
        if needs_original
        else None,
        attention_factor=rope.optional_number("attention_factor"),
        beta_fast=rope.optional_number("beta_fast") or 32.0,
        beta_slow=rope.optional_number("beta_slow") or 1.0,
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.boolean("truncate", True),
    )
    rope.warn_of_unused(frozenset({"finetuned"}))
    return config
