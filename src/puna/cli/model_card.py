"""The model card of a merged model: what it was made of, how to run it, and what its licence asks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from puna.catalog.licences import LICENCES, Licence

if TYPE_CHECKING:
    from puna.weights.adapter_open import OpenedAdapter

_TITLE = re.compile(r"LLAMA (\d(?:\.\d)?) COMMUNITY LICENSE", re.IGNORECASE)


def merged_card(base: Path, adapter: OpenedAdapter) -> str:
    """Return the README.md of a model folder: front matter as the Hugging Face hub reads it, then text."""
    config = adapter.config
    named = config.base_model_name_or_path or base.name
    licence = _licence(base)
    head = [
        "---",
        f"base_model: {_scalar(named if not Path(named).exists() else Path(named).name)}",
        "base_model_relation: finetune",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([] if licence is None else [f"license: {licence.key}"]),
        "tags:",
        "- merged",
        "- lora",
        "---",
    ]
    targets = config.target_modules
    what = targets if isinstance(targets, str) else ", ".join(targets or ())
    body = [
        f"# {adapter.name}",
        "",
        f"{base.name} with a LoRA adapter in its weights: rank {adapter.rank}, alpha {config.lora_alpha:g}, "
        f"on {what}.",
        "Merged with Puna.",
        "",
        "    puna run path/to/this/folder",
    ]
    if licence is not None:
        duties = licence.duties(distributes_model=True)
        body += [
            "",
            f"The licence of the base model is the {licence.title}. Who passes this model on has to:",
            "",
        ]
        body += [f"- {duty}" for duty in duties]
    return "\n".join([*head, "", *body]) + "\n"


def _licence(base: Path) -> Licence | None:
    """Return the Llama licence whose text lies in the folder of the base."""
    for file in sorted(base.iterdir()) if base.is_dir() else ():
        if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE")):
            with file.open("rb") as opened:
                match = _TITLE.search(opened.read(4096).decode("utf-8", "replace"))
            if match:
                return LICENCES.get(f"llama{match[1]}")
    return None


def _scalar(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
