"""Random checkpoints with the shape of real models, made once and kept for the next benchmark."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from puna.catalog.lineup import LINEUP
from puna.model import Llama, LlamaConfig


def make_checkpoint(folder: Path, name: str, *, num_hidden_layers: int | None = None) -> Path:
    """Write a Hugging Face folder with random bfloat16 weights of the lineup's model `name`; return it."""
    facts = next(model for model in LINEUP if model.name == name)
    values = facts.hf_config()
    if num_hidden_layers is not None:
        values["num_hidden_layers"] = num_hidden_layers
    config = LlamaConfig.from_hf(values)
    target = folder / f"{name.lower().replace(' ', '-')}-{config.num_hidden_layers}-layers"
    if (target / "config.json").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = Llama(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, parameter in model.state_dict().items():
        if parameter.dim() == 1:
            tensors[key] = torch.ones(parameter.shape, dtype=torch.bfloat16)
            continue
        scale = 1 / math.sqrt(parameter.shape[-1])
        noise = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(generator=generator)
        tensors[key] = noise * scale
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps({**values, "torch_dtype": "bfloat16"}, indent=1))
    return target
