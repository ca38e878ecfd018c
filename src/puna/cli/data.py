"""`puna data preview`: rows as the model will see them, with the tokens that are trained in colour."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
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
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A .jsonl, .json, .csv or .parquet file, or OWNER/NAME.")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose tokenizer and chat template are used.")
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", help="Rows to show; 0: all.")] = 3,
    start: Annotated[int, typer.Option(metavar="N", help="The first row to show.")] = 1,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Mark where longer rows are cut.", show_default=False)
    ] = None,
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

    for name, value, least in (("rows", rows, 0), ("start", start, 1), ("max_length", max_length, 1)):
        if value is not None and value < least:
            raise ParameterError(f"{name} must be at least {least}, got {value}")
    tokenizer = load_tokenizer(find_model(model))
    records = read_records([file])
    if start > len(records):
        raise ParameterError(f"start is {start}, and {file} has {len(records)} rows")
    chosen = read_rows(records[start - 1 :][: rows or None], cast(DataFormat | None, data_format))
    in_color = sys.stdout.isatty() if color is None else color
    examples = []
    for row in chosen:
        is_pair = isinstance(row, PairRow)
        parts = {"chosen": row.chosen, "rejected": row.rejected} if isinstance(row, PairRow) else {"": row}
        for name, part in parts.items():
            example = encode_row(part, tokenizer, ChatRendering(chat_format=chat_format))
            examples.append(example)
            label = f"{example.place}, {name}" if is_pair else example.place
            typer.echo(f"{label}: {len(example.ids):,} tokens, {example.num_trained:,} trained")
            typer.echo(
                "".join(_pieces(example, tokenizer, max_length, in_color=in_color)) + "\n", color=in_color
            )
    typer.echo("\n".join(_summary(examples, len(chosen), len(records), max_length)))


def _summary(
    examples: Sequence[Example], num_shown: int, num_rows: int, max_length: int | None
) -> Iterator[str]:
    lengths = sorted(len(example.ids) for example in examples)
    tokens, trained = sum(lengths), sum(example.num_trained for example in examples)
    yield (
        f"{num_shown:,} of {num_rows:,} rows: {tokens:,} tokens, {trained:,} trained "
        f"({100 * trained / tokens:.1f}%)"
    )
    middle = lengths[(len(lengths) - 1) // 2]
    yield f"lengths: {lengths[0]:,} to {lengths[-1]:,} tokens, half of them up to {middle:,}"
    if max_length is not None:
        longer = sum(length > max_length for length in lengths)
        yield f"{longer:,} longer than {max_length:,} tokens"


def _pieces(
    example: Example, tokenizer: Tokenizer, max_length: int | None, *, in_color: bool
) -> Iterator[str]:
    """Yield the text of a row in stretches that are trained, or not."""
    is_cut = max_length is not None and len(example.ids) > max_length
    kept = len(example.ids) if max_length is None else max_length
    marked = zip(example.ids[:kept], example.trained, strict=False)
    for trained, group in itertools.groupby(marked, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        if not trained:
            yield text
        else:
            yield typer.style(text, fg=typer.colors.GREEN) if in_color else f">>>{text}<<<"
    if is_cut:
        rest = f"[cut: {len(example.ids) - kept:,} more tokens]"
        yield typer.style(rest, fg=typer.colors.RED) if in_color else rest
