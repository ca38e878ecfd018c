"""Each sampling rule on logits where the right answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.engine.sampling import SamplingParams, make_generator, sample
from puna.errors import ParameterError

LOGITS = torch.tensor([0.5, 0.1, 0.2, 0.15, 0.05]).log()


def counts(params: SamplingParams, logits: Tensor = LOGITS, draws: int = 4000, **context: Any) -> list[float]:
    generator = make_generator(0)
    drawn = [sample(logits, params, generator, **context) for _ in range(draws)]
    return [drawn.count(token) / draws for token in range(len(logits))]


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert sample(torch.tensor([1.0, 3.0, 3.0]), SamplingParams(temperature=0.0), make_generator(0)) == 1


def test_plain_sampling_follows_the_probabilities() -> None:
    assert counts(SamplingParams()) == pytest.approx([0.5, 0.1, 0.2, 0.15, 0.05], abs=0.03)


def test_temperature_sharpens() -> None:
    squared = [p * p for p in (0.5, 0.1, 0.2, 0.15, 0.05)]
    expected = [p / sum(squared) for p in squared]
    assert counts(SamplingParams(temperature=0.5)) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_k=2), {0, 2}),
        (SamplingParams(top_k=-1), {0, 1, 2, 3, 4}),
        (SamplingParams(top_p=0.5), {0}),
        (SamplingParams(top_p=0.71), {0, 2, 3}),
        (SamplingParams(top_p=0.01), {0}),
        (SamplingParams(min_p=0.25), {0, 2, 3}),
        (SamplingParams(min_p=1.0), {0}),
        (SamplingParams(top_k=3, top_p=0.5), {0}),
    ],
)
def test_truncation_keeps_exactly(params: SamplingParams, kept: set[int]) -> None:
    assert {i for i, share in enumerate(counts(params)) if share} == kept


def test_top_k_keeps_ties_of_the_last_one() -> None:
    shares = counts(SamplingParams(top_k=2), torch.tensor([2.0, 1.0, 1.0, 0.0]))
    assert shares[1] > 0 and shares[2] > 0 and shares[3] == 0


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert sample(logits, params, make_generator(0), prompt_ids=[0]) == 1
    assert sample(logits[2:], params, make_generator(0), output_ids=[0]) == 1


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.tensor([2.0, 1.9, 0.0])
    presence = SamplingParams(temperature=0.0, presence_penalty=0.2)
    frequency = SamplingParams(temperature=0.0, frequency_penalty=0.06)
    assert sample(logits, presence, make_generator(0), prompt_ids=[0, 0]) == 0
    assert sample(logits, presence, make_generator(0), output_ids=[0]) == 1
    assert sample(logits, frequency, make_generator(0), output_ids=[0]) == 0
    assert sample(logits, frequency, make_generator(0), output_ids=[0, 0]) == 1


def test_min_tokens_bars_the_stop_ids_until_then() -> None:
    params = SamplingParams(temperature=0.0, stop_token_ids=(0, 2), min_tokens=2)
    assert sample(LOGITS, params, make_generator(0), output_ids=[1]) == 3
    assert sample(LOGITS, params, make_generator(0), output_ids=[1, 1]) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": -3.0},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"seed": 2**64},
        {"stop": ("",)},
    ],
)
def test_a_wrong_value_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        SamplingParams(**wrong)
