"""Write a whole model as a Hugging Face folder, beside the config and tokenizer of the folder it came from.

Layout: `model.safetensors`, or shards with an index, as Transformers 5.23 writes them. Names inside are ours
already. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from puna.errors import CheckpointError, ParameterError, UnsupportedError
from puna.model.llama import Llama
from puna.weights.files import read_json_object

MAX_SHARD_BYTES = 5_000_000_000

_COPIED = ("*.jinja", "*.json", "*.model", "*LICEN[CS]E*", "USE_POLICY*", "*.txt")
_NOT_COPIED = ("config.json", "adapter_config.json")


def write_hf(
    network: Llama,
    base: Path | str,
    folder: Path | str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    keep: Sequence[Path] = (),
) -> None:
    """Write the weights of `network`, and all else from `base`, the folder of the model it was made from.

    Files of `folder` that are named in `keep` may be there before and stay as they are. Raises
    ParameterError if `folder` has something else in it, UnsupportedError for quantised weights, multimodal
    models, and a base in another format.
    """
    base, folder = Path(base).expanduser(), Path(folder).expanduser()
    config = _config(base, network)
    if folder.exists() and (not folder.is_dir() or any(path not in keep for path in folder.iterdir())):
        raise ParameterError(f"{folder}: is there already: give a new or an empty folder")
    weights = network.state_dict()
    parameters = dict(network.named_parameters())
    packed = sorted(name for name in weights if name not in parameters)
    if packed:
        raise UnsupportedError(f"quantised weights cannot be written as a Hugging Face folder: {packed[0]}")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for pattern in _COPIED:
            for path in base.glob(pattern):
                if path.name not in _NOT_COPIED and not path.name.endswith(".index.json") and path.is_file():
                    shutil.copyfile(path, part / path.name)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_shards(weights, part, max_shard_bytes)
        for path in keep:
            shutil.copyfile(path, part / path.name)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except OSError as error:
        raise CheckpointError(folder, f"cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _config(base: Path, network: Llama) -> dict[str, object]:
    """Return the base's config.json with what a merge can change: the dtype, and a head no longer tied."""
    path = base / "config.json"
    if not path.is_file():
        raise UnsupportedError(f"{base}: the base must be a Hugging Face folder: no config.json")
    config = read_json_object(path)
    if "text_config" in config:
        raise UnsupportedError(f"{path}: multimodal models cannot be written, since images are not read")
    config.pop("quantization_config", None)  # what is packed is refused
    dtype = str(network.model.norm.weight.dtype).removeprefix("torch.")
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = dtype
    if config.get("tie_word_embeddings", False) != network.config.tie_word_embeddings:
        config["tie_word_embeddings"] = network.config.tie_word_embeddings
    return config


def _write_shards(weights: Mapping[str, Tensor], folder: Path, max_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in weights.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = (
            f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        save_file(whole, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
