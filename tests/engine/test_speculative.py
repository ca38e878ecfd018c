"""The draft model's memory and work: in the budget, in the engine's blocks, in the engine's pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.request import Sequence
from puna.engine.sampling import SamplingParams
from puna.engine.speculative import DraftModelProposer, NgramProposer
from puna.errors import ParameterError
from puna.model import Llama

from tiny import hf_llama, puna_twin

TOKEN_BYTES = 2 * 2 * 8 * 4  # keys and values of one layer in float32


@pytest.fixture(scope="module")
def model() -> Llama:
    twin: Llama = puna_twin(hf_llama())
    return twin


@pytest.fixture(scope="module")
def draft() -> Llama:
    twin: Llama = puna_twin(hf_llama(num_hidden_layers=1))
    return twin


def drain(engine: LLMEngine) -> dict[str, list[int]]:
    done: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.sequence.finish_reason is not None:
                done[output.sequence.request_id] = output.sequence.output_ids
    assert engine.pool.num_free == engine.pool.num_blocks
    return done


def test_the_draft_models_cache_is_in_the_budget(model: Llama, draft: Llama) -> None:
    budget, size = 100_000, 4
    config = EngineConfig(block_size=size, kv_cache_memory_bytes=budget)
    alone = LLMEngine(model, config)
    both = LLMEngine(model, config, proposer=DraftModelProposer(draft, 3, vocab_size=96))
    assert alone.pool.num_blocks == budget // (2 * size * TOKEN_BYTES)
    assert both.pool.num_blocks == budget // (3 * size * TOKEN_BYTES)


def test_the_draft_model_reads_prompts_in_the_engines_pieces(
    model: Llama, draft: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposer = DraftModelProposer(draft, 3, vocab_size=96)
    config = EngineConfig(block_size=4, kv_cache_memory_bytes=2**22, max_num_batched_tokens=7)
    engine = LLMEngine(model, config, proposer=proposer)
    sizes: list[int] = []
    hidden_states = draft.hidden_states

    def noted(input_ids: Tensor, *others: Any) -> Tensor:
        sizes.append(len(input_ids))
        return hidden_states(input_ids, *others)

    monkeypatch.setattr(draft, "hidden_states", noted)
    engine.add("a", list(range(60)), SamplingParams(temperature=0.0, max_tokens=2))
    drain(engine)
    assert sizes == [7] * 8 + [4]  # the prompt, and no guess: the second token is the last


def test_a_draft_that_is_the_model_is_always_right_however_blocks_are_shared(model: Llama) -> None:
    proposer = DraftModelProposer(model, 3, vocab_size=96)
    config = EngineConfig(block_size=4, kv_cache_memory_bytes=2**22, max_num_batched_tokens=9)
    engine = LLMEngine(model, config, proposer=proposer)
    shared = list(range(42))
    for key, prompt in (("a", shared), ("b", [*shared, 1, 2, 3]), ("c", shared)):
        engine.add(key, prompt, SamplingParams(temperature=0.0, max_tokens=20))
        drain(engine)
    assert engine.scheduler.prefix_hits == 80
    assert engine.stats.accepted_tokens == engine.stats.drafted_tokens > 40


def test_a_draft_with_a_shorter_context_stops_guessing_there(model: Llama) -> None:
    short = puna_twin(hf_llama(max_position_embeddings=20))
    params = SamplingParams(temperature=0.0, max_tokens=40)
    outputs = []
    for proposer in (None, DraftModelProposer(short, 3, vocab_size=96)):
        engine = LLMEngine(model, EngineConfig(kv_cache_memory_bytes=2**22), proposer=proposer)
        engine.add("a", [1, 2, 3], params)
        outputs.append(drain(engine))
    assert outputs[0] == outputs[1]
    assert 12 <= engine.stats.accepted_tokens <= 17


def test_guesses_take_no_blocks_that_others_need(model: Llama) -> None:
    config = EngineConfig(num_blocks=6, block_size=4, max_num_seqs=2)
    engine = LLMEngine(model, config, proposer=NgramProposer(8, lookup_min=1))
    for key in ("a", "b"):
        engine.add(key, [5] * 7, SamplingParams(temperature=0.0, max_tokens=4))
    engine.step()
    first, second = engine.scheduler.running
    assert [len(s.block_table) for s in (first, second)] == [2, 2]
    assert not engine.scheduler.reserve(first, 5)  # one block more would leave one for two sequences
    assert engine.scheduler.reserve(first, 1)
    drain(engine)
    assert engine.scheduler.num_preemptions == 0


def test_ngram_guesses_go_on_from_the_first_place_up_to_the_limit() -> None:
    proposer = NgramProposer(4, lookup_min=2, lookup_max=3)
    ids = [1, 2, 3, 4, 5, 6, 1, 2, 9, 1, 2, 3]
    sequence = Sequence("a", ids, SamplingParams(), max_tokens=9)
    assert proposer.propose([sequence], [4]) == [[4, 5, 6, 1]]
    assert proposer.propose([sequence], [2]) == [[4, 5]]
    sequence.append(9)  # "3 9" is new, and so is "2 3 9"
    assert proposer.propose([sequence], [4]) == [[]]
    proposer.forget(sequence)
    assert proposer.propose([sequence], [4]) == [[]]


def test_a_draft_with_another_vocabulary_is_refused(draft: Llama) -> None:
    with pytest.raises(ParameterError, match="vocabulary of 96 is not the model's 97"):
        DraftModelProposer(draft, 3, vocab_size=97)


@pytest.mark.parametrize("proposer", [None, "ngram", "draft"])
@pytest.mark.parametrize("tokens_a_step", [7, 2048])
def test_dynamic_rope_equals_transformers_however_a_prompt_is_cut(
    proposer: str | None, tokens_a_step: int
) -> None:
    stretched = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}
    theirs = hf_llama(**stretched)
    ours = puna_twin(theirs)
    prompt = [5, 17, 3, 60, 2] * 8
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    made: Any = {
        None: None,
        "ngram": NgramProposer(3, lookup_min=1),
        "draft": DraftModelProposer(ours, 3, vocab_size=96),
    }[proposer]
    config = EngineConfig(block_size=4, kv_cache_memory_bytes=2**22, max_num_batched_tokens=tokens_a_step)
    engine = LLMEngine(ours, config, proposer=made)
    engine.add("a", prompt, SamplingParams(temperature=0.0, max_tokens=24))
    assert drain(engine) == {"a": expected[0, len(prompt) :].tolist()}
    if proposer == "draft":
        assert engine.stats.accepted_tokens == engine.stats.drafted_tokens > 10
