"""The Llama lineup as data: dimensions, dates, contexts, names and exact parameter counts.

It knows the text models of Llama 2, 3, 3.1, 3.2 (1B and 3B), 3.3 and 4 (Scout and Maverick), and writes the
`config.json` of each as Hugging Face publishes it. It knows no tensors and reads no files. The figures come
from Meta's model cards and llama-models at a9c89c4, and from the configs that Transformers 4.57 reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LlamaModel:
    """Hold the facts of one model; dimensions use the field names of Hugging Face configs."""

    family: str  # "Llama 3.1"
    size: str  # "8B", "Scout"
    released: date
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # of one expert where there are experts
    vocab_size: int
    context: int  # tokens, of the instruct model
    base_context: int  # tokens, of the base model; equal to context but for Llama 4
    rope_theta: float
    rope_factor: float | None  # of llama3 scaling; None: plain rope
    rope_high_freq_factor: float = 4.0
    tie_word_embeddings: bool
    training_tokens: str
    data_cutoff: str
    hf_base: str | None
    hf_instruct: str
    ollama_tag: str
    licence: str  # a key of puna.catalog.licences.LICENCES
    num_local_experts: int = 0
    interleave_moe_layer_step: int = 0
    intermediate_size_mlp: int = 0  # of dense layers, Llama 4 only
    use_qk_norm: bool = False

    @property
    def name(self) -> str:
        """Return the full name, such as "Llama 3.1 8B"."""
        return f"{self.family} {self.size}"

    @property
    def is_moe(self) -> bool:
        """Say whether some layers choose among experts."""
        return self.num_local_experts > 0

    @property
    def num_moe_layers(self) -> int:
        """Return how many layers hold routed experts."""
        return self.num_hidden_layers // self.interleave_moe_layer_step if self.is_moe else 0

    @property
    def total_parameters(self) -> int:
        """Return the exact number of parameters of the text model, tied embeddings counted once."""
        return (
            self._embedding_parameters
            + self.num_hidden_layers * self._attention_parameters
            + self._ffn(self.num_local_experts)
        )

    @property
    def active_parameters(self) -> int:
        """Return how many parameters one token uses; equal to the total in a dense model."""
        if not self.is_moe:
            return self.total_parameters
        return self._embedding_parameters + self.num_hidden_layers * self._attention_parameters + self._ffn(1)

    @property
    def kv_bytes_per_token(self) -> int:
        """Return the bytes of KV cache that one token takes at 16 bits per value."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * 2

    @property
    def _embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2) + self.hidden_size

    @property
    def _attention_parameters(self) -> int:
        # q and o, k and v, and the two norms of the layer
        q_size, kv_size = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return 2 * self.hidden_size * q_size + 2 * self.hidden_size * kv_size + 2 * self.hidden_size

    def _ffn(self, experts: int) -> int:
        if not self.is_moe:
            return self.num_hidden_layers * 3 * self.hidden_size * self.intermediate_size
        expert = 3 * self.hidden_size * self.intermediate_size
        router = self.hidden_size * self.num_local_experts
        dense = 3 * self.hidden_size * self.intermediate_size_mlp
        num_dense = self.num_hidden_layers - self.num_moe_layers
        return self.num_moe_layers * ((experts + 1) * expert + router) + num_dense * dense

    def hf_config(self, *, instruct: bool = True) -> dict[str, Any]:
        """Return the fields of the published `config.json`, in the dialect of Transformers 4.

        Llama 4 comes as its text part (`model_type` "llama4_text"). Llama 3.3 has no base model: `instruct`
        is then only a choice of stop tokens.
        """
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self._bos_token_id,
            "eos_token_id": self._eos_token_id(instruct),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context if instruct else self.base_context,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": self._rope_scaling(),
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": "float16" if self.family == "Llama 2" else "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
        return self._as_llama4(config) if self.is_moe else config

    def _as_llama4(self, config: dict[str, Any]) -> dict[str, Any]:
        for key in ("mlp_bias", "pretraining_tp"):
            del config[key]
        return config | {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            "pad_token_id": 200018,
            "attention_chunk_size": 8192,
            "attn_scale": 0.1,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "interleave_moe_layer_step": self.interleave_moe_layer_step,
            "intermediate_size_mlp": self.intermediate_size_mlp,
            # 1 means that the layer uses rope, despite the name
            "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(self.num_hidden_layers)],
            "num_experts_per_tok": 1,
            "num_local_experts": self.num_local_experts,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "use_qk_norm": self.use_qk_norm,
        }

    def _rope_scaling(self) -> dict[str, Any] | None:
        if self.rope_factor is None:
            return None
        return {
            "factor": self.rope_factor,
            "high_freq_factor": self.rope_high_freq_factor,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }

    @property
    def _bos_token_id(self) -> int:
        return {32000: 1, 128256: 128000, 202048: 200000}[self.vocab_size]

    def _eos_token_id(self, instruct: bool) -> int | list[int]:
        if self.family == "Llama 2":
            return 2
        if self.family == "Llama 3":
            return [128001, 128009] if instruct else 128001
        if self.is_moe:
            return [200001, 200007, 200008] if instruct else 200001
        return [128001, 128008, 128009] if instruct else 128001


def _llama2(size: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> LlamaModel:
    return LlamaModel(
        family="Llama 2",
        size=size,
        released=date(2023, 7, 18),
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=ffn,
        vocab_size=32000,
        context=4096,
        base_context=4096,
        rope_theta=10000.0,
        rope_factor=None,
        tie_word_embeddings=False,
        training_tokens="2 trillion",
        data_cutoff="September 2022",
        hf_base=f"meta-llama/Llama-2-{size.lower()}-hf",
        hf_instruct=f"meta-llama/Llama-2-{size.lower()}-chat-hf",
        ollama_tag=f"llama2:{size.lower()}",
        licence="llama2",
    )


_LLAMA3_SHAPES = {  # layers, hidden, heads, kv heads, head_dim, ffn
    "1B": (16, 2048, 32, 8, 64, 8192),
    "3B": (28, 3072, 24, 8, 128, 8192),
    "8B": (32, 4096, 32, 8, 128, 14336),
    "70B": (80, 8192, 64, 8, 128, 28672),
    "405B": (126, 16384, 128, 8, 128, 53248),
}


def _llama3(
    version: str, size: str, released: date, *, cutoff: str, hf: str, base: bool = True
) -> LlamaModel:
    layers, hidden, heads, kv_heads, head_dim, ffn = _LLAMA3_SHAPES[size]
    small = version == "3.2"
    context = 8192 if version == "3" else 131072
    factor = {"3": None, "3.2": 32.0}.get(version, 8.0)
    return LlamaModel(
        family=f"Llama {version}",
        size=size,
        released=released,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        vocab_size=128256,
        context=context,
        base_context=context,
        rope_theta=500000.0,
        rope_factor=factor,
        tie_word_embeddings=small,
        training_tokens="up to 9 trillion" if small else "over 15 trillion",
        data_cutoff=cutoff,
        hf_base=f"meta-llama/{hf}" if base else None,
        hf_instruct=f"meta-llama/{hf}-Instruct",
        ollama_tag=f"llama{version}:{size.lower()}",
        licence=f"llama{version}",
    )


def _llama4(
    size: str, experts: int, step: int, context: int, factor: float | None, *, qk_norm: bool, tokens: str
) -> LlamaModel:
    hf = f"meta-llama/Llama-4-{size}-17B-{experts}E"
    return LlamaModel(
        family="Llama 4",
        size=size,
        released=date(2025, 4, 5),
        num_hidden_layers=48,
        hidden_size=5120,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=8192,
        vocab_size=202048,
        context=context,
        base_context=262144,
        rope_theta=500000.0,
        rope_factor=factor,
        rope_high_freq_factor=1.0,
        tie_word_embeddings=False,
        training_tokens=tokens,
        data_cutoff="August 2024",
        hf_base=hf,
        hf_instruct=f"{hf}-Instruct",
        ollama_tag=f"llama4:{size.lower()}",
        licence="llama4",
        num_local_experts=experts,
        interleave_moe_layer_step=step,
        intermediate_size_mlp=16384,
        use_qk_norm=qk_norm,
    )


_APRIL_2024, _JULY_2024 = date(2024, 4, 18), date(2024, 7, 23)
_SEPTEMBER_2024, _DECEMBER_2024 = date(2024, 9, 25), date(2024, 12, 6)

LINEUP: tuple[LlamaModel, ...] = (
    _llama2("7B", 32, 4096, 32, 32, 11008),
    _llama2("13B", 40, 5120, 40, 40, 13824),
    _llama2("70B", 80, 8192, 64, 8, 28672),
    _llama3("3", "8B", _APRIL_2024, cutoff="March 2023", hf="Meta-Llama-3-8B"),
    _llama3("3", "70B", _APRIL_2024, cutoff="December 2023", hf="Meta-Llama-3-70B"),
    _llama3("3.1", "8B", _JULY_2024, cutoff="December 2023", hf="Llama-3.1-8B"),
    _llama3("3.1", "70B", _JULY_2024, cutoff="December 2023", hf="Llama-3.1-70B"),
    _llama3("3.1", "405B", _JULY_2024, cutoff="December 2023", hf="Llama-3.1-405B"),
    _llama3("3.2", "1B", _SEPTEMBER_2024, cutoff="December 2023", hf="Llama-3.2-1B"),
    _llama3("3.2", "3B", _SEPTEMBER_2024, cutoff="December 2023", hf="Llama-3.2-3B"),
    _llama3("3.3", "70B", _DECEMBER_2024, cutoff="December 2023", hf="Llama-3.3-70B", base=False),
    _llama4("Scout", 16, 1, 10485760, 16.0, qk_norm=True, tokens="about 40 trillion"),
    _llama4("Maverick", 128, 2, 1048576, None, qk_norm=False, tokens="about 22 trillion"),
)


def find_model(name: str) -> LlamaModel | None:
    """Return the model called `name` (full name, Hugging Face id or Ollama tag, in any case), or None."""
    wanted = name.strip().lower()
    for model in LINEUP:
        names = (model.name, model.hf_base or "", model.hf_instruct, model.ollama_tag)
        if wanted in {known.lower() for known in names if known}:
            return model
    return None
