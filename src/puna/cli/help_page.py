"""The help of every command as one page: `python -m puna.cli.help_page > docs/cli.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import typer
from typer.testing import CliRunner

from puna.cli.app import app

_INTRODUCTION = """\
# The command line

What each command says with `--help`. This page is written by
`python -m puna.cli.help_page > docs/cli.md`; a test holds it to what the commands say.
"""


def help_page() -> str:
    """Return the page: the help of `puna`, then of each command, 80 columns wide."""
    commands = [[], *_commands(app, [])]
    return "\n".join([_INTRODUCTION, *map(_section, commands)])


def _commands(app: typer.Typer, group: list[str]) -> Iterator[list[str]]:
    """Yield the words that call each command, in the order of the help: groups and what is in them last."""
    for command in app.registered_commands:
        if command.callback:
            yield [*group, command.name or command.callback.__name__]
    for inner in app.registered_groups:
        if inner.typer_instance:
            words = [*group, str(inner.typer_instance.info.name)]
            yield words
            yield from _commands(inner.typer_instance, words)


def _section(command: list[str]) -> str:
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name="puna").stdout
    return f"## {' '.join(['puna', *command])}\n\n```text\n{shown.strip()}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(help_page())
