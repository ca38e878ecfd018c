"""Tiny random models: Transformers' own, and Puna's twin with the same weights."""

from __future__ import annotations

from typing import Any

import torch

from puna.model import Llama, LlamaConfig

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def hf_llama(**changes: Any) -> Any:
    """Make a random two-layer `LlamaForCausalLM` in float32."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    values = {**_SIZES, "num_hidden_layers": 2, "max_position_embeddings": 256, **changes}
    return _randomise(LlamaForCausalLM(HFConfig(**values)))


def hf_llama4(**changes: Any) -> Any:
    """Make a random four-layer `Llama4ForCausalLM`: chunks of 8, temperature steps of 4."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    values = {
        **_SIZES,
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 72,
        "head_dim": 8,
        "num_local_experts": 4,
        "attention_chunk_size": 8,
        "floor_scale": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        **changes,
    }
    return _randomise(Llama4ForCausalLM(Llama4TextConfig(**values)))


def puna_twin(theirs: Any) -> Llama:
    """Build our model from the config and weights of a Transformers one."""
    config = LlamaConfig.from_hf(theirs.config.to_dict())
    with torch.device("meta"):
        ours = Llama(config)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    ours.load_state_dict(state, assign=True)
    return ours.eval().requires_grad_(False)


def _randomise(model: Any) -> Any:
    """Fill all parameters with values that make every term count, norms and biases included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                fan_in = parameter.shape[-1] if parameter.dim() < 3 else parameter.shape[-2]
                parameter.copy_(noise * (fan_in**-0.5 if parameter.dim() > 1 else 0.5))
    return model.eval().float()
