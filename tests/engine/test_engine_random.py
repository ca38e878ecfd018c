"""Random lives of an engine: adds, steps, aborts, forks, shared prefixes, preemptions; guesses, grammars,
stop strings and log-probabilities among them.

Every request ends, every block comes back, and what each answer says is what it says alone.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.cria import FOLDER
from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import SamplingParams, StructuredOutputsParams
from puna.engine.speculative import DraftModelProposer, NgramProposer, Proposer
from puna.model import Llama
from puna.outputs import CompletionOutput
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.text_engine import TextEngine

from tiny import hf_llama, puna_twin

GRAMMARS: dict[str, dict[str, Any]] = {
    "choice": {"choice": ["yes", "no", "perhaps"]},
    "regex": {"regex": "[a-c]{2,9}( [0-9]{1,3})?"},
    "json": {"json": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}},
}
requests = st.fixed_dictionaries(
    {
        "shared": st.integers(0, 30),
        "own": st.lists(st.integers(0, 95), min_size=1, max_size=12),
        "tokens": st.integers(1, 12),
        "n": st.integers(1, 3),
        "temperature": st.sampled_from([0.0, 1.0]),
        "grammar": st.sampled_from([None, None, *GRAMMARS]),
        "stop": st.sampled_from([None, None, ["e"], ["ta", "r"]]),
        "logprobs": st.sampled_from([None, None, 0, 2]),
        "likes_repeats": st.booleans(),
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
_alone: dict[str, CompletionOutput] = {}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Llama:
    twin: Llama = puna_twin(hf_llama(vocab_size=tokenizer.vocab_size))
    return twin


@pytest.fixture(scope="module")
def draft(tokenizer: Tokenizer) -> Llama:
    twin: Llama = puna_twin(hf_llama(vocab_size=tokenizer.vocab_size, num_hidden_layers=1))
    return twin


def params_of(wanted: dict[str, Any], seed: int, n: int) -> SamplingParams:
    grammar = wanted["grammar"]
    return SamplingParams(
        temperature=wanted["temperature"],
        max_tokens=wanted["tokens"],
        seed=seed,
        n=1 if wanted["temperature"] == 0 else n,
        stop=wanted["stop"],
        logprobs=wanted["logprobs"],
        logit_bias={300: 9.0, 301: 9.0} if wanted["likes_repeats"] else None,  # so that guesses come true
        structured_outputs=None if grammar is None else StructuredOutputsParams(**GRAMMARS[grammar]),
    )


def alone(model: Llama, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> CompletionOutput:
    key = repr((prompt, params))
    if key not in _alone:
        config = EngineConfig(kv_cache_memory_bytes=2**20, enable_prefix_caching=False)
        engine = TextEngine(model, tokenizer, config)
        request = engine.add("alone", prompt, params)
        while engine.has_unfinished:
            engine.step()
        _alone[key] = request.snapshot().outputs[0]
    return _alone[key]


@pytest.mark.parametrize("spec", [None, "ngram", "draft", "same"])
@settings(max_examples=12, deadline=None)
@given(wanted=st.lists(requests, min_size=1, max_size=8), config=settings_of_engine)
def test_every_life_ends_well(
    model: Llama,
    draft: Llama,
    tokenizer: Tokenizer,
    spec: str | None,
    wanted: list[dict[str, Any]],
    config: dict[str, Any],
) -> None:
    blocks, size = config["blocks"], config["block_size"]
    others = {key: value for key, value in config.items() if key != "blocks"}
    vocab = model.config.vocab_size
    proposer: Proposer | None = None
    if spec is not None:
        guesser = draft if spec == "draft" else model
        proposer = (
            NgramProposer(3, lookup_min=1)
            if spec == "ngram"
            else DraftModelProposer(guesser, 3, vocab_size=vocab)
        )
    num_blocks = max(blocks, -(-64 // size))
    text_engine = TextEngine(
        model, tokenizer, EngineConfig(**others, num_blocks=num_blocks), proposer=proposer
    )
    prompts = [[*range(request["shared"]), *request["own"]] for request in wanted]
    done: dict[str, list[CompletionOutput]] = {}
    waiting = list(enumerate(wanted))
    aborted: set[str] = set()
    for step in range(10_000):
        while waiting and waiting[0][1]["wait"] <= step:
            i, request = waiting.pop(0)
            params = params_of(request, 100 * i, request["n"])
            text_engine.add(str(i), prompts[i], params, priority=request["priority"])
        for i, request in enumerate(wanted):
            if request["abort_after"] == step:
                text_engine.abort(str(i))
                aborted.add(str(i))
        for outputs in text_engine.step():
            if outputs.finished:
                done[outputs.request_id] = outputs.snapshot().outputs
        check_blocks(text_engine.engine)
        if not waiting and not text_engine.has_unfinished:
            break
    assert text_engine.engine.pool.num_free == text_engine.engine.pool.num_blocks
    for i, request in enumerate(wanted):
        if str(i) in aborted:
            continue
        answers = done[str(i)]
        assert len(answers) == params_of(request, 0, request["n"]).n
        for answer in answers:
            params = params_of(request, 100 * i + answer.index, 1)
            check_answer(answer, alone(model, tokenizer, prompts[i], params))


def check_answer(answer: CompletionOutput, expected: CompletionOutput) -> None:
    """Compare an answer with the one that was given alone."""
    assert answer.token_ids == expected.token_ids and answer.text == expected.text
    assert (answer.finish_reason, answer.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert (answer.logprobs is None) == (expected.logprobs is None)
    for found, there in zip(answer.logprobs or [], expected.logprobs or [], strict=True):
        assert found.keys() == there.keys()
        for token_id, value in found.items():
            assert value.logprob == pytest.approx(there[token_id].logprob, abs=1e-3)
    if answer.logprobs is not None:
        assert len(answer.logprobs) == len(answer.token_ids)
        assert answer.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-2)


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
