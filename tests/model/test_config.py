"""Configs from all kinds of metadata, the lineup's parameter counts, and refusals that name the key."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from puna.catalog.lineup import LINEUP, LlamaModel
from puna.errors import ConfigError, UnsupportedError
from puna.model import Llama, LlamaConfig, RopeConfig

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}


@pytest.mark.parametrize("model", LINEUP, ids=lambda model: model.name)
def test_the_lineup_builds_and_counts_as_published(model: LlamaModel) -> None:
    with torch.device("meta"):
        built = Llama(LlamaConfig.from_hf(model.hf_config()))
    assert built.num_parameters() == model.total_parameters
    assert built.num_active_parameters() == model.active_parameters


def test_published_counts_are_those_of_the_reference() -> None:
    counts = {model.name: model.total_parameters for model in LINEUP}
    assert counts["Llama 3.1 8B"] == 8_030_261_248
    assert counts["Llama 3.2 1B"] == 1_235_814_400
    assert counts["Llama 3.1 405B"] == 405_853_388_800
    assert counts["Llama 4 Maverick"] == 400_711_848_960
    maverick = next(model for model in LINEUP if model.name == "Llama 4 Maverick")
    assert maverick.active_parameters == 17_184_691_200


def test_hf_defaults_are_those_of_transformers() -> None:
    config = LlamaConfig.from_hf({"model_type": "llama"})
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 4096, 11008)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (32, 32, 128)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 2048)
    assert config.rope == RopeConfig(rope_theta=10000.0)


def test_both_dialects_of_rope_give_the_same_config() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    older = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    configs = [LlamaConfig.from_hf({**TINY, **dialect}).rope for dialect in (old, older, new)]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].rope_theta == 5e5 and configs[0].original_max_position_embeddings == 8192


def test_plain_rope_parameters_carry_the_theta() -> None:
    config = LlamaConfig.from_hf({**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 3e5}})
    assert config.rope == RopeConfig(rope_theta=3e5)


def test_llama4_hub_files_are_read() -> None:
    text = {
        "model_type": "llama4_text",
        "attn_temperature_tuning": 4,
        "no_rope_layers": [],
        "num_hidden_layers": 8,
        "eos_token_id": [200001, 200007, 200008],
        "rope_scaling": {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
    }
    config = LlamaConfig.from_hf({"model_type": "llama4", "text_config": text, "torch_dtype": "bfloat16"})
    assert config.nope_layers == (3, 7) and config.moe_layers == tuple(range(8))
    assert config.attn_temperature_tuning and config.dtype == "bfloat16"
    assert config.rope.rope_type == "llama3"  # Transformers 4 takes every scaling of Llama 4 so
    assert config.eos_token_ids == (200001, 200007, 200008)


def test_guard_4_is_dense_with_rope_everywhere() -> None:
    values = {
        "model_type": "llama4_text",
        "num_hidden_layers": 6,
        "num_local_experts": 0,
        "moe_layers": [],
        "interleave_moe_layer_step": 0,
        "no_rope_layer_interval": 80,
        "attention_chunk_size": None,
    }
    config = LlamaConfig.from_hf(values)
    assert config.moe_layers == () and config.nope_layers == () and config.attention_chunk_size is None


@pytest.mark.parametrize(
    ("params", "ffn", "rope_factor"),
    [
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256}, 11008, None),
        (
            {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
            28672,
            None,
        ),
        (
            {"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2}
            | {"use_scaled_rope": True},
            53248,
            8.0,
        ),
        (
            {"dim": 2048, "n_layers": 16, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5}
            | {"use_scaled_rope": True},
            8192,
            32.0,
        ),
    ],
)
def test_meta_params(params: dict[str, Any], ffn: int, rope_factor: float | None) -> None:
    config = LlamaConfig.from_meta({**params, "norm_eps": 1e-5, "vocab_size": -1}, vocab_size=1000)
    assert config.intermediate_size == ffn and config.vocab_size == 1000
    assert config.rope.factor == (rope_factor or 1.0)
    assert LlamaConfig.from_meta({"model": params}, vocab_size=1000) == config


def test_meta_llama4_widths_are_those_of_scout() -> None:
    params = {
        "dim": 5120,
        "n_layers": 48,
        "n_heads": 40,
        "n_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 202048,
        "multiple_of": 2048,
        "ffn_dim_multiplier": 1.2,
        "use_scaled_rope": True,
        "use_qk_norm": True,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "moe_args": {"num_experts": 16, "top_k": 1, "auto_scale_F": True},
    }
    config = LlamaConfig.from_meta(params)
    assert (config.intermediate_size, config.intermediate_size_mlp) == (8192, 16384)
    assert config.rope.factor == 16.0 and config.rope.low_freq_factor == config.rope.high_freq_factor == 1.0
    assert len(config.moe_layers) == 48 and len(config.nope_layers) == 12


GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 80,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "tokenizer.ggml.eos_token_id": 2,
}


def test_gguf_metadata() -> None:
    config = LlamaConfig.from_gguf(GGUF, vocab_size=96, rope_freqs=[1.0, 1.0, 4.0, 8.0])
    expected = LlamaConfig.from_hf(TINY | {"num_key_value_heads": 2, "rope_theta": 5e5, "rms_norm_eps": 1e-5})
    assert config.rope.freq_factors == (1.0, 1.0, 4.0, 8.0)
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (64, 8, 2)
    assert config.rms_norm_eps == expected.rms_norm_eps and config.eos_token_ids == (2,)


def test_gguf_llama4_has_the_constants_that_the_file_leaves_out() -> None:
    values = {key.replace("llama.", "llama4."): value for key, value in GGUF.items()}
    values |= {"general.architecture": "llama4", "llama4.block_count": 8, "llama4.expert_count": 16}
    values |= {"llama4.interleave_moe_layer_step": 2, "llama4.expert_feed_forward_length": 40}
    config = LlamaConfig.from_gguf(values, vocab_size=96)
    assert config.use_qk_norm and config.attn_temperature_tuning and config.attention_chunk_size == 8192
    assert config.moe_layers == (1, 3, 5, 7) and config.nope_layers == (3, 7)
    maverick = LlamaConfig.from_gguf(values | {"llama4.expert_count": 128}, vocab_size=96)
    assert not maverick.use_qk_norm
    full = LlamaConfig.from_gguf(values | {"llama4.attention.sliding_window": 0}, vocab_size=96)
    assert full.attention_chunk_size is None and full.nope_layers == ()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vocab_size": 10**12}, ConfigError, "vocab_size"),
        ({"vocab_size": "8"}, ConfigError, "vocab_size"),
        ({"vocab_size": True}, ConfigError, "vocab_size"),
        ({"hidden_size": -64}, ConfigError, "hidden_size"),
        ({"hidden_size": 65}, ConfigError, "multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, ConfigError, "multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, ConfigError, "head_dim 7 is odd"),
        ({"num_hidden_layers": 10**6}, ConfigError, "num_hidden_layers"),
        ({"rms_norm_eps": "small"}, ConfigError, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act 'gelu'"),
        ({"rope_theta": 0}, ConfigError, "rope_theta"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, UnsupportedError, "'longrope'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, ConfigError, r"rope_scaling\.factor"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, ConfigError, r"rope_scaling\.factor"),
        ({"rope_scaling": {"type": "linear"}}, ConfigError, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, ConfigError, "low_freq_factor is missing"),
        ({"rope_scaling": "linear"}, ConfigError, "rope_scaling must be an object"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
        ({"model_type": "mllama"}, UnsupportedError, "'mllama'"),
        ({"model_type": "llama4"}, ConfigError, "text_config"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LlamaConfig.from_hf({**TINY, **change})


def test_minus_one_means_no_token() -> None:
    config = LlamaConfig.from_hf({**TINY, "pad_token_id": -1, "bos_token_id": -1, "eos_token_id": [-1, 2]})
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_ids) == (None, None, (2,))


def test_gguf_keys_that_would_change_the_numbers_are_refused() -> None:
    for name in ("attention.scale", "rope.scaling.attn_factor"):
        with pytest.raises(UnsupportedError, match=name):
            LlamaConfig.from_gguf(GGUF | {f"llama.{name}": 2.0}, vocab_size=96)


def test_keys_that_nobody_reads_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        LlamaConfig.from_hf({**TINY, "sliding_window": 4096, "use_cache": True})
    assert "sliding_window" in caplog.text and "use_cache" not in caplog.text
