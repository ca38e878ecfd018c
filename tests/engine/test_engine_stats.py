"""What the engine tells of itself: the times of a request, and the counters and gauges of its steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from puna.engine import llm_engine, scheduler
from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import SamplingParams
from puna.engine.speculative import NgramProposer

from tiny import hf_llama, puna_twin


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens)


def test_times_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    for module in (llm_engine, scheduler):
        monkeypatch.setattr(module, "time", clock)
    config = EngineConfig(num_blocks=64, max_num_batched_tokens=4, max_num_seqs=1)
    engine = LLMEngine(puna_twin(hf_llama()), config)
    for key in ("a", "b"):
        engine.add(key, [1, 2, 3, 4, 5, 6], greedy(3))
    first, second = engine.scheduler.waiting
    for step in range(1, 9):
        clock.now = float(step)
        engine.step()
    # the prompt takes two steps, the second of which gives a token; two tokens more; then the other request
    assert [first.times.scheduled, first.times.first_token, first.times.finished] == [1.0, 2.0, 4.0]
    assert [second.times.scheduled, second.times.first_token, second.times.finished] == [5.0, 6.0, 8.0]
    assert not engine.has_unfinished


def test_counters_and_gauges_step_by_step() -> None:
    engine = LLMEngine(puna_twin(hf_llama()), EngineConfig(num_blocks=20, block_size=4, max_num_seqs=2))
    for key in ("a", "b", "c"):
        engine.add(key, [1, 2, 3, 4, 5, 6, 7, 8, 9], greedy(2))
    engine.step()
    found = engine.snapshot()
    expected = {
        "num_requests_running": 2,
        "num_requests_waiting": 1,
        "num_blocks": 20,
        "num_free_blocks": 14,  # three for each prompt: nothing was computed yet that could be shared
        "last_batch_size": 2,
        "last_batch_tokens": 18,
        "prompt_tokens": 18,
        "output_tokens": 2,
        "steps": 1,
        "prefix_cache_queries": 18,
        "prefix_cache_hits": 0,
        "finished_length": 0,
    }
    assert {key: found[key] for key in expected} == expected
    engine.step()  # both end with their second token
    engine.step()  # the third finds two blocks of its prompt
    found = engine.snapshot()
    expected = {
        "num_requests_running": 1,
        "num_requests_waiting": 0,
        "num_free_blocks": 17,
        "last_batch_size": 1,
        "last_batch_tokens": 1,
        "prompt_tokens": 19,
        "output_tokens": 5,
        "steps": 3,
        "prefix_cache_queries": 27,
        "prefix_cache_hits": 8,
        "finished_length": 2,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["prefix_cache_hit_rate"] == pytest.approx(8 / 27)
    assert engine.scheduler.running[0].num_cached == 8


def test_ends_are_counted_by_reason() -> None:
    engine = LLMEngine(puna_twin(hf_llama()), EngineConfig(num_blocks=64))
    engine.add("a", [1, 2, 3], greedy(5))
    engine.add("b", [1, 2, 3], SamplingParams(n=3, seed=0, max_tokens=9))
    engine.step()
    engine.abort("b")
    token = engine.scheduler.running[0].output_ids[0]
    engine.add("c", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=5, stop_token_ids=[token]))
    while engine.has_unfinished:
        engine.step()
    found = engine.snapshot()
    ends = {key: found[f"finished_{key}"] for key in ("stop", "length", "abort", "error")}
    assert ends == {"stop": 1, "length": 1, "abort": 3, "error": 0}


def test_guesses_that_came_true_are_counted() -> None:
    engine = LLMEngine(
        puna_twin(hf_llama()), EngineConfig(num_blocks=64), proposer=NgramProposer(2, lookup_min=1)
    )
    params = SamplingParams(temperature=0.0, max_tokens=8, logit_bias={7: 99.0})
    engine.add("a", [7, 7, 7], params)
    while engine.has_unfinished:
        engine.step()
    found = engine.snapshot()
    # one token with the prompt, then three a step: 1 + 3 + 3, and one where no guess is worth making
    assert (found["steps"], found["drafted_tokens"], found["accepted_tokens"]) == (4, 4, 4)
    assert found["acceptance_rate"] == 1.0
