"""Arguments of Transformers: let through where they change nothing, else refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from puna.auto_arguments import refuse
from puna.errors import ParameterError, UnsupportedError

TABLE: dict[str, tuple[Any, ...]] = {"stride": (0,), "flag": (False, True), "text_pair": ()}


@pytest.mark.parametrize("given", [{}, {"stride": 0}, {"flag": True, "stride": None}, {"text_pair": None}])
def test_what_changes_nothing_passes(given: dict[str, Any]) -> None:
    refuse("call()", given, TABLE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stride": 1}, "call\\(\\) does not support stride=1$"),
        ({"stride": False}, "stride=False"),
        ({"stride": torch.zeros(2)}, r"stride=tensor\(\[0., 0.\]\)"),
        ({"text_pair": "x" * 200, "stride": 2}, r"support stride=2, text_pair='x{76}\.\.\.$"),
    ],
)
def test_what_asks_for_more_is_listed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        refuse("call()", given, TABLE)


def test_names_that_nobody_has() -> None:
    with pytest.raises(ParameterError, match=r"call\(\) has no parameter 'strides'$"):
        refuse("call()", {"strides": 0}, TABLE)
    with pytest.raises(ParameterError, match="'max_lenght': did you mean 'max_length'"):
        refuse("call()", {"max_lenght": 9}, TABLE, own=["min_length", "max_length"])
