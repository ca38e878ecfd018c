"""`puna quantize`: write a model as a GGUF file, its weights quantised."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puna.errors import ParameterError

if TYPE_CHECKING:
    from puna.gguf_header import Value
    from puna.weights.imatrix import ImportanceMatrix
    from puna.weights.loader import Checkpoint
    from puna.weights.quantize_file import Written


def quantize(
    source: Annotated[str, typer.Argument(metavar="IN", help="A folder, a .gguf file, or cria.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .gguf file to write; a new one.")],
    type: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="q4_k_m, q8_0, q4_0, f16, ... (see above).")
    ] = "q4_k_m",
    imatrix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Which errors matter: of puna imatrix.", show_default=False),
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantise what is quantised already.")
    ] = False,
) -> None:
    """Write a model as a GGUF file, quantised.

    IN is a Hugging Face folder, a Meta folder or a GGUF file. Its tokenizer and chat template go along, so
    that the file is all that Puna, llama.cpp or Ollama need.

    TYPE is one of f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0, iq4_nl,
    iq4_xs, q3_k_l, q3_k_m, q3_k_s and q2_k: the mixes that llama.cpp has under these names.
    """
    from puna.locate import find_model
    from puna.weights.imatrix import read_imatrix
    from puna.weights.loader import open_checkpoint
    from puna.weights.quantize_file import write_quantized
    from puna.weights.quantize_mix import FLOAT_TYPES, file_type

    wanted = file_type(type)
    if out.exists():
        raise ParameterError(f"{out}: is there already: give a new file")
    if imatrix is not None and wanted.base in FLOAT_TYPES:
        raise ParameterError(f"{wanted.name} is not quantised: an importance matrix has no use for it")
    path = find_model(source)
    checkpoint = open_checkpoint(path)
    metadata = gguf_keys(path, checkpoint)
    importance = None
    if imatrix is not None:
        found = read_imatrix(imatrix)
        metadata |= _imatrix_keys(imatrix, found)
        importance = found.means
    began = time.monotonic()
    written = write_quantized(
        checkpoint, out, metadata, wanted, importance=importance, allow_requantize=allow_requantize
    )
    typer.echo(f"{summary(out, written)}\ntook {time.monotonic() - began:.1f} s")


def gguf_keys(path: Path, checkpoint: Checkpoint) -> dict[str, Value]:
    """Return what stands in the file beside the weights: a GGUF's own keys, or others'."""
    from puna.gguf_header import read_metadata
    from puna.text.gguf_vocab_export import gguf_vocabulary
    from puna.weights.gguf_export import gguf_metadata

    if checkpoint.format == "gguf":
        dropped = ("split.", "general.alignment", "quantize.")
        keys = read_metadata(checkpoint.path)
        return {key: value for key, value in keys.items() if not key.startswith(dropped)}
    vocabulary = gguf_vocabulary(path, vocab_size=checkpoint.config.vocab_size)
    return {**gguf_metadata(checkpoint.config, path.resolve().name), **_sampling(path), **vocabulary}


def _sampling(path: Path) -> dict[str, Value]:
    """Return the sampling settings that a model recommends, under llama.cpp's keys."""
    from puna.locate import read_generation_config

    config = read_generation_config(path) if path.is_dir() else None
    if config is None or not config.get("do_sample"):
        return {}
    names = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    found = {theirs: config.get(ours) for ours, theirs in names.items()}
    return {f"general.sampling.{name}": value for name, value in found.items() if value is not None}


def _imatrix_keys(path: Path, found: ImportanceMatrix) -> dict[str, Value]:
    """Say where an importance matrix came from, as llama-quantize does."""
    return {
        "quantize.imatrix.file": str(path),
        "quantize.imatrix.dataset": ", ".join(found.datasets),
        "quantize.imatrix.entries_count": len(found.means),
        "quantize.imatrix.chunks_count": found.chunks,
    }


def summary(out: Path, written: Written) -> str:
    """Return how large a file became, and what is in it."""
    types = ", ".join(
        f"{count} {kind.name}" for kind, count in sorted(written.types.items(), key=lambda item: -item[1])
    )
    bits = written.num_bytes * 8 / written.num_weights
    return f"wrote {out}: {written.num_bytes / 1e6:,.1f} MB, {bits:.2f} bits per weight\ntensors: {types}"
