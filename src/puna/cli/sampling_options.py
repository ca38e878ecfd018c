"""Sampling settings as people type them: the names that Ollama gives parameters, read from words.

The values and limits are those of `SamplingParams`, which checks them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from puna.errors import ParameterError

# Ollama's name: ours, how to read a value, what it does
PARAMETERS: dict[str, tuple[str, type[int] | type[float], str]] = {
    "temperature": ("temperature", float, "0 takes the likeliest token always"),
    "top_k": ("top_k", int, "choose among the K likeliest tokens"),
    "top_p": ("top_p", float, "choose among the likeliest tokens that sum to P"),
    "min_p": ("min_p", float, "leave out tokens below P times the likeliest"),
    "repeat_penalty": ("repetition_penalty", float, "divide the odds of tokens already seen"),
    "presence_penalty": ("presence_penalty", float, "subtract from tokens already written"),
    "frequency_penalty": ("frequency_penalty", float, "subtract for each time a token was written"),
    "seed": ("seed", int, "the same seed gives the same text"),
    "num_predict": ("max_tokens", int, "most tokens of an answer; -1: no limit"),
}


def parse_parameter(name: str, text: str) -> dict[str, Any]:
    """Return {our name: value} of one parameter as it was typed; `stop` takes several, quoted if need be.

    Raises ParameterError naming the parameter or the value.
    """
    if name == "stop":
        return {"stop": _words(text)}
    if name not in PARAMETERS:
        known = ", ".join([*PARAMETERS, "stop"])
        raise ParameterError(f"unknown parameter '{name}' (there are {known})")
    ours, read, _ = PARAMETERS[name]
    try:
        value: float | None = read(text)
    except ValueError:
        kind = "number" if read is float else "whole number"
        raise ParameterError(f"{name} must be a {kind}, not '{text}'") from None
    if name == "num_predict" and value == -1:
        value = None
    return {ours: value}


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ParameterError(f"stop: {error}") from None


def parameter_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return settings as (Ollama's name, text), one row for each stop string; what is None is left out."""
    theirs = {ours: name for name, (ours, _, _) in PARAMETERS.items()}
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if name == "stop":
            rows.extend(("stop", quoted(text)) for text in value)
        elif value is not None:
            rows.append((theirs.get(name, name), f"{value:g}" if isinstance(value, float) else str(value)))
    return rows


def quoted(text: str) -> str:
    """Return a string between quotes, control characters escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def columns(rows: Sequence[tuple[str, str]], *, indent: str = "  ") -> list[str]:
    """Return two columns as lines, the second one aligned."""
    width = max((len(left) for left, _ in rows), default=0)
    return [f"{indent}{left:<{width}}    {right}".rstrip() for left, right in rows]
