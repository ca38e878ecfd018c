"""Two long prompts with one beginning: what the second computes, counted, and that its answer is the same."""

from __future__ import annotations

import random

import pytest

from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import SamplingParams
from puna.model import Llama

from tiny import hf_llama, puna_twin

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def model() -> Llama:
    """Return a tiny model with room for long prompts."""
    return puna_twin(hf_llama(max_position_embeddings=4096))


def engine_of(model: Llama, *, enable_prefix_caching: bool = True) -> LLMEngine:
    config = EngineConfig(
        block_size=BLOCK_SIZE, num_blocks=300, max_num_seqs=2, enable_prefix_caching=enable_prefix_caching
    )
    return LLMEngine(model, config)


def answer(engine: LLMEngine, prompt: list[int]) -> tuple[list[int], int, int]:
    """Return the new tokens, and how many of the prompt were computed and found."""
    before = engine.stats.prompt_tokens
    engine.add("one", prompt, SamplingParams(temperature=0.0, max_tokens=4))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    sequence = outputs[-1].sequence
    return sequence.output_ids, engine.stats.prompt_tokens - before, sequence.num_cached


def random_ids(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(96), k=count)


def test_the_second_of_two_prompts_computes_what_is_its_own(model: Llama) -> None:
    prefix = random_ids(0, 2000)
    engine = engine_of(model)
    _, computed, cached = answer(engine, prefix + random_ids(1, 50))
    assert (computed, cached) == (2050, 0)
    second = prefix + random_ids(2, 50)
    tokens, computed, cached = answer(engine, second)
    assert (computed, cached) == (50, 2000)
    assert computed / 2050 < 0.05
    assert tokens == answer(engine_of(model, enable_prefix_caching=False), second)[0]


@pytest.mark.parametrize(
    ("shared", "tail", "expected"),
    [
        (205, 45, 192),  # the block that both begin and neither shares whole is computed
        (256, 0, 240),  # the same prompt again: its last block gives the first token
        (15, 40, 0),
    ],
)
def test_only_whole_blocks_are_shared(model: Llama, shared: int, tail: int, expected: int) -> None:
    prefix = random_ids(3, shared)
    engine = engine_of(model)
    answer(engine, prefix + random_ids(4, tail))
    _, computed, cached = answer(engine, prefix + random_ids(5, tail))
    assert (computed, cached) == (shared + tail - expected, expected)
