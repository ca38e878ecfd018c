"""Parameters as people type them."""

from __future__ import annotations

from typing import Any

import pytest

from puna.cli.sampling_options import PARAMETERS, columns, parameter_rows, parse_parameter
from puna.engine.sampling import SamplingParams
from puna.errors import ParameterError


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("temperature", "0.5", {"temperature": 0.5}),
        ("top_k", "40", {"top_k": 40}),
        ("repeat_penalty", "1.1", {"repetition_penalty": 1.1}),
        ("seed", "-7", {"seed": -7}),
        ("num_predict", "100", {"max_tokens": 100}),
        ("num_predict", "-1", {"max_tokens": None}),
        ("stop", 'END "two words"', {"stop": ("END", "two words")}),
    ],
)
def test_values_are_read(name: str, text: str, expected: dict[str, Any]) -> None:
    assert parse_parameter(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("top_k", "0.5", "top_k must be a whole number, not '0.5'"),
        ("temperature", "hot", "temperature must be a number, not 'hot'"),
        ("mirostat", "1", "unknown parameter 'mirostat' (there are temperature, "),
        ("stop", '"open', "stop: No closing quotation"),
    ],
)
def test_wrong_ones_are_named(name: str, text: str, message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        parse_parameter(name, text)
    assert str(caught.value).startswith(message)


def test_every_parameter_is_one_of_the_engine() -> None:
    for name, (ours, read, _) in PARAMETERS.items():
        value: Any = read("1")
        SamplingParams(**{ours: value})
        assert parse_parameter(name, "1") == {ours: value}


def test_rows_have_the_typed_names() -> None:
    values = {"repetition_penalty": 1.1, "max_tokens": None, "stop": ("a\n", "b"), "top_k": 40}
    rows = [("repeat_penalty", "1.1"), ("stop", '"a\\n"'), ("stop", '"b"'), ("top_k", "40")]
    assert parameter_rows(values) == rows
    assert columns(rows[:2]) == ["  repeat_penalty    1.1", '  stop              "a\\n"']
