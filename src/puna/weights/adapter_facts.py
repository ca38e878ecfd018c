"""What an adapter is, read from its files: for `puna adapter inspect`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from puna.model.config import LlamaConfig
from puna.model.lora_match import pattern_value
from puna.weights.adapter_import import AdapterKind, adapter_kind, read_any_adapter

_PARTS = {  # by what follows the module's name
    "LoRA": re.compile(r"\.lora_(A|B|embedding_A|embedding_B)(\.weight)?$"),
    "LoRA biases": re.compile(r"\.lora_B\.bias$"),
    "DoRA lengths": re.compile(r"\.lora_magnitude_vector$"),
    "trainable tokens": re.compile(r"\.token_adapter\.trainable_tokens_delta$"),
    "base biases": re.compile(r"\.bias$"),
    "whole weights": re.compile(r""),
}


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What an adapter is."""

    path: Path
    tool: AdapterKind
    base_model: str | None
    rank: int
    alpha: float
    scales: list[float]  # what B @ A is multiplied with, each that is used once
    use_rslora: bool
    use_dora: bool
    init: bool | str
    modules: dict[str, int]  # how many of each last name are adapted
    layers: list[int]
    parameters: int
    parts: dict[str, int]  # parameters by kind
    dtypes: list[str]
    num_bytes: int


def read_adapter_facts(
    folder: Path | str, base: LlamaConfig | None = None, *, alpha: float | None = None
) -> AdapterFacts:
    """Read an adapter of any tool and say what it is. Raises what `read_any_adapter` does."""
    config, tensors = read_any_adapter(folder, base, alpha=alpha)
    modules = sorted({_PARTS["LoRA"].sub("", name) for name in tensors if _PARTS["LoRA"].search(name)})
    scales = {
        config.scaling(
            pattern_value(config.rank_pattern, module, config.r),
            pattern_value(config.alpha_pattern, module, config.lora_alpha),
        )
        for module in modules
    }
    parts = dict.fromkeys(_PARTS, 0)
    for name, tensor in tensors.items():
        kind = next(kind for kind, pattern in _PARTS.items() if pattern.search(name))
        parts[kind] += tensor.numel()
    return AdapterFacts(
        path=Path(folder).expanduser(),
        tool=adapter_kind(folder),
        base_model=config.base_model_name_or_path,
        rank=config.r,
        alpha=config.lora_alpha,
        scales=sorted(scales),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init=config.init_lora_weights,
        modules=_counts(module.rpartition(".")[2] for module in modules),
        layers=sorted(
            {int(match[1]) for name in modules if (match := re.search(r"\.layers\.(\d+)\.", name))}
        ),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        parts={kind: count for kind, count in parts.items() if count},
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )


def _counts(names: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found
