"""Estimate what a training takes, by part, from shapes alone; no weight is loaded for it.

What torch keeps for the backward pass was counted in the layers as they are written; tests hold the formula
to what is really kept, and the number of trained parameters to that of real adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn

from puna.engine.memory import free_memory
from puna.model.llama import Llama
from puna.model.lora import resolve
from puna.model.lora_config import LoraConfig
from puna.model.lora_match import is_target, pattern_value
from puna.model.moe import Experts
from puna.train.base_model import four_bit_names, is_packed
from puna.train.losses import CHUNK_ROWS
from puna.train.methods import compares
from puna.train.train_config import TrainConfig
from puna.weights.loader import Checkpoint

_FOUR_BITS = 0.5 + (8 / 64 + 32 / (64 * 256)) / 8  # bytes of a value and its share of two levels of scales


def count_parameters(network: Llama, config: TrainConfig) -> int:
    """Count the values of the base model."""
    del config
    return network.num_parameters()


def count_trained(network: Llama, config: TrainConfig) -> int:
    """Count the parameters that would be trained, on a model without memory."""
    if config.method == "full":
        return network.num_parameters()
    lora = resolve(network, config.lora)
    total = sum(
        _adapter_size(module, name, lora)
        for name, module in _with_tied_head(network)
        if is_target(lora, name)
    )
    for name, module in network.named_modules():
        if isinstance(module, Experts):
            total += _experts_size(module, name, lora)
    for wanted in lora.modules_to_save or ():
        saved = (module for name, module in _with_tied_head(network) if name.endswith(wanted))
        total += sum(parameter.numel() for module in saved for parameter in module.parameters())
    return total + _num_token_rows(lora) * network.config.hidden_size + _num_biases(network, lora)


def _with_tied_head(network: Llama) -> list[tuple[str, nn.Module]]:
    modules = list(network.named_modules())
    if network.lm_head is None:
        sizes = network.config.hidden_size, network.config.vocab_size
        modules.append(("lm_head", nn.Linear(*sizes, bias=False, device="meta")))
    return modules


def _adapter_size(module: nn.Module, name: str, lora: LoraConfig) -> int:
    rank = pattern_value(lora.rank_pattern, name, lora.r)
    if isinstance(module, nn.Embedding):
        sizes = module.num_embeddings, module.embedding_dim
    elif isinstance(module, nn.Linear):
        sizes = module.in_features, module.out_features
    else:
        return 0
    return rank * sum(sizes) + sizes[1] * (lora.use_dora + lora.lora_bias)


def _experts_size(module: Experts, name: str, lora: LoraConfig) -> int:
    total = 0
    for leaf, parameter in module.named_parameters():
        full = f"{name}.{leaf}"
        if any(full == t or full.endswith(f".{t}") for t in lora.target_parameters or ()):
            experts, into, out = parameter.shape
            total += pattern_value(lora.rank_pattern, full, lora.r) * experts * (into + out)
    return total


def _num_token_rows(lora: LoraConfig) -> int:
    indices = lora.trainable_token_indices
    if indices is None:
        return 0
    return sum(map(len, indices.values())) if isinstance(indices, Mapping) else len(indices)


def _num_biases(network: Llama, lora: LoraConfig) -> int:
    if lora.bias == "none":
        return 0
    return sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if name.endswith(".bias") and (lora.bias == "all" or is_target(lora, name.removesuffix(".bias")))
    )


def estimate_memory(
    network: Llama,
    config: TrainConfig,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    trained: int,
    tokens: int,
) -> dict[str, int]:
    """Return bytes by part; `tokens` is the most that are computed at once.

    Trained parameters of adapters are float32, those of a whole model have its dtype; AdamW holds two more
    values of each, of a byte each in 8 bits, and where it is paged none on the device if need be.
    """
    full = config.method == "full"
    size = dtype.itemsize if full else 4
    head = network.config.vocab_size * network.config.hidden_size * dtype.itemsize if full else 0
    gradients = trained
    if config.optimizer_in_backward:  # one at a time; that of a tied head is made before
        gradients = max(p.numel() for p in network.parameters())
    moments = 2 if config.optim == "adamw_8bit" else 0 if config.optim.startswith("paged") else 2 * size
    weights = _weight_bytes(network, config, checkpoint, dtype)
    has_copy = full and compares(config.objective)
    logits = 3 * min(tokens, CHUNK_ROWS) * network.config.vocab_size * 4  # with their softmax and gradient
    return {
        "weights": weights,
        **({"reference": weights} if has_copy else {}),
        **({} if full else {"adapter": trained * size}),
        "gradients": gradients * size,
        "optimiser": trained * moments,
        "activations": activation_bytes(network, config, compute_dtype, tokens),
        "loss": logits + head,
    }


def _weight_bytes(network: Llama, config: TrainConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    if is_packed(checkpoint):
        return checkpoint.total_bytes
    packed = set(four_bit_names(network)) if config.method == "qlora" else set()
    sizes = (
        parameter.numel() * (_FOUR_BITS if name in packed else dtype.itemsize)
        for name, parameter in network.named_parameters()
    )
    largest = max(parameter.numel() for parameter in network.parameters()) * 4 if packed else 0
    return int(sum(sizes)) + largest  # a packed weight is made whole again for each product


def activation_bytes(network: Llama, config: TrainConfig, dtype: torch.dtype, tokens: int) -> int:
    """Return what the backward pass needs kept: of all layers, or of one layer and the inputs of all."""
    model = network.config
    layer = _layer_values(network, config, dtype) * tokens
    inputs = model.hidden_size * dtype.itemsize * tokens
    if config.gradient_checkpointing:
        return int(layer + (model.num_hidden_layers + 2) * inputs)
    return int(layer * model.num_hidden_layers + 2 * inputs)


def _layer_values(network: Llama, config: TrainConfig, dtype: torch.dtype) -> int:
    """Return the bytes that a layer keeps of one token."""
    model, size = network.config, dtype.itemsize
    hidden, width = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    if model.is_llama4:  # a shared expert and the chosen ones, or a wide MLP
        width = max(width * (1 + model.num_experts_per_tok), model.intermediate_size_mlp)
    scores = 4 * model.num_attention_heads
    if config.method == "full" or dtype == torch.float32:
        norms = 2 * hidden * (4 + size * (2 if dtype != torch.float32 else 1))
        return norms + size * (3 * q + 4 * kv) + 4 * (q + kv) + scores + 4 * width * size
    # Frozen weights need no inputs kept, but each adapter keeps its own in float32.
    adapters = 4 * (5 * hidden + q + width) + 4 * 7 * config.lora.r
    return 2 * hidden * 4 + size * (2 * q + 2 * kv) + scores + 3 * width * size + adapters


def free_on(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def peak_memory() -> int | None:
    """Return the most bytes that this process has held so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
