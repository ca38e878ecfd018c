"""What a Llama is made of: `LlamaConfig`, read from Hugging Face, Meta or GGUF metadata.

Fields have the names of Hugging Face's `config.json`. Two of its names lie and are not kept: `no_rope_layers`
(1 there means that RoPE *is* used) became `nope_layers`, the indices without RoPE; `layer_types` became
`attention_chunk_size` plus that tuple. Rules of the readers: Transformers 4.57 and 5.23 (`rope_scaling`,
`rope_parameters`), Meta's llama-models 0.3, llama.cpp's GGUF keys.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from puna.errors import ConfigError, UnsupportedError
from puna.model.config_keys import Keys

logger = logging.getLogger(__name__)

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: its base and how it is stretched (see `puna.model.rope`)."""

    rope_theta: float
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] | None = None  # divisors of the frequencies, from a GGUF's rope_freqs


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """All that the modules need to be built, for Llama 2, 3.x (`llama`) and 4 (`llama4_text`)."""

    model_type: Literal["llama", "llama4_text"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the dense MLP; for Llama 4 of each expert and of the shared expert
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    # Llama 4
    intermediate_size_mlp: int = 0  # of the dense layers between mixture-of-experts layers
    num_local_experts: int = 0
    num_experts_per_tok: int = 1
    moe_layers: tuple[int, ...] = ()
    nope_layers: tuple[int, ...] = ()  # layers without RoPE: full attention, tempered queries
    attention_chunk_size: int | None = None  # of the layers with RoPE
    use_qk_norm: bool = False
    attn_temperature_tuning: bool = False
    floor_scale: float = 8192.0
    attn_scale: float = 0.1
    # what the checkpoint says of itself
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None  # "bfloat16", "float16", "float32"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")
        if self.num_experts_per_tok > max(self.num_local_experts, 1):
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} is above "
                f"num_local_experts {self.num_local_experts}"
            )
        for name in ("moe_layers", "nope_layers"):
            outside = [i for i in getattr(self, name) if not 0 <= i < self.num_hidden_layers]
            if outside:
                raise ConfigError(f"{name} {outside} are not among {self.num_hidden_layers} layers")
        factors = self.rope.freq_factors
        if factors is not None and len(factors) != self.head_dim // 2:
            raise ConfigError(f"{len(factors)} rope factors do not fit head_dim {self.head_dim}")

    @property
    def is_llama4(self) -> bool:
        """Say whether RoPE rotates neighbouring pairs and the MLP is called `feed_forward`."""
        return self.model_type == "llama4_text"

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """Read the dict of a `config.json`; a multimodal Llama 4 gives its `text_config`.

        Raises ConfigError naming the key, UnsupportedError naming the model type.
        """
        model_type = values.get("model_type")
        if model_type == "llama":
            return _llama_from_hf(Keys(values))
        if model_type == "llama4_text":
            return _llama4_from_hf(Keys(values))
        if model_type == "llama4":
            text = values.get("text_config")
            if not isinstance(text, Mapping):
                raise ConfigError(f"text_config must be an object, got {text!r}")
            inherited = {k: values[k] for k in ("dtype", "torch_dtype") if k in values and k not in text}
            return _llama4_from_hf(Keys({**inherited, **text}))
        raise UnsupportedError(
            f"model_type {model_type!r} is not supported: Puna runs 'llama', 'llama4' and 'llama4_text'"
        )

    @classmethod
    def from_meta(
        cls, params: Mapping[str, Any], *, vocab_size: int | None = None, tie_word_embeddings: bool = False
    ) -> LlamaConfig:
        """Read Meta's `params.json`; `vocab_size` (of the embedding) replaces a missing or -1 one."""
        nested = params.get("model")
        keys = Keys(nested if isinstance(nested, Mapping) else params)
        return _from_meta(keys, vocab_size, tie_word_embeddings)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        vocab_size: int,
        rope_freqs: Sequence[float] | None = None,
        tie_word_embeddings: bool = False,
    ) -> LlamaConfig:
        """Read a GGUF's metadata; `rope_freqs` are the values of its tensor of that name."""
        return _from_gguf(metadata, vocab_size, rope_freqs, tie_word_embeddings)



# Keys that every Transformers config may carry and that do not change what the network computes.
_HF_IGNORED = frozenset(
    """architectures auto_map model_type transformers_version _name_or_path use_cache initializer_range
    pretraining_tp attention_dropout output_router_logits router_aux_loss_coef router_jitter_noise
    for_llm_compressor is_decoder is_encoder_decoder torchscript output_attentions output_hidden_states
    return_dict quantization_config id2label label2id problem_type chunk_size_feed_forward
    cache_implementation _attn_implementation_autoset _attn_implementation unsloth_version unsloth_fixed
    add_cross_attention tie_encoder_decoder cross_attention_hidden_size use_bfloat16 pruned_heads
    finetuning_task task_specific_params tf_legacy_loss decoder_start_token_id sep_token_id prefix
    layer_types""".split()
)


def _llama_from_hf(keys: Keys) -> LlamaConfig:
    heads = keys.integer("num_attention_heads", 32)
    hidden = keys.integer("hidden_size", 4096)
    max_positions = keys.integer("max_position_embeddings", 2048)
    _require_silu(keys)
    sizes = _hf_sizes(keys, heads, hidden, 1e-6)
    rope = _hf_rope(keys, 10000.0, max_positions, default_type="default")
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
    keys.warn_of_unused(_HF_IGNORED)
    return config


def _llama4_from_hf(keys: Keys) -> LlamaConfig:
    heads = keys.integer("num_attention_heads", 40)
    hidden = keys.integer("hidden_size", 5120)
    layers = keys.integer("num_hidden_layers", 48, high=1024)
    max_positions = keys.integer("max_position_embeddings", 131072)
    experts = keys.integer("num_local_experts", 16, low=0)
    _require_silu(keys)
    keys.default("num_key_value_heads", 8)
    keys.default("head_dim", 128)
    sizes = _hf_sizes(keys, heads, hidden, 1e-5)
    config = LlamaConfig(
        model_type="llama4_text",
        vocab_size=keys.integer("vocab_size", 202048),
        intermediate_size=keys.integer("intermediate_size", 8192),
        intermediate_size_mlp=keys.integer("intermediate_size_mlp", 16384),
        num_hidden_layers=layers,
        max_position_embeddings=max_positions,
        rope=_hf_rope(keys, 500000.0, max_positions, default_type="llama3"),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        attention_bias=keys.boolean("attention_bias", False),
        num_local_experts=experts,
        num_experts_per_tok=keys.integer("num_experts_per_tok", 1),
        moe_layers=_hf_moe_layers(keys, layers, experts),
        nope_layers=_hf_nope_layers(keys, layers),
        attention_chunk_size=keys.optional_integer("attention_chunk_size", 8192),
        use_qk_norm=keys.boolean("use_qk_norm", True),
        attn_temperature_tuning=keys.boolean("attn_temperature_tuning", True),
        floor_scale=keys.number("floor_scale", 8192.0, low=1.0),
        attn_scale=keys.number("attn_scale", 0.1, low=0.0),
        **sizes,
    )
    keys.warn_of_unused(_HF_IGNORED)
    return config


def _hf_sizes(keys: Keys, heads: int, hidden: int, default_eps: float) -> dict[str, Any]:
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
        "bos_token_id": keys.optional_integer("bos_token_id", None, low=-1),
        "eos_token_ids": keys.integers("eos_token_id"),
        "pad_token_id": keys.optional_integer("pad_token_id", None, low=-1),
        "dtype": dtype.removeprefix("torch.") if dtype else None,
    }


def _require_silu(keys: Keys) -> None:
    activation = keys.optional_string("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"hidden_act {activation!r} is not supported: every Llama uses 'silu'")


def _hf_moe_layers(keys: Keys, layers: int, experts: int) -> tuple[int, ...]:
    step = keys.integer("interleave_moe_layer_step", 1, low=0)
    listed = keys.optional_integers("moe_layers")
    if experts == 0:
        return ()
    if listed is not None:
        return listed
    if step == 0:
        raise ConfigError("interleave_moe_layer_step 0 needs moe_layers")
    return tuple(range(step - 1, layers, step))


def _hf_nope_layers(keys: Keys, layers: int) -> tuple[int, ...]:
    interval = keys.integer("no_rope_layer_interval", 4)
    uses_rope = keys.optional_integers("no_rope_layers")  # sic: 1 means that the layer uses RoPE
    if not uses_rope:  # absent, null, or the empty list of the hub's files
        return tuple(i for i in range(layers) if (i + 1) % interval == 0)
    if len(uses_rope) != layers:
        raise ConfigError(f"no_rope_layers has {len(uses_rope)} entries for {layers} layers")
    return tuple(i for i, used in enumerate(uses_rope) if not used)


def _hf_rope(keys: Keys, default_theta: float, max_positions: int, default_type: str) -> RopeConfig:
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



_META_IGNORED = frozenset(
    "vision_args max_batch_size model use_fp8 multiple_of ffn_dim_multiplier capacity_factor".split()
)


def _from_meta(keys: Keys, vocab_size: int | None, tied: bool) -> LlamaConfig:
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
        return _llama4_from_meta(keys, Keys(moe or {}, where="moe_args"), shape, theta, scaled)
    config = LlamaConfig(
        model_type="llama",
        intermediate_size=_meta_ffn_size(keys, hidden),
        max_position_embeddings=keys.optional_integer("max_seq_len", None)
        or (131072 if scaled else 8192 if theta == 500000.0 else 4096),
        rope=_meta_scaled_rope(theta, (hidden, layers)) if scaled else RopeConfig(rope_theta=theta),
        **shape,
    )
    keys.warn_of_unused(_META_IGNORED)
    return config


def _meta_scaled_rope(theta: float, size: tuple[int, int]) -> RopeConfig:
    """Give the llama3 scaling that params.json only hints at: factor 8, but 32 for the 3.2 1B and 3B."""
    return RopeConfig(
        rope_theta=theta,
        rope_type="llama3",
        factor=32.0 if size in ((2048, 16), (3072, 28)) else 8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def _meta_ffn_size(keys: Keys, hidden: int) -> int:
    size = int(2 * 4 * hidden / 3)
    multiplier = keys.optional_number("ffn_dim_multiplier")
    if multiplier is not None:
        size = int(multiplier * size)
    return _round_up(size, keys.integer("multiple_of", 256))


def _llama4_from_meta(
    keys: Keys, moe: Keys, shape: dict[str, Any], theta: float, scaled: bool
) -> LlamaConfig:
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
    keys.warn_of_unused(_META_IGNORED)
    return config


def _round_up(size: int, multiple: int) -> int:
    return multiple * -(-size // multiple)




def _from_gguf(
    metadata: Mapping[str, Any], vocab_size: int, rope_freqs: Sequence[float] | None, tied: bool
) -> LlamaConfig:
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
        raise UnsupportedError(f"head size {head_dim}, rotated {rotated}, value {value_dim}: all must be equal")
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
        "rope": _gguf_rope(keys, context, rope_freqs),
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.optional_integer("bos_token_id", None, low=0),
        "eos_token_ids": tokenizer.integers("eos_token_id"),
    }
    if arch == "llama4":
        return _llama4_from_gguf(keys, shape)
    if keys.integer("expert_count", 0, low=0):
        raise UnsupportedError("expert_count in a 'llama' GGUF is a Mixtral, which is not a Llama")
    return LlamaConfig(
        model_type="llama", intermediate_size=keys.integer("feed_forward_length", None), **shape
    )


def _gguf_rope(keys: Keys, context: int, rope_freqs: Sequence[float] | None) -> RopeConfig:
    theta = keys.number("rope.freq_base", 10000.0, low=0.0, exclusive=True)
    factors = None if rope_freqs is None else tuple(float(f) for f in rope_freqs)
    if factors is not None and not all(f > 0 for f in factors):
        raise ConfigError("rope_freqs.weight must be positive")
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


def _llama4_from_gguf(keys: Keys, shape: dict[str, Any]) -> LlamaConfig:
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
