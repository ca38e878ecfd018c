"""`puna show`: what a model is, read without loading its weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.cli.model_facts import ModelFacts


def show(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", hidden=True)] = None,
    template: Annotated[bool, typer.Option("--template", help="Print the chat template.")] = False,
    license: Annotated[bool, typer.Option("--license", help="Print the whole licence text.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what a model is, without loading it.

    Its size, context, quantisation, tokenizer, default parameters and licence. MODEL is a folder with a
    checkpoint, a .gguf file, or cria, the embedded model, which is also taken when nothing is given.
    """
    if template + license + as_json > 1:
        raise typer.BadParameter("only one of --template, --license and --json can be given")
    from puna.cli.model_facts import facts_lines, read_facts
    from puna.locate import find_model

    facts = read_facts(find_model(model))
    if template:
        typer.echo(_found(facts.chat_template, facts, "chat template"))
    elif license:
        typer.echo(_found(facts.licence_text, facts, "licence text"))
    elif as_json:
        typer.echo(json.dumps(asdict(facts), indent=2, default=str))
    else:
        typer.echo("\n".join(facts_lines(facts)).rstrip())


def _found(text: str | None, facts: ModelFacts, what: str) -> str:
    if text is None:
        raise PunaError(f"{facts.path}: no {what} is kept with this model")
    return text
