"""Each sampling rule on logits where the right answer is known, and each refusal by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from puna.engine.request import Sequence
from puna.engine.sampler import logprobs_of, sample
from puna.engine.sampling import (
    BeamSearchParams,
    RepetitionDetectionParams,
    SamplingParams,
    SamplingType,
    StructuredOutputsParams,
)
from puna.errors import ParameterError, UnsupportedError

CHANCES = [0.5, 0.1, 0.2, 0.15, 0.05]
LOGITS = torch.tensor(CHANCES).log()


def sequence_for(
    params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None
) -> Sequence:
    sequence = Sequence("a", prompt or [0], params, max_tokens=10**6)
    sequence.token_ids += output or []
    return sequence


def one(logits: Tensor, params: SamplingParams, **context: Any) -> int:
    drawn = sample(logits, sequence_for(params, **context))
    assert drawn is not None
    return drawn


def test_where_nothing_is_allowed_nothing_is_drawn() -> None:
    params = SamplingParams(allowed_token_ids=[1], bad_words_token_ids=[[1]])
    assert sample(LOGITS, sequence_for(params)) is None


def shares(logits: Tensor, draws: int = 3000, **params: Any) -> list[float]:
    sequence = sequence_for(SamplingParams(seed=0, **params))
    drawn = [sample(logits, sequence) for _ in range(draws)]
    return [drawn.count(token) / draws for token in range(len(logits))]


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert one(torch.tensor([1.0, 3.0, 3.0]), SamplingParams(temperature=0.0)) == 1


def test_plain_sampling_follows_the_probabilities() -> None:
    assert shares(LOGITS) == pytest.approx(CHANCES, abs=0.03)


def test_temperature_sharpens() -> None:
    squared = [p * p for p in CHANCES]
    expected = [p / sum(squared) for p in squared]
    assert shares(LOGITS, temperature=0.5) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {0, 2}),
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.49}, {0}),
        ({"top_p": 0.71}, {0, 2, 3}),
        ({"top_p": 0.01}, {0}),
        ({"min_p": 0.25}, {0, 2, 3}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.55}, {0}),  # of the three that top-k left, the first has 0.59
        ({"allowed_token_ids": [1, 4]}, {1, 4}),
        ({"logit_bias": {0: -math.inf}}, {1, 2, 3, 4}),
        ({"bad_words_token_ids": [[0], [2]]}, {1, 3, 4}),
    ],
    ids=str,
)
def test_truncation_keeps_exactly(params: dict[str, Any], kept: set[int]) -> None:
    assert {i for i, share in enumerate(shares(LOGITS, draws=600, **params)) if share} == kept


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=40),
    st.floats(0.05, 1.0),
    st.integers(0, 10),
    st.floats(0.0, 0.5),
    st.integers(0, 5),
)
def test_what_is_drawn_is_never_what_was_cut(
    values: list[float], top_p: float, top_k: int, min_p: float, seed: int
) -> None:
    logits = torch.tensor(values)
    drawn = one(logits, SamplingParams(top_p=top_p, top_k=top_k, min_p=min_p, seed=seed))
    chances = logits.softmax(dim=-1)
    assert chances[drawn] >= min_p * chances.max() * (1 - 1e-5)
    if top_k:
        assert int((logits > logits[drawn]).sum()) < top_k
    kept = chances * (chances >= min_p * chances.max() * (1 - 1e-6))
    if top_k:
        kept = kept * (logits >= logits.topk(min(top_k, len(values))).values[-1])
    likelier = kept[kept > kept[drawn]].sum() / kept.sum()
    assert likelier < top_p + 1e-5


def test_top_p_over_a_large_vocabulary_equals_sorting_it_all() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3
    ordered = logits.sort(descending=True)
    chances = ordered.values.softmax(dim=-1)
    kept = set(ordered.indices[(chances.cumsum(0) - chances) < 0.6].tolist())
    sequence = sequence_for(SamplingParams(top_p=0.6, seed=0))
    assert {sample(logits, sequence) for _ in range(400)} <= kept
    flat = torch.zeros(5000)  # here the likeliest 1,024 are not enough
    wide = sequence_for(SamplingParams(top_p=0.9, seed=0))
    assert len({sample(flat, wide) for _ in range(400)}) > 300


def test_typical_sampling_drops_the_least_surprising_too() -> None:
    logits = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]).log()
    # entropy 1.23; surprises 0.51 and 2.30: the likeliest is nearer
    assert {i for i, s in enumerate(shares(logits, draws=300, typical_p=0.5)) if s} == {0}
    flat_top = torch.tensor([0.3, 0.14, 0.14, 0.14, 0.14, 0.14]).log()
    # entropy 1.74; surprises 1.20 and 1.97: the five are nearer
    assert {i for i, s in enumerate(shares(flat_top, draws=600, typical_p=0.6)) if s} == {1, 2, 3, 4, 5}


def test_top_k_keeps_ties_of_the_last_one() -> None:
    found = shares(torch.tensor([2.0, 1.0, 1.0, 0.0]), top_k=2)
    assert found[1] > 0 and found[2] > 0 and found[3] == 0


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert one(logits, params, prompt=[0]) == 1
    assert one(logits[2:], params, prompt=[1], output=[0]) == 0
    assert one(torch.tensor([-1.0, -1.5, -9.0]), params, prompt=[2], output=[0]) == 1


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.tensor([2.0, 1.9, 0.0])
    presence = SamplingParams(temperature=0.0, presence_penalty=0.2)
    frequency = SamplingParams(temperature=0.0, frequency_penalty=0.06)
    assert one(logits, presence, prompt=[0, 0]) == 0
    assert one(logits, presence, output=[0]) == 1
    assert one(logits, frequency, output=[0]) == 0
    assert one(logits, frequency, output=[0, 0]) == 1


def test_a_bad_word_of_several_tokens_is_only_barred_behind_its_beginning() -> None:
    params = SamplingParams(temperature=0.0, bad_words_token_ids=[[3, 1, 0]])
    assert one(LOGITS, params, output=[3, 2]) == 0
    assert one(LOGITS, params, output=[3, 1]) == 2


def test_minimum_length_bars_stop_and_end_ids() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[0])
    sequence = Sequence("a", [1], params, max_tokens=9, end_ids=frozenset({2}))
    assert sample(LOGITS, sequence) == 3
    sequence.token_ids += [1, 1]
    assert sample(LOGITS, sequence) == 0


def test_logprobs_hold_the_chosen_token_first_and_the_best_by_rank() -> None:
    found = logprobs_of(LOGITS, 1, 2)
    assert found.token_ids == [1, 0, 2] and found.ranks == [4, 1, 2]
    assert found.values == pytest.approx([math.log(p) for p in (0.1, 0.5, 0.2)], abs=1e-6)
    assert logprobs_of(LOGITS, 0, 1).token_ids == [0]
    assert sorted(logprobs_of(LOGITS, 0, -1).token_ids) == [0, 1, 2, 3, 4]


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.stop, params.stop_token_ids) == (16, 0, [], [])
    assert SamplingParams(stop="x").stop == ["x"] and SamplingParams(seed=-1).seed is None
    assert SamplingParams(temperature=0.001).temperature == 0.01
    assert SamplingParams(stop_token_ids=[3, 1, 3]).stop_token_ids == [3, 1]
    copied = params.clone()
    copied.temperature = 0.5
    assert params.temperature == 1.0


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
        {"typical_p": 0.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": -3.0},
        {"max_tokens": 0},
        {"min_tokens": 17},
        {"n": 0},
        {"seed": 2**64},
        {"stop": [""]},
        {"bad_words": [""]},
        {"bad_words": ["x"] * 129},
        {"allowed_token_ids": []},
        {"stop_token_ids": ["1"]},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
        {"bad_words": "word"},
        {"logprobs": -2},
        {"stream_interval": 0},
        {"logprob_token_ids": list(range(129))},
        {"logprob_token_ids": [1.5]},
        {"n": None},
        {"top_k": None},
        {"min_tokens": None},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"stop_token_ids": [[1]]},
        {"allowed_token_ids": 5},
        {"logit_bias": [1]},
        {"output_kind": "delta"},
        {"structured_outputs": {"regex": "a"}},
        {"repetition_detection": {}},
    ],
    ids=str,
)
def test_a_wrong_value_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        SamplingParams(**wrong)
    with pytest.raises(ValueError):
        SamplingParams(**wrong)


def test_combinations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ParameterError, match="n must be 1 when using greedy"):
        SamplingParams(n=2, temperature=0.0)
    with pytest.raises(ParameterError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
    with pytest.raises(ParameterError, match="beam_width"):
        BeamSearchParams(beam_width=0, max_tokens=5)
    with pytest.raises(ParameterError, match="exactly one"):
        StructuredOutputsParams(regex="a", choice=["b"])
    with pytest.raises(ParameterError, match="exactly one"):
        StructuredOutputsParams()
    with pytest.raises(ParameterError, match="choice must not be empty"):
        StructuredOutputsParams(choice=[])
    with pytest.raises(ParameterError, match="structural_tag must not be empty"):
        StructuredOutputsParams(structural_tag="")
    with pytest.raises(ParameterError, match="choice must be of type list or tuple, got 'yes'"):
        StructuredOutputsParams(choice="yes")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="choice must hold texts"):
        StructuredOutputsParams(choice=["a", 1])  # type: ignore[list-item]
    with pytest.raises(ParameterError, match="regex must be of type str, got 5"):
        StructuredOutputsParams(regex=5)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="whitespace_pattern goes with json or json_object, not with re"):
        StructuredOutputsParams(regex="a", whitespace_pattern=" ")
    with pytest.raises(ParameterError, match="disable_additional_properties goes with .*, not with choice"):
        StructuredOutputsParams(choice=["a"], disable_additional_properties=True)
    with pytest.raises(ParameterError, match="logprobs must be 2"):
        SamplingParams(logprobs=3, logprob_token_ids=[1, 2])
    with pytest.raises(ParameterError, match="min_count must be at least 2"):
        RepetitionDetectionParams(max_pattern_size=3, min_count=1)
    with pytest.raises(ParameterError, match="min_pattern_size must be at most 3"):
        RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=4, min_count=2)


def test_fields_come_in_vllms_order() -> None:
    expected = (
        "n presence_penalty frequency_penalty repetition_penalty temperature watermarking top_p top_k min_p "
        "seed stop stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs "
        "prompt_logprob_token_ids prompt_logprob_start logprob_token_ids flat_logprobs detokenize "
        "skip_special_tokens "
        "spaces_between_special_tokens include_stop_str_in_output output_kind stream_interval skip_clone "
        "structured_outputs logit_bias allowed_token_ids extra_args bad_words skip_reading_prefix_cache "
        "thinking_token_budget repetition_detection routed_experts_prompt_start trace_decode_token_ids"
    )
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    assert names[: names.index("typical_p")] == expected.split()
    beams = "beam_width max_tokens ignore_eos temperature length_penalty include_stop_str_in_output"
    beams += " structured_outputs skip_special_tokens watermarking allowed_token_ids"
    assert [f.name for f in dataclasses.fields(BeamSearchParams)] == beams.split()


@pytest.mark.parametrize(
    "lacking",
    [
        {"watermarking": True},
        {"prompt_logprob_token_ids": [1]},
        {"prompt_logprob_start": 2},
        {"extra_args": {"a": 1}},
        {"thinking_token_budget": 0},
        {"routed_experts_prompt_start": 1},
        {"trace_decode_token_ids": []},
    ],
    ids=str,
)
def test_what_puna_lacks_is_refused_by_name(lacking: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(lacking))):
        SamplingParams(**lacking)


def test_what_asks_for_nothing_is_taken() -> None:
    SamplingParams(watermarking=False, extra_args={}, thinking_token_budget=-1)
    with pytest.raises(UnsupportedError, match="watermarking"):
        BeamSearchParams(beam_width=2, max_tokens=3, watermarking=True)
    with pytest.raises(ParameterError, match="allowed_token_ids"):
        BeamSearchParams(beam_width=2, max_tokens=3, allowed_token_ids=[])


def test_from_optional_reads_none_as_the_default_and_cuts_biases() -> None:
    made = SamplingParams.from_optional(top_p=None, seed=3, logit_bias={"7": 250, 8: -1.5})
    assert made == SamplingParams(seed=3, logit_bias={7: 100.0, 8: -1.5})
    with pytest.raises(ParameterError, match="logit_bias"):
        SamplingParams.from_optional(logit_bias={"x": 1})
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams.from_optional(best_of=2)


def test_the_type_of_sampling_and_clones() -> None:
    assert SamplingParams(temperature=0).sampling_type is SamplingType.GREEDY
    assert SamplingParams().sampling_type is SamplingType.RANDOM
    assert SamplingParams(seed=0).sampling_type is SamplingType.RANDOM_SEED
    own = SamplingParams(skip_clone=True)
    assert own.clone() is own and SamplingParams(stop_token_ids=[2, 2]).all_stop_token_ids == {2}


@pytest.mark.parametrize(
    ("ids", "repeats"),
    [
        ([7, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 1, 2, 1, 2, 7], False),
        ([1, 2, 1, 2], False),
        ([5, 5, 5], False),  # patterns of one token are below the least size
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([1, 2, 3, 4] * 3, False),  # and of four above the greatest
    ],
)
def test_repetition_is_one_pattern_at_the_end_often_enough(ids: list[int], repeats: bool) -> None:
    params = RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=2, min_count=3)
    assert params.repeats(ids) is repeats
    assert not RepetitionDetectionParams().repeats(ids)


def test_a_repetition_ends_the_sequence() -> None:
    detection = RepetitionDetectionParams(max_pattern_size=2, min_count=2)
    sequence = sequence_for(SamplingParams(repetition_detection=detection), prompt=[4, 4])
    for token_id in (4, 3, 4):
        sequence.append(token_id)
        assert sequence.finish_reason is None
    sequence.append(3)
    assert sequence.finish_reason == "repetition"


def test_logprobs_of_given_ids() -> None:
    found = logprobs_of(LOGITS, 1, 0, [4, 1, 0])
    assert found.token_ids == [1, 4, 0] and found.ranks == [4, 5, 1]
    assert found.values == pytest.approx([math.log(p) for p in (0.1, 0.05, 0.5)], abs=1e-6)
