"""The lines of `--verbose`."""

from __future__ import annotations

import pytest

from puna.cli.timings import duration, usage_lines
from puna.session import Usage


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.000012, "12us"),
        (0.130079, "130.079ms"),
        (0.5, "500ms"),
        (4.709213, "4.709213s"),
        (2.0, "2s"),
        (62.5, "1m2.5s"),
        (3600.0, "1h0m0s"),
    ],
)
def test_durations_are_written_as_go_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines() -> None:
    usage = Usage(prompt_tokens=30, cached_tokens=20, prompt_seconds=0.5, output_tokens=9, output_seconds=2.0)
    assert usage_lines(usage, 1.5) == [
        "total duration:       4s",
        "load duration:        1.5s",
        "prompt eval count:    30 token(s)",
        "prompt cached count:  20 token(s)",
        "prompt eval duration: 500ms",
        "prompt eval rate:     20.00 tokens/s",
        "eval count:           9 token(s)",
        "eval duration:        2s",
        "eval rate:            4.00 tokens/s",
    ]


def test_rates_that_cannot_be_measured_are_left_out() -> None:
    lines = usage_lines(Usage(prompt_tokens=1, prompt_seconds=0.5, output_tokens=1), 0.0)
    assert not [line for line in lines if line.startswith(("eval rate", "prompt cached"))]
