"""`save_pretrained` of the Transformers-style doors: folders that both load again.

What is written besides the weights comes from the folder that the model or tokenizer was loaded from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.auto_arguments import WithoutEffect, refuse
from puna.errors import CheckpointError, ParameterError, UnsupportedError
from puna.locate import find_model
from puna.model.llama import Llama
from puna.weights.adapter_files import write_text
from puna.weights.files import read_json_object
from puna.weights.write_hf import write_hf

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# What Transformers also takes, and which values of it change nothing here.
_SAVE_OPTIONS: WithoutEffect = {
    "is_main_process": (True,),
    "state_dict": (),
    "push_to_hub": (False,),
    "max_shard_size": ("5GB",),
    "safe_serialization": (True,),
    "variant": (),
    "token": (),
    "save_peft_format": (True,),
    "legacy_format": (False,),
    "filename_prefix": (),
}


def save_model(llama: Llama, source: str, directory: Path | str, options: Mapping[str, Any]) -> None:
    """Write a model as a Hugging Face folder, with the tokenizer of the folder `source`, if it has one.

    Files of a tokenizer that are in `directory` already may stay. Raises what `write_hf` does.
    """
    refuse("save_pretrained()", options, _SAVE_OPTIONS, own=("save_directory",))
    if not source:
        raise UnsupportedError(
            "save_pretrained() needs the folder that the model was loaded from: it has none"
        )
    target = _directory(directory)
    kept = [target / name for name in _TOKENIZER_FILES if (target / name).is_file()]
    write_hf(llama, find_model(source), target, keep=kept)


def save_tokenizer(
    source: str, directory: Path | str, changes: Mapping[str, str | None], options: Mapping[str, Any]
) -> tuple[str, ...]:
    """Copy the files of the tokenizer that was loaded from the folder `source`; return where they are.

    `changes` go into tokenizer_config.json: what was set since, by its name there. Raises UnsupportedError
    for a tokenizer that came from another format.
    """
    refuse("save_pretrained()", options, _SAVE_OPTIONS, own=("save_directory",))
    folder = find_model(source) if source else None
    found = (
        [] if folder is None else [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    )
    if not any(path.name in ("tokenizer.json", "tokenizer_config.json") for path in found):
        raise UnsupportedError(
            f"save_pretrained() copies the files of a Hugging Face folder: {source!r} is none"
        )
    target = _directory(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path in found:
            if not (target / path.name).exists() or not path.samefile(target / path.name):
                shutil.copyfile(path, target / path.name)
        if changes:
            if "chat_template" in changes:
                (target / "chat_template.jinja").unlink(missing_ok=True)
            config = target / "tokenizer_config.json"
            values = read_json_object(config) if config.is_file() else {}
            write_text(config, json.dumps({**values, **changes}, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise CheckpointError(target, f"cannot be written: {error.strerror}") from error
    names = {path.name for path in found} | ({"tokenizer_config.json"} if changes else set())
    return tuple(str(target / name) for name in sorted(names) if (target / name).is_file())


def _directory(directory: object) -> Path:
    if not isinstance(directory, str | Path) or not str(directory):
        raise ParameterError(f"save_directory must be a path, not {directory!r}")
    return Path(directory).expanduser()
