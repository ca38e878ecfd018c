"""The commands, put together, and the options of `puna` itself.

Help is plain text: rich's boxes would double the time that `puna --help` takes.
"""

from __future__ import annotations

from typing import Annotated

import typer

import puna
from puna.cli.adapter import adapter
from puna.cli.data import data
from puna.cli.export import export, merge
from puna.cli.importance import imatrix
from puna.cli.measure import bench
from puna.cli.quantize import quantize
from puna.cli.run import run
from puna.cli.show import show
from puna.cli.train import train

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(show)
app.command()(quantize)
app.command()(imatrix)
app.command()(train)
app.command()(merge)
app.command()(export)
app.add_typer(adapter)
app.add_typer(bench)
app.add_typer(data)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"puna {puna.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog="Start with: puna run")
def puna_command(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "-v", "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run Llama models on your own machine."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
