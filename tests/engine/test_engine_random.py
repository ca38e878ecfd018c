"""Random lives of an engine: adds, steps, aborts, forks, shared prefixes, preemptions.

Every request ends, every block comes back, and what each answer says is what it says alone.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.request import Sequence
from puna.engine.sampling import SamplingParams
from puna.model import Llama

from tiny import hf_llama, puna_twin

BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4

requests = st.fixed_dictionaries(
    {
        "shared": st.integers(0, 30),
        "own": st.lists(st.integers(0, 95), min_size=1, max_size=12),
        "tokens": st.integers(1, 12),
        "n": st.integers(1, 3),
        "temperature": st.sampled_from([0.0, 1.0]),
        "abort_after": st.none() | st.integers(0, 15),
        "wait": st.integers(0, 4),
        "priority": st.integers(0, 2),
    }
)
settings_of_engine = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 3, 4, 16]),
        "blocks": st.integers(16, 40),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(1, 40),
        "policy": st.sampled_from(["fcfs", "priority"]),
        "enable_prefix_caching": st.booleans(),
    }
)
_alone: dict[tuple[Any, ...], list[int]] = {}


@pytest.fixture(scope="module")
def model() -> Llama:
    twin: Llama = puna_twin(hf_llama(num_hidden_layers=2))
    return twin


def params_of(wanted: dict[str, Any], seed: int | None, n: int) -> SamplingParams:
    return SamplingParams(
        temperature=wanted["temperature"],
        max_tokens=wanted["tokens"],
        seed=seed,
        n=1 if wanted["temperature"] == 0 else n,
    )


def alone(model: Llama, prompt: list[int], params: SamplingParams) -> list[int]:
    key = (*prompt, "|", params.temperature, params.max_tokens, params.seed)
    if key not in _alone:
        engine = LLMEngine(model, EngineConfig(kv_cache_memory_bytes=2**20, enable_prefix_caching=False))
        engine.add("alone", prompt, params)
        done: list[Sequence] = []
        while engine.has_unfinished:
            done += [output.sequence for output in engine.step()]
        _alone[key] = done[-1].output_ids
    return _alone[key]


@settings(max_examples=40, deadline=None)
@given(wanted=st.lists(requests, min_size=1, max_size=8), config=settings_of_engine)
def test_every_life_ends_well(model: Llama, wanted: list[dict[str, Any]], config: dict[str, Any]) -> None:
    blocks, size = config.pop("blocks"), config["block_size"]
    tokens = max(blocks * size, 64)
    engine = LLMEngine(model, EngineConfig(**config, kv_cache_memory_bytes=tokens * BYTES_PER_TOKEN))
    prompts = [[*range(request["shared"]), *request["own"]] for request in wanted]
    done: dict[str, list[Sequence]] = {}
    waiting = list(enumerate(wanted))
    aborted: set[str] = set()
    for step in range(10_000):
        while waiting and waiting[0][1]["wait"] <= step:
            i, request = waiting.pop(0)
            engine.add(
                str(i), prompts[i], params_of(request, 100 * i, request["n"]), priority=request["priority"]
            )
        for i, request in enumerate(wanted):
            if request["abort_after"] == step:
                engine.abort(str(i))
                aborted.add(str(i))
        for output in engine.step():
            if output.sequence.finish_reason is not None:
                done.setdefault(output.sequence.request_id, []).append(output.sequence)
        check_blocks(engine)
        if not waiting and not engine.has_unfinished:
            break
    assert engine.pool.num_free == engine.pool.num_blocks
    for i, request in enumerate(wanted):
        if str(i) in aborted:
            continue
        answers = done[str(i)]
        assert len(answers) == params_of(request, None, request["n"]).n
        for answer in answers:
            expected = alone(model, prompts[i], params_of(request, 100 * i + answer.index, 1))
            assert answer.output_ids == expected


def check_blocks(engine: LLMEngine) -> None:
    """Each block's holders are the sequences whose tables have it, and nobody writes into another's."""
    live = [*engine.scheduler.running, *engine.scheduler.waiting]
    holders: dict[int, int] = {}
    for sequence in live:
        assert len(set(sequence.block_table)) == len(sequence.block_table)
        for block in sequence.block_table:
            holders[block] = holders.get(block, 0) + 1
    assert engine.pool.num_free == engine.pool.num_blocks - len(holders)
    for block, count in holders.items():
        assert engine.pool.is_shared(block) == (count > 1)
