"""The generation loop against Transformers' greedy output, and against itself in other company."""

from __future__ import annotations

import pytest
import torch

from puna.engine.generate import generate, start
from puna.engine.kv_cache import KVCache
from puna.engine.sampling import SamplingParams
from puna.errors import ParameterError
from puna.model import Llama

from tiny import hf_llama, hf_llama4, puna_twin

GREEDY = SamplingParams(temperature=0.0, max_tokens=30)


def run(model: Llama, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    sequences = [start(model, prompt, params) for prompt in prompts]
    for _ in generate(model, sequences):
        pass
    return [sequence.output_ids for sequence in sequences]


@pytest.fixture(scope="module")
def model() -> Llama:
    twin: Llama = puna_twin(hf_llama())
    return twin


@pytest.mark.parametrize("make", [hf_llama, hf_llama4])
def test_greedy_equals_transformers(make) -> None:  # type: ignore[no-untyped-def]
    theirs = make()
    prompt = [1, 5, 9, 33, 2, 8, 11]
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert run(puna_twin(theirs), [prompt]) == [expected[0, len(prompt) :].tolist()]


def test_a_batch_gives_what_each_prompt_gives_alone(model: Llama) -> None:
    prompts = [[1], [2, 3, 4], list(range(1, 60))]
    assert run(model, prompts) == [run(model, [prompt])[0] for prompt in prompts]


def test_a_seed_gives_the_same_text_in_any_company(model: Llama) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=20, seed=7, max_tokens=20)
    alone = run(model, [[1, 2, 3]], params)[0]
    assert run(model, [[9, 9], [1, 2, 3]], params)[1] == alone
    other = SamplingParams(temperature=1.0, top_p=0.9, top_k=20, seed=8, max_tokens=20)
    assert run(model, [[1, 2, 3]], other)[0] != alone


def test_a_long_prompt_in_pieces_equals_one_piece(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [i % 96 for i in range(150)]
    whole = run(model, [prompt])
    monkeypatch.setattr("puna.engine.generate.PREFILL_CHUNK", 32)
    assert run(model, [prompt]) == whole


def test_a_cache_is_reused_for_the_same_beginning(model: Llama) -> None:
    cache = KVCache(model.config, dtype=torch.float32)
    first = start(model, [1, 2, 3, 4, 5], GREEDY, cache=cache)
    for _ in generate(model, [first]):
        pass
    again = [*first.token_ids[:20], 7, 8]
    second = start(model, again, GREEDY, cache=cache)
    assert cache.token_ids == again[:20]
    for _ in generate(model, [second]):
        pass
    assert second.output_ids == run(model, [again])[0]


def test_a_stop_id_ends_the_sequence_and_is_its_last_token(model: Llama) -> None:
    free = run(model, [[1, 2, 3]])[0]
    params = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(free[4],))
    sequence = start(model, [1, 2, 3], params)
    assert [token for _, token in generate(model, [sequence])] == free[: free.index(free[4]) + 1]
    assert sequence.finish_reason == "stop"


def test_generation_ends_where_the_context_does(model: Llama) -> None:
    prompt = [1] * 250
    sequence = start(model, prompt, SamplingParams(temperature=0.0, max_tokens=None))
    list(generate(model, [sequence]))
    assert len(sequence.token_ids) == 256 and sequence.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([96], "96 is outside"), ([-1], "-1 is outside"), ([1] * 256, "context is 256")],
)
def test_prompts_that_cannot_run_are_refused(model: Llama, prompt: list[int], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        start(model, prompt, GREEDY)
