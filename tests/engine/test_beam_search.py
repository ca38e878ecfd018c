"""Beam search against the same search written down plainly, on whole sequences without a cache."""

from __future__ import annotations

import pytest
import torch

from puna.engine.beam_search import beam_search
from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import BeamSearchParams
from puna.errors import ParameterError
from puna.model import Llama, PackedAttention

from tiny import hf_llama, puna_twin


@pytest.fixture(scope="module")
def model() -> Llama:
    twin: Llama = puna_twin(hf_llama())
    return twin


def engine_for(model: Llama, end_id: int, max_num_seqs: int = 256) -> LLMEngine:
    config = EngineConfig(block_size=4, kv_cache_memory_bytes=2**22, max_num_seqs=max_num_seqs)
    return LLMEngine(model, config, end_ids=frozenset({end_id}))


def plain(
    model: Llama, prompt: list[int], end_id: int, width: int, steps: int, penalty: float
) -> list[tuple[list[int], float]]:
    """Return the best beams and their log-probabilities, best first, by vLLM's rules."""
    ended: list[tuple[list[int], float]] = []
    running: list[tuple[list[int], float]] = [(prompt, 0.0)]
    for _ in range(steps):
        grown = []
        for ids, value in running:
            logits = model(torch.tensor(ids), torch.arange(len(ids)), PackedAttention([0, len(ids)]))[-1]
            best = logits.log_softmax(dim=-1).topk(2 * width)
            for log, token_id in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if token_id == end_id:
                    ended.append((ids, value + log))
                else:
                    grown.append(([*ids, token_id], value + log))
        running = sorted(grown, key=lambda beam: beam[1], reverse=True)[:width]
    ended += running
    return sorted(ended, key=lambda beam: beam[1] / len(beam[0]) ** penalty, reverse=True)[:width]


@pytest.mark.parametrize("penalty", [-2.0, 0.0, 1.0])
@pytest.mark.parametrize("end_id", [3, 40, 77])
def test_beams_are_those_of_a_plain_search(model: Llama, end_id: int, penalty: float) -> None:
    prompt, width, steps = [1, 2, 3, 4, 5], 6, 5
    engine = engine_for(model, end_id)
    params = BeamSearchParams(beam_width=width, max_tokens=steps, length_penalty=penalty)
    found = beam_search(engine, prompt, params)
    expected = plain(model, prompt, end_id, width, steps, penalty)
    assert [beam.token_ids for beam in found] == [ids for ids, _ in expected]
    assert [beam.logprob for beam in found] == pytest.approx([value for _, value in expected], abs=1e-4)
    assert engine.pool.num_free == engine.pool.num_blocks


def test_more_beams_than_seats_are_refused(model: Llama) -> None:
    engine = engine_for(model, end_id=3, max_num_seqs=2)
    with pytest.raises(ParameterError, match="beam_width 3 is above max_num_seqs 2"):
        beam_search(engine, [1, 2, 3], BeamSearchParams(beam_width=3, max_tokens=4))
    assert len(beam_search(engine, [1, 2, 3], BeamSearchParams(beam_width=2, max_tokens=4))) == 2
    assert engine.pool.num_free == engine.pool.num_blocks and not engine.scheduler.waiting
