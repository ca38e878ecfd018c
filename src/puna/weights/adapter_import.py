"""Read adapters of mlx-lm, torchtune, LitGPT and llama.cpp into PEFT's config and names; PEFT's own too.

mlx-lm keeps both factors transposed and a scale in place of alpha; torchtune has Meta's names and its order
of the rows of q and k; LitGPT keeps q, k and v in one pair of factors. Formats: mlx_lm/tuner (0367286),
torchtune/models/convert_weights.py (00c242b), litgpt/lora.py (01e39f5). It knows names and tensors only; the
number of heads comes from the config of the base model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from puna.errors import CheckpointError, ModelNotFoundError, ParameterError, UnsupportedError
from puna.gguf_header import is_gguf
from puna.model.config import LlamaConfig
from puna.model.lora_config import LoraConfig
from puna.weights.adapter_files import (
    CONFIG_FILE,
    OLD_WEIGHTS_FILE,
    WEIGHTS_FILE,
    config_for,
    read_adapter_config,
    read_adapter_tensors,
)
from puna.weights.files import TensorFile, list_names, open_safetensors, open_torch_file, read_json_object
from puna.weights.gguf_lora import read_gguf_adapter

AdapterKind = Literal["peft", "mlx-lm", "torchtune", "litgpt", "gguf"]

_MLX_FILE = "adapters.safetensors"
_LITGPT_FILE = "lit_model.pth.lora"
_LITGPT_SETTINGS = "hyperparameters.yaml"
_TORCHTUNE_FILE = re.compile(r"adapter_(model|\d+)\.pt")

_MLX_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_TORCHTUNE_NAME = re.compile(
    r"(?:layers\.(?P<layer>\d+)\.(?P<module>attn\.(?:[qkv]|output)_proj|mlp\.w[123])|(?P<head>output))"
    r"\.(?P<leaf>lora_[ab]\.weight|magnitude)"
)
_TORCHTUNE_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_TORCHTUNE_LEAVES = {
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
_LITGPT_NAME = re.compile(
    r"(?:transformer\.h\.(?P<layer>\d+)\.(?P<module>attn\.(?:attn|qkv|proj)|mlp\.(?:fc_1|fc_2|proj))|lm_head)"
    r"\.(?P<leaf>lora_[AB])"
)
_LITGPT_MODULES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}


def adapter_kind(folder: Path | str) -> AdapterKind:
    """Say which tool's adapter a folder or file holds. Raises ModelNotFoundError where there is none."""
    folder = Path(folder).expanduser()
    if folder.is_file() and is_gguf(folder):
        return "gguf"
    if any((folder / name).is_file() for name in (WEIGHTS_FILE, OLD_WEIGHTS_FILE)):
        return "peft"
    if (folder / _MLX_FILE).is_file():
        return "mlx-lm"
    if (folder / _LITGPT_FILE).is_file():
        return "litgpt"
    if _torchtune_files(folder):
        return "torchtune"
    wanted = f"{CONFIG_FILE} with {WEIGHTS_FILE}, {_MLX_FILE}, {_LITGPT_FILE}, adapter_0.pt, or a .gguf file"
    raise ModelNotFoundError(f"{folder}: no adapter: looked for {wanted}")


def read_any_adapter(
    folder: Path | str, base: LlamaConfig | None = None, *, alpha: float | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter folder of any tool: the config as PEFT's, and tensors by their names in the model.

    `base` is needed for torchtune, LitGPT and GGUF; `alpha` where the folder does not say it. Raises
    ModelNotFoundError, ConfigError, CheckpointError, UnsupportedError, ParameterError.
    """
    folder, kind = Path(folder).expanduser(), adapter_kind(folder)
    if alpha is not None and kind != "torchtune":
        raise ParameterError(f"{folder}: alpha is in the files of a {kind} adapter, and cannot be given")
    if kind == "peft":
        return read_adapter_config(folder), read_adapter_tensors(folder)
    if kind == "mlx-lm":
        return _read_mlx(folder, base)
    if base is None:
        raise ParameterError(f"{folder}: reading a {kind} adapter needs the config of its base model")
    if kind == "gguf":
        return read_gguf_adapter(folder, base)
    return _read_torchtune(folder, base, alpha) if kind == "torchtune" else _read_litgpt(folder, base)


def _read_mlx(folder: Path, base: LlamaConfig | None) -> tuple[LoraConfig, dict[str, Tensor]]:
    path = folder / CONFIG_FILE
    values = read_json_object(path) if path.is_file() else {}
    kind, settings = values.get("fine_tune_type", "lora"), values.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise UnsupportedError(f"{path}: fine_tune_type {kind!r} is not supported: 'lora' and 'dora' are")
    if not isinstance(settings, dict) or not isinstance(settings.get("scale"), int | float):
        raise CheckpointError(path, "needs lora_parameters with a scale")
    file = open_safetensors(folder / _MLX_FILE)
    tensors = {}
    for name in file.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf not in _MLX_LEAVES or module.endswith(("embed_tokens", "experts", "switch_mlp")):
            raise UnsupportedError(f"{file.path}: {name} is not supported: low-rank factors of linears are")
        value = _float_tensor(file, name)
        tensors[f"{module}.{_MLX_LEAVES[leaf]}"] = value if leaf == "m" else _transposed(file, name, value)
    rank = _rank(file, tensors)
    return config_for(
        tensors,
        base,
        r=rank,
        lora_alpha=settings["scale"] * rank,
        lora_dropout=settings.get("dropout", 0.0),
        use_dora=kind == "dora",
        base_model_name_or_path=values.get("model"),
    ), tensors


def _read_torchtune(
    folder: Path, base: LlamaConfig, alpha: float | None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    path = folder / CONFIG_FILE
    values = read_json_object(path) if path.is_file() else {}
    alpha = values.get("lora_alpha") if alpha is None else alpha
    if not isinstance(alpha, int | float):
        raise ParameterError(f"{folder}: no {CONFIG_FILE} with lora_alpha: alpha has to be given")
    file = open_torch_file(_torchtune_files(folder)[-1])
    heads = {"attn.q_proj": base.num_attention_heads, "attn.k_proj": base.num_key_value_heads}
    tensors = {}
    for name in file.tensors:
        match = _TORCHTUNE_NAME.fullmatch(name)
        if match is None:
            raise UnsupportedError(f"{file.path}: {name} is not supported: low-rank factors of linears are")
        value, leaf = _float_tensor(file, name), _TORCHTUNE_LEAVES[match["leaf"]]
        if match["module"] in heads and leaf != "lora_A.weight":
            value = _halves_from_pairs(file, name, value, heads[match["module"]])
        tensors[f"{_module(match, _TORCHTUNE_MODULES)}.{leaf}"] = value
    dora = any(name.endswith("lora_magnitude_vector") for name in tensors)
    return config_for(
        tensors,
        base,
        r=_rank(file, tensors),
        lora_alpha=alpha,
        lora_dropout=values.get("lora_dropout") or 0.0,
        use_dora=dora,
        base_model_name_or_path=values.get("base_model_name_or_path"),
    ), tensors


def _read_litgpt(folder: Path, base: LlamaConfig) -> tuple[LoraConfig, dict[str, Tensor]]:
    settings = _litgpt_settings(folder / _LITGPT_SETTINGS)
    file = open_torch_file(folder / _LITGPT_FILE)
    tensors: dict[str, Tensor] = {}
    for name in file.tensors:
        match = _LITGPT_NAME.fullmatch(name)
        if match is None:
            raise UnsupportedError(f"{file.path}: {name} is not supported: low-rank factors of linears are")
        value, leaf = _float_tensor(file, name), f"{match['leaf']}.weight"
        if match["module"] in ("attn.attn", "attn.qkv"):
            for part, rows in _split_qkv(file, name, value, settings, base).items():
                tensors[f"model.layers.{match['layer']}.self_attn.{part}.{leaf}"] = rows
        else:
            tensors[f"{_module(match, _LITGPT_MODULES)}.{leaf}"] = value
    return config_for(
        tensors,
        base,
        r=_rank(file, tensors),
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings.get("lora_dropout", 0.0),
    ), tensors


def _split_qkv(
    file: TensorFile, name: str, value: Tensor, settings: Mapping[str, Any], base: LlamaConfig
) -> dict[str, Tensor]:
    """Return the rows of A or B that belong to q, k and v, as far as they are adapted."""
    q_size, kv_size = (n * base.head_dim for n in (base.num_attention_heads, base.num_key_value_heads))
    sizes = {"lora_query": q_size, "lora_key": kv_size, "lora_value": kv_size}
    sizes = {key: size for key, size in sizes.items() if settings.get(key)}
    parts = [f"{key.removeprefix('lora_')[0]}_proj" for key in sizes]
    if name.endswith("lora_A") and parts and value.shape[0] % len(parts) == 0:
        return dict(zip(parts, value.chunk(len(parts)), strict=True))
    if name.endswith("lora_B") and value.shape[0] == sum(sizes.values()):
        return dict(zip(parts, torch.split(value, list(sizes.values())), strict=True))
    raise CheckpointError(file.path, f"{name} has {value.shape[0]} rows, which does not fit {parts}")


def _halves_from_pairs(file: TensorFile, name: str, value: Tensor, num_heads: int) -> Tensor:
    """Reorder rows from rotating neighbours to rotating halves, as Hugging Face's q and k are kept."""
    if value.shape[0] % (2 * num_heads):
        raise CheckpointError(file.path, f"{name} has {value.shape[0]} rows, not {num_heads} even heads")
    rows = torch.arange(value.shape[0]).view(num_heads, -1, 2).transpose(1, 2).reshape(-1)
    return value[rows]


def _rank(file: TensorFile, tensors: Mapping[str, Tensor]) -> int:
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
    if len(ranks) != 1:
        raise CheckpointError(file.path, f"must hold factors of one rank, got {sorted(ranks)}")
    return ranks.pop()


def _module(match: re.Match[str], modules: Mapping[str, str]) -> str:
    return (
        "lm_head" if match["layer"] is None else f"model.layers.{match['layer']}.{modules[match['module']]}"
    )


def _float_tensor(file: TensorFile, name: str) -> Tensor:
    if file.tensors[name].dtype is None:
        kind = file.tensors[name].dtype_name
        raise UnsupportedError(f"{file.path}: {name} is stored as {kind}, which is not supported")
    return file.read(name)


def _transposed(file: TensorFile, name: str, value: Tensor) -> Tensor:
    if value.ndim != 2:
        raise UnsupportedError(f"{file.path}: {name} has {value.ndim} axes: factors of linears have 2")
    return value.T.contiguous()


def _torchtune_files(folder: Path) -> list[Path]:
    """Return the adapter files, the last epoch's last."""
    found = [path for path in _files(folder) if _TORCHTUNE_FILE.fullmatch(path.name)]
    return sorted(found, key=lambda path: (len(path.stem), path.stem))


def _files(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _litgpt_settings(path: Path) -> dict[str, Any]:
    """Read the flat `lora_*` keys of a YAML file, which are numbers and truth values."""
    if not path.is_file():
        raise ModelNotFoundError(f"{path}: not there; it says what a LitGPT adapter is")
    found: dict[str, Any] = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    for key, value in re.findall(r"^(lora_\w+): *(\S+) *$", text, re.MULTILINE):
        try:
            found[key] = value == "true" if value in ("true", "false") else float(value)
        except ValueError as error:
            raise CheckpointError(path, f"{key} must be a number or a truth value, not {value!r}") from error
    missing = [key for key in ("lora_r", "lora_alpha") if key not in found]
    if missing:
        raise CheckpointError(path, f"does not say {list_names(missing)}")
    return found
