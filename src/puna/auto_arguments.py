"""Say no to arguments that Transformers has and Puna does not do, and to those that nobody has.

An argument that would change nothing is let through: None, or one of the values that a table lists for its
name. It knows names and values, not what they mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from puna.errors import ParameterError, UnsupportedError

# What changes nothing besides None, by the argument's name.
WithoutEffect = Mapping[str, tuple[Any, ...]]


def refuse(
    where: str, given: Mapping[str, Any], without_effect: WithoutEffect, *, own: Iterable[str] = ()
) -> None:
    """Raise ParameterError for a name not in the table, UnsupportedError that lists all that ask for more.

    `own` are the names that are taken, for a hint where one is misspelled.
    """
    for name in given:
        if name not in without_effect:
            close = difflib.get_close_matches(name, own, 1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise ParameterError(f"{where} has no parameter {name!r}{hint}")
    refused = {name: value for name, value in given.items() if asks(value, without_effect[name])}
    if refused:
        listed = ", ".join(f"{name}={_shown(value)}" for name, value in sorted(refused.items()))
        raise UnsupportedError(f"{where} does not support {listed}")


def asks(value: object, neutral: tuple[Any, ...]) -> bool:
    """Say whether a value is none of the neutral ones; 0 is not False, and tensors are never compared."""
    return value is not None and not any(type(value) is type(other) and value == other for other in neutral)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
