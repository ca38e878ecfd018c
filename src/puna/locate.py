"""Where a model is, by the name a user gives, and how it wants to be sampled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from puna.errors import CheckpointError, ModelNotFoundError


def find_model(name: str | None) -> Path:
    """Return the path of a model: a folder, a `.gguf` file, or `cria`, which is also what None means."""
    if name is None or name == "cria":
        from puna.cria import FOLDER

        return FOLDER
    path = os.path.expanduser(name)
    if os.path.exists(path):  # unlike Path.exists, it takes names that no file can have
        return Path(path)
    looks_like_hub = name.count("/") == 1 and not name.startswith(("/", ".", "~"))
    hint = "; nothing is downloaded by name yet" if looks_like_hub else ""
    shown = name if len(name) <= 80 else name[:77] + "..."
    raise ModelNotFoundError(
        f"no model {shown!r}: give a folder with a checkpoint, a .gguf file, or 'cria', the embedded model"
        + hint
    )


def listed_sampling(path: Path) -> dict[str, Any]:
    """Return only the sampling settings that a checkpoint's `generation_config.json` lists, as vLLM does."""
    config = read_generation_config(path) or {}
    return {name: config[name] for name in _SETTINGS if config.get(name) is not None}


def default_sampling(path: Path) -> dict[str, Any]:
    """Return the sampling settings that a checkpoint asks for, by the names of `SamplingParams`.

    They come from `generation_config.json` with Transformers' defaults, or from a GGUF's
    `general.sampling.*`; what neither says is Ollama's: temperature 0.8, top-k 40, top-p 0.9.
    """
    config = read_generation_config(path)
    if config is not None:
        return _hf_sampling(config)
    from puna.gguf_header import list_ggufs, read_metadata

    ggufs = list_ggufs(path) if path.is_dir() else [path]
    found = _gguf_sampling(read_metadata(ggufs[0])) if len(ggufs) == 1 else {}
    return {"temperature": 0.8, "top_k": 40, "top_p": 0.9, **found}


_MOST_BYTES = 1 << 20  # a real one has a few hundred
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """Return what `generation_config.json` in a folder holds, None where there is none.

    Raises CheckpointError for a file that is no JSON object.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        with file.open("rb") as opened:
            config = json.loads(opened.read(_MOST_BYTES).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(file, "must hold a JSON object")
    return config


def _hf_sampling(config: dict[str, Any]) -> dict[str, Any]:
    if not config.get("do_sample", False):
        return {"temperature": 0.0}
    defaults = {"temperature": 1.0, "top_k": 50}
    return defaults | {name: config[name] for name in _SETTINGS if config.get(name) is not None}


def _gguf_sampling(metadata: dict[str, Any]) -> dict[str, Any]:
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    found = {ours: metadata.get(f"general.sampling.{theirs}") for theirs, ours in names.items()}
    return {name: value for name, value in found.items() if value is not None}
