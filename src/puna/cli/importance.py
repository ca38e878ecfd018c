"""`puna imatrix`: let a model read a text, and write which of its weights' errors matter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puna.cli.run import ComputeDtype, Dtype
from puna.cli.threads import Threads, use_threads
from puna.errors import ParameterError

if TYPE_CHECKING:
    from puna.text.tokenizer import Tokenizer


def imatrix(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, or cria.")],
    data: Annotated[list[Path], typer.Option(metavar="FILE", help="A text file to read; repeatable.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The .gguf file to write; a new one.")
    ],
    context: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a piece of text.")] = 512,
    chunks: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most pieces to read [all].", show_default=False)
    ] = None,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read the names of special tokens as these tokens.")
    ] = False,
    dtype: ComputeDtype = Dtype.auto,
    threads: Threads = None,
) -> None:
    """Find which weights' errors matter, by reading text.

    For each column of each weight, the mean square of what it is multiplied with while the model reads: an
    importance matrix, for puna quantize --imatrix and for llama-quantize. A few hundred pieces of text like
    that which the model is for are enough.
    """
    from tqdm import tqdm

    from puna.cli.chat_state import DTYPES
    from puna.locate import find_model
    from puna.text.tokenizer import load_tokenizer
    from puna.weights.imatrix import write_imatrix
    from puna.weights.imatrix_collect import ActivationSums, cut_rows
    from puna.weights.loader import load_model

    if output.exists():
        raise ParameterError(f"{output}: is there already: give a new file")
    use_threads(threads)
    path = find_model(model)
    tokenizer = load_tokenizer(path)
    bos = tokenizer.bos_token_id if tokenizer.add_bos else None
    rows = [
        row
        for file in data
        for row in cut_rows(_read(file, tokenizer, parse_special=parse_special), context, bos)
    ][:chunks]
    if not rows:
        raise ParameterError(f"{data[0]}: there is no text in it")
    with ActivationSums(load_model(path, dtype=DTYPES[dtype.value])) as sums:
        for row in tqdm(rows, desc="reading", unit="piece", disable=None):
            sums.read(row)
    found = sums.found()
    write_imatrix(output, found, datasets=[str(file) for file in data], chunk_size=context, chunks=len(rows))
    tokens = sum(map(len, rows))
    typer.echo(f"wrote {output}: {len(found)} weights, {tokens:,} tokens in {len(rows)} pieces")


def _read(file: Path, tokenizer: Tokenizer, *, parse_special: bool) -> list[int]:
    """Return the ids of a text file, without BOS."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ParameterError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ParameterError(f"{file}: is no UTF-8 text: byte {error.start}") from error
    return tokenizer.encode(text, add_special_tokens=False, parse_special=parse_special)
