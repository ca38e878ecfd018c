"""Adapter folders as PEFT writes them: `adapter_config.json` beside `adapter_model.safetensors`.

Written files equal PEFT 0.21's byte for byte for the same tensors. Names in files are those of the model's
modules behind "base_model.model."; reading accepts what other tools and older versions put around them. It
knows names and tensors, not the modules that they belong to.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from puna.errors import CheckpointError, ConfigError, ModelNotFoundError
from puna.model.config import LlamaConfig
from puna.model.lora_config import LoraConfig
from puna.weights.files import open_safetensors, open_torch_file, read_json_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OLD_WEIGHTS_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

_MULTIMODAL = re.compile(r"^(?:model\.language_model\.|language_model\.model\.)")
_NAMED = re.compile(r"\.(lora_A|lora_B)\.(?!weight$|bias$)[^.]+\.(weight|bias)$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_NAMED_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")


def read_adapter_config(folder: Path | str) -> LoraConfig:
    """Read the config of an adapter folder. Raises ModelNotFoundError, CheckpointError, ConfigError."""
    path = Path(folder).expanduser() / CONFIG_FILE
    if not path.is_file():
        raise ModelNotFoundError(f"{folder}: no adapter: looked for {CONFIG_FILE}")
    try:
        return LoraConfig.from_dict(read_json_object(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_adapter_tensors(folder: Path | str) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder by their names in the model, in the dtype stored.

    Raises ModelNotFoundError where there are none, CheckpointError for damaged files and doubled names.
    """
    folder = Path(folder).expanduser()
    path = next((folder / n for n in (WEIGHTS_FILE, OLD_WEIGHTS_FILE) if (folder / n).is_file()), None)
    if path is None:
        raise ModelNotFoundError(f"{folder}: no adapter: looked for {WEIGHTS_FILE}")
    file = open_safetensors(path) if path.name == WEIGHTS_FILE else open_torch_file(path)
    found: dict[str, Tensor] = {}
    for name in file.tensors:
        plain = plain_name(name)
        if plain in found:
            raise CheckpointError(path, f"two tensors mean {plain}")
        found[plain] = file.read(name)
    return found


def plain_name(name: str) -> str:
    """Return the name in the model of a name in an adapter file, in any of the forms in use."""
    name = name.removeprefix(PREFIX)
    if _MULTIMODAL.match(name):
        name = "model." + _MULTIMODAL.sub("", name)
    name = name.removeprefix("language_model.")
    name = _NAMED_SAVED.sub(".", name)
    return _NAMED.sub(r".\1.\2", name)


def write_adapter(
    folder: Path | str, config: LoraConfig, tensors: Mapping[str, Tensor], *, auto_mapping: Any = None
) -> None:
    """Write an adapter folder; each file appears whole or not at all.

    `tensors` have names in the model. `auto_mapping` goes into the config, as PEFT does without a task type.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    named = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    part = folder / f"{WEIGHTS_FILE}.part"
    save_file(named, part, metadata={"format": "pt"})
    os.replace(part, folder / WEIGHTS_FILE)
    values = config.to_dict() | {"inference_mode": True, "auto_mapping": auto_mapping}
    write_text(folder / CONFIG_FILE, json.dumps(values, indent=2, sort_keys=True))


def config_for(tensors: Mapping[str, Tensor], base: LlamaConfig | None, **values: Any) -> LoraConfig:
    """Make the config of read tensors, with targets that mean just the modules that they belong to."""
    values["lora_alpha"] = int(alpha) if (alpha := values["lora_alpha"]) == int(alpha) else alpha
    modules = sorted({re.sub(r"\.lora_.*", "", name) for name in tensors})
    found = [match for module in modules if (match := _LAYER.fullmatch(module))]
    in_layer: dict[int, set[str]] = {}
    for match in found:
        in_layer.setdefault(int(match[1]), set()).add(match[2].rpartition(".")[2])
    others = [module for module in modules if not _LAYER.fullmatch(module)]
    if len({frozenset(leaves) for leaves in in_layer.values()}) != 1:
        return LoraConfig(target_modules=modules, task_type="CAUSAL_LM", **values)
    whole = base is not None and len(in_layer) == base.num_hidden_layers
    return LoraConfig(
        target_modules=sorted(next(iter(in_layer.values()))) + others,
        layers_to_transform=None if whole else sorted(in_layer),
        task_type="CAUSAL_LM",
        **values,
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
