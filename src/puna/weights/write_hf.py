"""Write a whole model as a Hugging Face folder, beside the config and tokenizer of the folder it came from.

Layout: `model.safetensors`, or shards with an index, as Transformers 5.23 writes them. Names inside are ours
already. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from puna.errors import CheckpointError, ParameterError, UnsupportedError
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.weights.files import list_names, read_json_object
from puna.weights.loader import Checkpoint, empty_model

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
    weights = network.state_dict()
    parameters = dict(network.named_parameters())
    packed = sorted(name for name in weights if name not in parameters)
    if packed:
        raise UnsupportedError(f"quantised weights cannot be written as a Hugging Face folder: {packed[0]}")
    dtype = network.model.norm.weight.dtype
    with _new_folder(Path(base), Path(folder), hf_config(Path(base), network.config, dtype), keep) as part:
        _write_shards(weights.items(), part, max_shard_bytes)


def write_hf_stream(
    checkpoint: Checkpoint,
    folder: Path | str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint whose tensors are all floats, with the memory of one shard.

    What is not weights comes from the Hugging Face folder that it was made from, and `files` by name. Raises
    as `write_hf` does, and CheckpointError naming tensors that do not fit the config.
    """
    expected = {name: tuple(t.shape) for name, t in empty_model(checkpoint.config).state_dict().items()}
    config = hf_config(checkpoint.path, checkpoint.config, checkpoint.dtype)

    def floats() -> Iterator[tuple[str, Tensor]]:
        for name, value in checkpoint.tensors():
            if not isinstance(value, Tensor) or expected.pop(name, None) != tuple(value.shape):
                raise CheckpointError(checkpoint.path, f"{name} does not fit the config, or is there twice")
            yield name, value

    with _new_folder(checkpoint.path, Path(folder), config, ()) as part:
        _write_shards(floats(), part, max_shard_bytes)
        if expected:
            raise CheckpointError(checkpoint.path, f"tensors are missing: {list_names(expected)}")
        for name, text in (files or {}).items():
            (part / name).write_text(text, encoding="utf-8")


def require_new(folder: Path, keep: Sequence[Path] = ()) -> None:
    """Raise ParameterError for a folder with something in it besides the files to keep."""
    if folder.exists() and (not folder.is_dir() or any(path not in keep for path in folder.iterdir())):
        raise ParameterError(f"{folder}: is there already: give a new or an empty folder")


@contextmanager
def _new_folder(
    base: Path, folder: Path, config: Mapping[str, object], keep: Sequence[Path]
) -> Iterator[Path]:
    """Give a folder to write into, which takes its place as `folder` at the end, with the files of `base`."""
    base, folder = base.expanduser(), folder.expanduser()
    require_new(folder, keep)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for pattern in _COPIED:
            for path in base.glob(pattern):
                if path.name not in _NOT_COPIED and not path.name.endswith(".index.json") and path.is_file():
                    shutil.copyfile(path, part / path.name)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        yield part
        for path in keep:
            shutil.copyfile(path, part / path.name)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except OSError as error:
        raise CheckpointError(folder, f"cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def hf_config(base: Path, wanted: LlamaConfig, weights_dtype: torch.dtype) -> dict[str, object]:
    """Return the base's config.json with what a merge can change: the dtype, and a head no longer tied.

    Raises UnsupportedError for a base in another format, and for multimodal models.
    """
    path = base.expanduser() / "config.json"
    if not path.is_file():
        raise UnsupportedError(
            f"{base}: the base must be a Hugging Face folder: no config.json "
            "(puna export --gguf writes a file from any)"
        )
    config = read_json_object(path)
    if "text_config" in config:
        raise UnsupportedError(f"{path}: multimodal models cannot be written, since images are not read")
    config.pop("quantization_config", None)  # what is packed is refused, or was made whole
    dtype = str(weights_dtype).removeprefix("torch.")
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = dtype
    if config.get("tie_word_embeddings", False) != wanted.tie_word_embeddings:
        config["tie_word_embeddings"] = wanted.tie_word_embeddings
    return config


def _write_shards(weights: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int) -> None:
    """Write shards as they fill up, and name them when it is known how many there are."""
    names: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    used = total = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if shard and used + size > max_bytes:
            names.append(_write_shard(shard, folder, len(names)))
            shard, used = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        used += size
        total += size
        del tensor
    names.append(_write_shard(shard, folder, len(names)))
    where: dict[str, str] = {}
    for number, inside in enumerate(names):
        file = (
            f"model-{number + 1:05}-of-{len(names):05}.safetensors" if len(names) > 1 else "model.safetensors"
        )
        (folder / _unnamed(number)).rename(folder / file)
        where.update(dict.fromkeys(inside, file))
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_shard(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    save_file(shard, folder / _unnamed(number), metadata={"format": "pt"})
    return list(shard)


def _unnamed(number: int) -> str:
    return f".shard-{number}"
