"""What a Llama is made of: `LlamaConfig`, read from Hugging Face, Meta or GGUF metadata.

Fields have the names of Hugging Face's `config.json`. Two of its names lie and are not kept: `no_rope_layers`
(1 there means that RoPE *is* used) became `nope_layers`, the indices without RoPE; `layer_types` became
`attention_chunk_size` plus that tuple. The readers are in `config_hf`, `config_meta` and `config_gguf`; they
build this class, so it imports them when called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from puna.errors import ConfigError

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

    @property
    def context_length(self) -> int:
        """Return how many tokens the model is made for, stretched where its RoPE is."""
        if self.rope.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """Read the dict of a `config.json`; a multimodal Llama 4 gives its `text_config`.

        Raises ConfigError naming the key, UnsupportedError naming the model type.
        """
        from puna.model.config_hf import read

        return read(values)

    @classmethod
    def from_meta(
        cls, params: Mapping[str, Any], *, vocab_size: int | None = None, tie_word_embeddings: bool = False
    ) -> LlamaConfig:
        """Read Meta's `params.json`; `vocab_size` (of the embedding) replaces a missing or -1 one."""
        from puna.model.config_meta import read

        return read(params, vocab_size, tie_word_embeddings)

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
        from puna.model.config_gguf import read

        return read(metadata, vocab_size, rope_freqs, tie_word_embeddings)
