"""`puna data preview`: rows as the model will see them, with the tokens that are trained in colour."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puna.errors import ParameterError

if TYPE_CHECKING:
    from puna.text.tokenizer import Tokenizer
    from puna.train.encoding import Example

data = typer.Typer(name="data", help="Look at training data.", no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def data_command() -> None:
    """Look at training data."""


@data.command()
def preview(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .jsonl, .json, .csv or .parquet file, or OWNER/NAME.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose tokenizer and chat template are used.")
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", help="Rows to show; 0: all.")] = 3,
    data_format: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="messages, prompt-completion, text, alpaca, sharegpt, preference."),
    ] = None,
    chat_format: Annotated[str | None, typer.Option(metavar="NAME", help="A built-in chat format.")] = None,
    color: Annotated[
        bool | None,
        typer.Option("--color/--no-color", help="Trained tokens in green, or between >>> and <<<."),
    ] = None,
) -> None:
    """Show rows as they are rendered for training, and which tokens are trained."""
    from typing import cast

    from puna.locate import find_model
    from puna.text.tokenizer import load_tokenizer
    from puna.train.data_files import read_records
    from puna.train.encoding import ChatRendering, encode_row
    from puna.train.rows import DataFormat, PairRow, read_rows

    if rows < 0:
        raise ParameterError(f"rows must be at least 0, got {rows}")
    tokenizer = load_tokenizer(find_model(model))
    records = read_records([file])
    chosen = read_rows(records[: rows or None], cast(DataFormat | None, data_format))
    in_color = sys.stdout.isatty() if color is None else color
    plain = [
        part
        for row in chosen
        for part in ((row.chosen, row.rejected) if isinstance(row, PairRow) else (row,))
    ]
    examples = [encode_row(row, tokenizer, ChatRendering(chat_format=chat_format)) for row in plain]
    for example in examples:
        typer.echo(f"{example.place}: {len(example.ids)} tokens, {example.num_trained} trained")
        typer.echo("".join(_pieces(example, tokenizer, in_color=in_color)) + "\n", color=in_color)
    tokens, trained = (sum(counts) for counts in zip(*map(_counts, examples), strict=True))
    share = 100 * trained / tokens
    typer.echo(f"{len(chosen)} of {len(records)} rows: {tokens} tokens, {trained} trained ({share:.1f}%)")


def _counts(example: Example) -> tuple[int, int]:
    return len(example.ids), example.num_trained


def _pieces(example: Example, tokenizer: Tokenizer, *, in_color: bool) -> Iterator[str]:
    """Yield the text of a row in stretches that are trained, or not."""
    marked = zip(example.ids, example.trained, strict=True)
    for trained, group in itertools.groupby(marked, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        if not trained:
            yield text
        else:
            yield typer.style(text, fg=typer.colors.GREEN) if in_color else f">>>{text}<<<"
