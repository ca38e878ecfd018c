"""cria's network: a Llama of about 3 million parameters, how it starts, and how it is written to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from examples.cria.tokens import SPECIALS, VOCAB_SIZE
from safetensors.torch import save_file
from torch import nn

from puna.model.config import LlamaConfig
from puna.model.llama import Llama

_FIRST_SPECIAL = VOCAB_SIZE - len(SPECIALS)
_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": _FIRST_SPECIAL,
    "eos_token_id": [
        _FIRST_SPECIAL + SPECIALS.index(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    ],
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pad_token_id": _FIRST_SPECIAL + SPECIALS.index("<|finetune_right_pad_id|>"),
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}


def new_model(seed: int) -> Llama:
    """Return the untrained network; what writes to the residual stream starts smaller."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig.from_hf(CONFIG))
    depth = 2 * CONFIG["num_hidden_layers"]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            output = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / depth**0.5 if output else 0.02)
    return model


def write_model(model: Llama, folder: Path) -> None:
    """Write config.json and model.safetensors, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tensors = {
        name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()
    }
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")
