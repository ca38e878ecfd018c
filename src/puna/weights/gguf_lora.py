"""LoRA adapters in GGUF files, which llama.cpp and Ollama apply beside a model: writing and reading them.

Each factor lies under the name of the weight that it belongs to, with `.lora_a` or `.lora_b` behind it; rows
of B of q and k are in GGUF's order, A is as it is. What B(A(x)) is multiplied with is alpha / rank for one
alpha in the file, so scales that differ from that (rsLoRA, patterns) go into B. Rules: llama.cpp
`src/llama-adapter.cpp`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puna.errors import CheckpointError, UnsupportedError
from puna.gguf_header import Value
from puna.model.config import LlamaConfig
from puna.model.lora_config import LoraConfig
from puna.model.lora_match import pattern_value
from puna.weights.adapter_files import config_for
from puna.weights.gguf import BLOCK_NAMES, TOP_NAMES, GgufFile
from puna.weights.gguf_export import gguf_tensors
from puna.weights.gguf_writer import write_gguf

logger = logging.getLogger(__name__)

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(\.weight)?")
_GGUF_FACTOR = re.compile(r"(?P<name>.+\.weight)\.lora_(?P<factor>[ab])")
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z0-9_]+)\.weight")
_TABLE_NAME = "token_embd.weight"


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The factors of one module and what their product is multiplied with."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float

    @property
    def alpha(self) -> float:
        """Return what stands for the scale in a file."""
        return self.scale * self.a.shape[0]


def write_gguf_adapter(
    out: Path | str,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    base: LlamaConfig,
    *,
    name: str,
) -> int:
    """Write an adapter that was read for models like `base`; return the number of adapted modules.

    Raises UnsupportedError, with the way out, for what llama.cpp cannot apply: all but low-rank factors.
    """
    pairs = _pairs(config, tensors, base)
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    metadata: dict[str, Value] = {
        "general.architecture": "llama4" if base.is_llama4 else "llama",
        "general.type": "adapter",
        "general.name": name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    if config.base_model_name_or_path:
        metadata["general.base_model.count"] = 1
        metadata["general.base_model.0.name"] = Path(config.base_model_name_or_path).name
    written: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        b = pair.b if pair.alpha == alpha else pair.b * (pair.alpha / alpha)
        ((theirs, rows),) = gguf_tensors(f"{module}.weight", b, base)
        assert isinstance(rows, Tensor)
        written[f"{theirs}.lora_a"] = pair.a.T.contiguous() if theirs == _TABLE_NAME else pair.a
        written[f"{theirs}.lora_b"] = rows.contiguous()
    write_gguf(out, metadata, written)
    return len(pairs)


def _pairs(config: LoraConfig, tensors: Mapping[str, Tensor], base: LlamaConfig) -> dict[str, _Pair]:
    """Return the factors of each module in float32; refuse whatever else an adapter may hold."""
    way_out = "merge it and export the model (puna export --adapter FOLDER --gguf FILE)"
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(("pissa", "olora")):
        raise UnsupportedError(f"an adapter of {init!r} changes the base weights: {way_out}")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if key.endswith(".base_layer.weight"):
            logger.warning("%s is left out: llama.cpp takes the model's own", key)
        elif match is None or match["module"].endswith("experts"):
            raise UnsupportedError(f"{key} has no place in a GGUF adapter: {way_out}")
        else:
            found.setdefault(match["module"], {})[match["factor"]] = tensor.float()
    if base.tie_word_embeddings and found.keys() & {"lm_head", "model.embed_tokens"}:
        raise UnsupportedError(f"an adapter on an embedding that is tied to the head: {way_out}")
    pairs = {}
    for module, factors in found.items():
        rank = factors["A"].shape[0]
        alpha = pattern_value(config.alpha_pattern, module, config.lora_alpha)
        pairs[module] = _Pair(a=factors["A"], b=factors["B"], scale=config.scaling(rank, alpha))
    return pairs


def read_gguf_adapter(path: Path | str, base: LlamaConfig) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter file for models like `base`: PEFT's config, and tensors by their names in the model.

    Raises CheckpointError, UnsupportedError; both name the file.
    """
    file = GgufFile(path)
    kind = (file.metadata.get("general.type"), file.metadata.get("adapter.type"))
    if kind != ("adapter", "lora"):
        raise UnsupportedError(f"{path}: this GGUF file is no LoRA adapter: its types are {kind}")
    arch = "llama4" if base.is_llama4 else "llama"
    if file.metadata.get("general.architecture") != arch:
        raise CheckpointError(
            path, f"is an adapter for {file.metadata.get('general.architecture')}, not {arch}"
        )
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float):
        raise CheckpointError(path, f"adapter.lora.alpha must be a number, not {alpha!r}")
    tensors: dict[str, Tensor] = {}
    for name in file.tensors:
        tensors.update(_read_factor(file, name, base))
    ranks = {
        match["module"]: tensor.shape[0]
        for key, tensor in tensors.items()
        if (match := _FACTOR.fullmatch(key)) and match["factor"] == "A"
    }
    if not ranks:
        raise CheckpointError(path, "holds no factors")
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != usual}
    config = config_for(tensors, base, r=usual, lora_alpha=alpha or usual)
    alphas: dict[str, float] = {} if alpha else dict(others)
    return dataclasses.replace(config, rank_pattern=others, alpha_pattern=alphas), tensors


def _read_factor(file: GgufFile, name: str, base: LlamaConfig) -> dict[str, Tensor]:
    match = _GGUF_FACTOR.fullmatch(name)
    if match is None:
        if name.endswith("_norm.weight"):
            return {}  # llama.cpp leaves these out too
        raise UnsupportedError(f"{file.path}: {name} is no factor of LoRA")
    read = file.read(name)
    value = read.float() if isinstance(read, Tensor) else read.dequantize()
    if value.ndim != 2:
        raise UnsupportedError(f"{file.path}: {name}: adapters on stacked experts are not supported")
    factor, weight = match["factor"].upper(), match["name"]
    if weight == _TABLE_NAME:
        return {f"model.embed_tokens.lora_embedding_{factor}": value.T if factor == "A" else value}
    module = _module(file, weight, base)
    heads = {"q_proj": base.num_attention_heads, "k_proj": base.num_key_value_heads}.get(
        module.rpartition(".")[2]
    )
    if factor == "B" and heads is not None and not base.is_llama4:
        value = _halves(file, name, value, heads)
    return {f"{module}.lora_{factor}.weight": value}


def _halves(file: GgufFile, name: str, value: Tensor, heads: int) -> Tensor:
    """Put rows of rotary pairs back as the halves of a head."""
    if value.shape[0] % (2 * heads):
        raise CheckpointError(file.path, f"{name} has {value.shape[0]} rows, not {heads} even heads")
    order = torch.arange(value.shape[0]).view(heads, -1, 2).transpose(1, 2).reshape(-1)
    return value[order]


def _module(file: GgufFile, weight: str, base: LlamaConfig) -> str:
    if weight in TOP_NAMES:
        return TOP_NAMES[weight].removesuffix(".weight")
    match = _BLOCK.fullmatch(weight)
    if match is None or match[2] not in BLOCK_NAMES:
        raise CheckpointError(file.path, f"{weight} is no weight of a Llama")
    mlp = "feed_forward" if base.is_llama4 else "mlp"
    return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]].format(mlp=mlp)}"
