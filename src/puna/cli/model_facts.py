"""What there is to know about a model without loading its weights: from its config, headers and tokenizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.catalog.licences import LICENCES
from puna.cli.sampling_options import columns, parameter_rows

if TYPE_CHECKING:
    import torch

    from puna.model import LlamaConfig
    from puna.text.tokenizer import Tokenizer
    from puna.weights.loader import Checkpoint

_MOST_LICENCE_BYTES = 1 << 20

# general.file_type of a GGUF: llama.cpp's LLAMA_FTYPE, `include/llama.h`
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0",
}  # fmt: skip
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Hold what `puna show` prints; sizes are in bytes, lengths in tokens."""

    path: Path
    format: str  # "hf", "meta", "gguf"
    architecture: str
    parameters: int
    active_parameters: int  # of one token; less than `parameters` where there are experts
    context_length: int
    embedding_length: int
    quantization: str  # "BF16", "Q4_K_M": what the weights are stored in
    declared_dtype: str | None  # what they are loaded as, where the config says something else
    tensor_types: dict[str, int]  # how many tensors of each type a GGUF holds
    size: int  # of the weights on disk
    tokenizer: str
    vocab_size: int
    bos_token: str | None
    stop_tokens: dict[str, int]  # what ends an answer, by name
    chat_template: str | None
    sampling: dict[str, Any]
    licence: str | None  # a short name
    licence_text: str | None


def read_facts(path: Path) -> ModelFacts:
    """Read them; takes the config, the tensor headers and the vocabulary, but no weights.

    Raises what `open_checkpoint` and `load_tokenizer` raise.
    """
    from puna.locate import default_sampling
    from puna.text.tokenizer import load_tokenizer
    from puna.weights.loader import open_checkpoint

    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(path)
    config = checkpoint.config
    total, active = count_parameters(config)
    quantization, tensor_types = _quantization(checkpoint)
    declared = _short_name(checkpoint.dtype)
    licence, licence_text = _licence(path, checkpoint)
    ends = sorted({*config.eos_token_ids, *tokenizer.eos_token_ids})
    bos = tokenizer.bos_token_id
    return ModelFacts(
        path=path,
        format=checkpoint.format,
        architecture="llama4" if config.is_llama4 else "llama",
        parameters=total,
        active_parameters=active,
        context_length=config.context_length,
        embedding_length=config.hidden_size,
        quantization=quantization,
        declared_dtype=declared if checkpoint.format == "hf" and declared != quantization else None,
        tensor_types=tensor_types,
        size=checkpoint.total_bytes,
        tokenizer=_tokenizer_kind(tokenizer),
        vocab_size=tokenizer.vocab_size,
        bos_token=None if bos is None else tokenizer.id_to_token(bos),
        stop_tokens={tokenizer.id_to_token(i): i for i in ends if i < tokenizer.vocab_size},
        chat_template=tokenizer.chat_template,
        sampling=default_sampling(path),
        licence=licence,
        licence_text=licence_text,
    )


def count_parameters(config: LlamaConfig) -> tuple[int, int]:
    """Return how many parameters the model has, and how many of them one token uses."""
    from puna.weights.loader import empty_model

    model = empty_model(config)
    return model.num_parameters(), model.num_active_parameters()


def _quantization(checkpoint: Checkpoint) -> tuple[str, dict[str, int]]:
    """Return the name of a quantisation, and for a GGUF how many tensors have which type."""
    from puna.weights.gguf import GgufCheckpoint
    from puna.weights.hf import HfCheckpoint

    if isinstance(checkpoint, HfCheckpoint) and checkpoint.packed.kind is not None:
        return checkpoint.packed.kind, {}
    if not isinstance(checkpoint, GgufCheckpoint):
        dtype = checkpoint.stored_dtype if isinstance(checkpoint, HfCheckpoint) else checkpoint.dtype
        return _short_name(dtype), {}
    counts = Counter(info.type.name for file in checkpoint.files for info in file.tensors.values())
    types = dict(counts.most_common())
    named = _FILE_TYPES.get(_as_int(checkpoint.metadata.get("general.file_type")))
    return named or next(iter(types)), types


def _short_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return _DTYPES.get(name, name.upper())


def _as_int(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _tokenizer_kind(tokenizer: Tokenizer) -> str:
    """Tell the two kinds apart by a token that spells a byte, which only SentencePiece has."""
    return "byte-level BPE" if tokenizer.token_to_id("<0x0A>") is None else "SentencePiece"


def _licence(path: Path, checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """Return the name and the text of a licence: from a LICENSE file in a folder, or a GGUF's metadata."""
    from puna.weights.gguf import GgufCheckpoint

    name = text = None
    if isinstance(checkpoint, GgufCheckpoint):
        value = checkpoint.metadata.get("general.license")
        name = value if isinstance(value, str) and value else None
        link = checkpoint.metadata.get("general.license.link")
        text = _known_licence(name, link if isinstance(link, str) else None) if name else None
    if path.is_dir():
        text = _licence_file(path) or text
    return name, text


def _known_licence(name: str, link: str | None) -> str:
    known = LICENCES.get(name)
    return "\n".join(filter(None, [known.title if known else name, link]))


def _licence_file(folder: Path) -> str | None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE")):
            with file.open("rb") as opened:
                return opened.read(_MOST_LICENCE_BYTES).decode("utf-8", "replace").strip()
    return None


def facts_lines(facts: ModelFacts) -> list[str]:
    """Return the facts as lines, in sections; a section with nothing in it is left out."""
    sections = {
        "Model": _model_rows(facts),
        "Tokenizer": _tokenizer_rows(facts),
        "Parameters": parameter_rows(facts.sampling),
        "License": _licence_rows(facts),
    }
    width = max(len(left) for rows in sections.values() for left, _ in rows)
    lines: list[str] = []
    for title, rows in sections.items():
        if rows:
            padded = [(left.ljust(width), right) for left, right in rows]
            lines += [f"  {title}", *columns(padded, indent="    "), ""]
    return lines


def _model_rows(facts: ModelFacts) -> list[tuple[str, str]]:
    names = {"hf": "Hugging Face", "meta": "Meta", "gguf": "GGUF"}
    rows = [("architecture", facts.architecture), ("parameters", _count(facts.parameters))]
    if facts.active_parameters != facts.parameters:
        rows.append(("active parameters", _count(facts.active_parameters)))
    declared = f" (loaded as {facts.declared_dtype}, as the config says)" if facts.declared_dtype else ""
    mix = ", ".join(f"{count} {name}" for name, count in facts.tensor_types.items())
    rows += [
        ("context length", str(facts.context_length)),
        ("embedding length", str(facts.embedding_length)),
        ("quantization", facts.quantization + (f" ({mix})" if len(facts.tensor_types) > 1 else declared)),
        ("size on disk", size_text(facts.size)),
        ("format", names[facts.format]),
    ]
    return rows


def _tokenizer_rows(facts: ModelFacts) -> list[tuple[str, str]]:
    stops = ", ".join(f"{name} ({token_id})" for name, token_id in facts.stop_tokens.items())
    return [
        ("kind", facts.tokenizer),
        ("vocabulary", str(facts.vocab_size)),
        ("begins with", facts.bos_token or "nothing"),
        ("stops at", stops or "nothing"),
        ("chat template", "yes" if facts.chat_template else "none: the model continues text"),
    ]


def _licence_rows(facts: ModelFacts) -> list[tuple[str, str]]:
    lines = [line.strip() for line in (facts.licence_text or facts.licence or "").splitlines()]
    lines = [line for line in lines if line]
    return [(line, "") for line in lines[:2] + (["..."] if len(lines) > 2 else [])]


def _count(number: int) -> str:
    """Return a number of parameters as "8.0B (8,030,261,248)"."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            short = f"{number / size:.1f}" if number < 100 * size else f"{number / size:.0f}"
            return f"{short}{letter} ({number:,})"
    return str(number)


def size_text(num_bytes: int) -> str:
    """Return a size in decimal units, as Ollama does: "42 GB", "4.7 GB", "2 GB"."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if num_bytes >= size:
            value = num_bytes / size
            text = f"{value:.0f}" if value >= 10 else f"{value:.1f}".removesuffix(".0")
            return f"{text} {unit}"
    return f"{num_bytes} B"
