"""Make one adapter out of several with weights: what PEFT 0.21 calls linear, cat and svd.

"cat" puts the factors side by side and is exact; "svd" is the best adapter of a given rank; "linear" adds the
factors themselves, each with the square root of its weight, which is not the sum of what the adapters do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from puna.errors import ParameterError, UnsupportedError
from puna.model.llama import Llama
from puna.model.lora import adapter_modules
from puna.model.lora_config import LoraConfig
from puna.model.lora_layers import LoraEmbedding, LoraLayer

KINDS = ("svd", "linear", "cat")
_SAME = ("layers_to_transform", "layers_pattern", "exclude_modules")
_NOT_COMBINED: dict[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
}


def combined_config(configs: Mapping[str, LoraConfig], kind: str, svd_rank: int | None) -> LoraConfig:
    """Return the config of the sum: of the first adapter, with the targets of all and a scale of 1.

    Raises ParameterError for adapters that do not go together, UnsupportedError naming what is not combined.
    """
    if kind not in KINDS:
        raise UnsupportedError(f"combination_type {kind!r} is not supported: {', '.join(KINDS)} are")
    for adapter, config in configs.items():
        _require_plain(adapter, config)
    first = next(iter(configs.values()))
    for name in _SAME:
        if any(getattr(config, name) != getattr(first, name) for config in configs.values()):
            raise ParameterError(f"adapters with different {name} cannot be combined: {list(configs)}")
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs.values()]
    if kind == "linear" and len(set(ranks)) > 1:
        raise ParameterError(f"combination_type 'linear' needs adapters of one rank, got {ranks}")
    rank = {"linear": ranks[0], "cat": sum(ranks), "svd": svd_rank or max(ranks)}[kind]
    return dataclasses.replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,  # PEFT leaves it on, and its sum is too large by the root of the rank
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        target_modules=_all_targets(configs),
        inference_mode=True,
    )


@torch.no_grad()
def fill_combined(
    network: Llama,
    adapter: str,
    weights: Mapping[str, float],
    kind: str,
    *,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
) -> None:
    """Give `adapter`, which is in the model, the weighted sum of the others, module by module."""
    for _, module in adapter_modules(network):
        if not isinstance(module, LoraLayer) or adapter not in module.adapter_names():
            continue
        parts = {name: weight for name, weight in weights.items() if name in module.adapter_names()}
        target_a, target_b = factors(module, adapter)
        target_a.zero_()
        target_b.zero_()
        if not parts:
            continue
        if kind == "cat":
            a, b = _cat(module, parts)
        elif kind == "linear":
            a, b = _linear(module, parts)
        else:
            a, b = _svd(module, parts, target_a.shape[0], svd_clamp, svd_full_matrices, svd_driver)
        target_a[: a.shape[0]] = a
        target_b[:, : b.shape[1]] = b


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return A, (rank, in), and B, (out, rank), of an adapter: the live parameters."""
    state = layer.adapter_state(adapter)
    if isinstance(layer, LoraEmbedding):
        return state["lora_embedding_A"], state["lora_embedding_B"]
    return state["lora_A.weight"], state["lora_B.weight"]


def _require_plain(adapter: str, config: LoraConfig) -> None:
    for name, default in _NOT_COMBINED.items():
        if getattr(config, name) != default and getattr(config, name):
            raise UnsupportedError(f"adapter {adapter!r} cannot be combined with others: it has {name}")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(("pissa", "olora")):
        raise UnsupportedError(
            f"adapter {adapter!r} cannot be combined with others: it changed the base weights"
        )


def _all_targets(configs: Mapping[str, LoraConfig]) -> Sequence[str] | str:
    targets = [config.target_modules for config in configs.values()]
    if all(isinstance(target, str) for target in targets):
        return "|".join(f"({target})" for target in targets)
    if any(isinstance(target, str) for target in targets):
        raise ParameterError("target_modules must be all lists or all strings to be combined")
    return sorted({name for target in targets for name in target or ()})


def _cat(layer: LoraLayer, parts: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    pairs = [(*factors(layer, name), weight * layer.scaling[name]) for name, weight in parts.items()]
    return torch.cat([a * scale for a, _, scale in pairs]), torch.cat([b for _, b, _ in pairs], dim=1)


def _linear(layer: LoraLayer, parts: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    pairs = [(*factors(layer, name), weight * layer.scaling[name]) for name, weight in parts.items()]
    if len({a.shape for a, _, _ in pairs}) > 1:
        raise ParameterError("combination_type 'linear' needs adapters of one rank in every module")
    roots = torch.tensor([math.sqrt(abs(scale)) for _, _, scale in pairs], device=pairs[0][0].device)
    signs = torch.tensor([1.0 if scale >= 0 else -1.0 for _, _, scale in pairs], device=roots.device)
    a = (torch.stack([a for a, _, _ in pairs]) * (roots * signs)[:, None, None]).sum(dim=0)
    return a, (torch.stack([b for _, b, _ in pairs]) * roots[:, None, None]).sum(dim=0)


def _svd(
    layer: LoraLayer,
    parts: Mapping[str, float],
    rank: int,
    clamp: float | None,
    full_matrices: bool,
    driver: str | None,
) -> tuple[Tensor, Tensor]:
    deltas = torch.stack([layer.delta_weight(name) for name in parts])
    scales = torch.tensor(list(parts.values()), device=deltas.device)
    total = (deltas * scales[:, None, None]).sum(dim=0)
    if isinstance(layer, LoraEmbedding):
        total = total.T
    left, values, right = torch.linalg.svd(total, full_matrices=full_matrices, driver=driver)
    rank = min(rank, len(values))
    b, a = left[:, :rank] * values[:rank], right[:rank]
    if clamp is not None:
        limit = torch.quantile(torch.cat((b.flatten(), a.flatten())), clamp)
        a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    return cast(Tensor, a), b
