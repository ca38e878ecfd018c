"""The engine against Transformers' greedy output, and against itself in other company and other settings."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.request import Sequence
from puna.engine.sampling import SamplingParams
from puna.engine.speculative import DraftModelProposer, NgramProposer
from puna.errors import ParameterError
from puna.model import Llama

from tiny import hf_llama, hf_llama4, puna_twin

GREEDY = SamplingParams(temperature=0.0, max_tokens=30)
SMALL: dict[str, Any] = {"block_size": 4, "kv_cache_memory_bytes": 2**24}


def engine_for(model: Llama, **changes: Any) -> LLMEngine:
    proposer = changes.pop("proposer", None)
    end_ids = changes.pop("end_ids", frozenset())
    return LLMEngine(model, EngineConfig(**{**SMALL, **changes}), proposer=proposer, end_ids=end_ids)


def drain(engine: LLMEngine) -> dict[str, list[Sequence]]:
    """Step until all is done; return the sequences of each request, by index."""
    done: dict[str, list[Sequence]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.sequence.finish_reason is not None:
                done.setdefault(output.sequence.request_id, []).append(output.sequence)
    assert engine.pool.num_free == engine.pool.num_blocks
    return {key: sorted(found, key=lambda s: s.index) for key, found in done.items()}


def run(
    model: Llama, prompts: list[list[int]], params: SamplingParams = GREEDY, **changes: Any
) -> list[list[int]]:
    engine = engine_for(model, **changes)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, params)
    done = drain(engine)
    return [done[str(i)][0].output_ids for i in range(len(prompts))]


@pytest.fixture(scope="module")
def model() -> Llama:
    twin: Llama = puna_twin(hf_llama())
    return twin


PROMPTS = [[1], [2, 3, 4], [i % 96 for i in range(1, 60)], [5] * 16, [7, 8] * 20]


@pytest.mark.parametrize("make", [hf_llama, hf_llama4])
def test_greedy_equals_transformers(make: Any) -> None:
    theirs = make()
    prompt = [1, 5, 9, 33, 2, 8, 11]
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert run(puna_twin(theirs), [prompt]) == [expected[0, len(prompt) :].tolist()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 5},
        {"max_num_seqs": 2},
        {"block_size": 16},
        {"block_size": 1},
        {"enable_prefix_caching": False},
        {"policy": "priority"},
        {"kv_cache_memory_bytes": 25 * 4 * 2 * 2 * 2 * 8 * 4},  # 25 blocks: sequences get preempted
    ],
    ids=str,
)
def test_a_batch_gives_what_each_prompt_gives_alone(model: Llama, changes: dict[str, Any]) -> None:
    alone = [run(model, [prompt])[0] for prompt in PROMPTS]
    assert run(model, PROMPTS, **changes) == alone


def test_sequences_are_preempted_when_blocks_run_out(model: Llama) -> None:
    engine = engine_for(model, kv_cache_memory_bytes=25 * 4 * 2 * 2 * 2 * 8 * 4)
    for i, prompt in enumerate(PROMPTS):
        engine.add(str(i), prompt, GREEDY)
    drain(engine)
    assert engine.scheduler.num_preemptions > 0


def test_llama4_chunks_and_batches_through_pages() -> None:
    model = puna_twin(hf_llama4())
    alone = [run(model, [prompt], block_size=16)[0] for prompt in PROMPTS]
    assert run(model, PROMPTS, max_num_batched_tokens=7) == alone


@pytest.mark.parametrize("spec", ["ngram", "draft", "draft_is_target"])
def test_speculative_output_is_the_same(model: Llama, spec: str) -> None:
    draft = puna_twin(hf_llama(num_hidden_layers=1)) if spec == "draft" else model
    for params in (GREEDY, SamplingParams(temperature=0.8, top_k=30, seed=3, max_tokens=30)):
        plain = run(model, PROMPTS, params)
        proposer: Any = DraftModelProposer(draft, 3, vocab_size=96)
        if spec == "ngram":
            proposer = NgramProposer(3, lookup_min=1)
        engine = engine_for(model, proposer=proposer)
        for i, prompt in enumerate(PROMPTS):
            engine.add(str(i), prompt, params)
        done = drain(engine)
        assert [done[str(i)][0].output_ids for i in range(len(PROMPTS))] == plain
        assert engine.stats.drafted_tokens > 0
        if spec == "draft_is_target" and params is GREEDY:
            assert engine.stats.accepted_tokens == engine.stats.drafted_tokens


def test_a_seed_gives_the_same_text_in_any_company(model: Llama) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=20)
    alone = run(model, [[1, 2, 3]], params)[0]
    assert run(model, [[9, 9], [1, 2, 3], [4]], params)[1] == alone
    assert run(model, [[1, 2, 3]], SamplingParams(top_p=0.9, seed=8, max_tokens=20))[0] != alone


def test_several_answers_share_the_prompt_and_differ(model: Llama) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=12)
    engine = engine_for(model)
    engine.add("a", [1, 2, 3, 4, 5, 6], params)
    engine.step()
    first_blocks = {tuple(s.block_table[:1]) for s in engine.scheduler.running}
    assert len(engine.scheduler.running) == 4 and len(first_blocks) == 1
    answers = [s.output_ids for s in drain(engine)["a"]]
    assert len({tuple(answer) for answer in answers}) == 4
    for index, answer in enumerate(answers):  # each is what its own seed gives alone
        alone = SamplingParams(temperature=1.0, seed=5 + index, max_tokens=12)
        assert run(model, [[1, 2, 3, 4, 5, 6]], alone)[0] == answer


def test_more_answers_than_seats_wait_for_one(model: Llama) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=12)
    engine = engine_for(model, max_num_seqs=2)
    engine.add("a", [1, 2, 3, 4, 5, 6], params)
    roomy = engine_for(model)
    roomy.add("a", [1, 2, 3, 4, 5, 6], params)
    assert [s.output_ids for s in drain(engine)["a"]] == [s.output_ids for s in drain(roomy)["a"]]


@pytest.mark.parametrize("length", [6, 7, 8])
def test_speculation_with_several_answers_keeps_them_apart(model: Llama, length: int) -> None:
    params = SamplingParams(n=3, seed=0, logit_bias={7: 6.0}, max_tokens=24)
    answers = []
    for proposer in (None, NgramProposer(4, lookup_min=1, lookup_max=2)):
        engine = engine_for(model, block_size=2, max_num_batched_tokens=length - 1, proposer=proposer)
        engine.add("a", [7] * length, params)
        answers.append([s.output_ids for s in drain(engine)["a"]])
    assert answers[0] == answers[1]


def test_ids_of_a_padded_vocabulary_are_never_drawn(model: Llama) -> None:
    engine = LLMEngine(model, EngineConfig(**SMALL), num_token_ids=10)
    engine.add("a", [1, 2], SamplingParams(seed=0, max_tokens=40, temperature=2.0, logprobs=20))
    sequence = drain(engine)["a"][0]
    assert max(sequence.output_ids) < 10
    assert max(i for found in sequence.logprobs for i in found.token_ids) < 10


def test_forks_wait_in_order_and_behind_what_is_more_urgent(model: Llama) -> None:
    engine = engine_for(model, policy="priority", max_num_seqs=1)
    engine.add("low", [1, 2, 3], SamplingParams(n=3, seed=0, max_tokens=8), priority=9)
    engine.step()
    engine.add("urgent", [4], SamplingParams(seed=0, max_tokens=2), priority=0)
    ends = []
    while engine.has_unfinished:
        ends += [(o.sequence.request_id, o.sequence.index) for o in engine.step() if o.sequence.finish_reason]
    assert ends == [("low", 0), ("urgent", 0), ("low", 1), ("low", 2)]


def test_dynamic_rope_goes_on_past_the_length_it_was_trained_for() -> None:
    stretched = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    engine = engine_for(puna_twin(hf_llama(**stretched)))
    assert engine.max_model_len == 64 and not engine.scheduler.config.enable_prefix_caching
    with pytest.raises(ParameterError, match="max_model_len 65 is above the model's context, 64"):
        engine_for(puna_twin(hf_llama(**stretched)), max_model_len=65)


def test_a_shared_beginning_is_computed_once(model: Llama) -> None:
    engine = engine_for(model)
    shared = [i % 96 for i in range(100)]
    engine.add("a", [*shared, 1], GREEDY)
    first = drain(engine)["a"][0]
    computed = engine.stats.prompt_tokens
    engine.add("b", [*shared, 1, 2], GREEDY)
    second = drain(engine)["b"][0]
    assert first.num_cached == 0 and second.num_cached == 100
    assert engine.stats.prompt_tokens - computed == 2
    assert second.output_ids == run(model, [[*shared, 1, 2]])[0]


def test_salts_keep_caches_apart(model: Llama) -> None:
    engine = engine_for(model)
    for key, salt in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        engine.add(key, list(range(40)), GREEDY, salt=salt)
        cached = drain(engine)[key][0].num_cached
        assert cached == (36 if key == "c" else 0)


def test_logprobs_are_of_the_raw_distribution(model: Llama) -> None:
    from puna.model import PackedAttention

    prompt = [1, 2, 3, 4, 5]
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=3, logprobs=2, prompt_logprobs=1)
    engine = engine_for(model, max_num_batched_tokens=2)
    engine.add("a", prompt, params)
    sequence = drain(engine)["a"][0]
    ids = torch.tensor(sequence.token_ids)
    logits = model(ids, torch.arange(len(ids)), PackedAttention([0, len(ids)]))
    logs = logits.log_softmax(dim=-1)
    for place, found in enumerate(sequence.logprobs):
        row = logs[len(prompt) - 1 + place]
        token = sequence.output_ids[place]
        assert found.token_ids[0] == token and found.values[0] == pytest.approx(float(row[token]), abs=1e-5)
        assert set(found.token_ids) == {token, *row.topk(2).indices.tolist()}
        assert found.ranks[0] == int((row > row[token]).sum()) + 1
    assert len(sequence.prompt_logprobs) == len(prompt) - 1
    for place, found in enumerate(sequence.prompt_logprobs):
        assert found.token_ids[0] == prompt[place + 1]
        assert found.values[0] == pytest.approx(float(logs[place, prompt[place + 1]]), abs=1e-5)


def test_end_ids_stop_ids_and_minimum_length(model: Llama) -> None:
    free = run(model, [[1, 2, 3]])[0]
    end = free[4]
    short = run(model, [[1, 2, 3]], end_ids=frozenset({end}))[0]
    assert short == free[: free.index(end) + 1]
    ignoring = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    assert run(model, [[1, 2, 3]], ignoring, end_ids=frozenset({end}))[0] == free
    stopping = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=[end])
    engine = engine_for(model)
    engine.add("a", [1, 2, 3], stopping)
    stopped = drain(engine)["a"][0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", end)
    longer = SamplingParams(temperature=0.0, max_tokens=30, min_tokens=20, stop_token_ids=[end])
    assert len(run(model, [[1, 2, 3]], longer)[0]) >= 20


def test_abort_gives_the_blocks_back_at_once(model: Llama) -> None:
    engine = engine_for(model)
    engine.add("a", [1] * 20, SamplingParams(n=3, max_tokens=50))
    engine.add("b", [2] * 20, GREEDY)
    engine.step()
    engine.abort("a")
    assert set(engine._sequences) == {"b"}
    assert engine.pool.num_free == engine.pool.num_blocks - 5  # those of b's 20 tokens
    expected = run(model, [[2] * 20])[0]
    assert drain(engine)["b"][0].output_ids == expected


def test_a_thousand_requests_with_aborts_leave_no_block_in_use() -> None:
    engine = engine_for(puna_twin(hf_llama(num_hidden_layers=1)), max_num_seqs=64)
    random = Random(0)
    for i in range(1000):
        prompt = [random.randrange(96) for _ in range(random.randrange(1, 9))]
        engine.add(
            str(i), prompt, SamplingParams(max_tokens=random.randrange(1, 5), n=random.randrange(1, 3))
        )
        if random.random() < 0.2:
            engine.step()
        if random.random() < 0.3:
            engine.abort(str(random.randrange(i + 1)))
    drain(engine)
    assert not engine.scheduler.running and not engine.scheduler.waiting


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int8"])
def test_a_narrow_cache_stays_near(model: Llama, dtype: str) -> None:
    prompt = [i % 96 for i in range(50)]
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1)
    exact, narrow = engine_for(model), engine_for(model, kv_cache_dtype=dtype)
    values = []
    for engine in (exact, narrow):
        engine.add("a", prompt, params)
        values.append(drain(engine)["a"][0].logprobs[0].values[0])
    assert values[1] == pytest.approx(values[0], abs=0.15)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([96], {}, "token id 96 is outside"),
        ([-1], {}, "token id -1 is outside"),
        ([1, "a"], {}, "token id 'a' is outside"),
        ([1.5], {}, "token id 1.5 is outside"),
        ([1] * 256, {}, "256 tokens.*max_model_len 256"),
        ([1], {"stop_token_ids": [96]}, "stop_token_ids 96"),
        ([1], {"allowed_token_ids": [-1]}, "allowed_token_ids -1"),
        ([1], {"logit_bias": {500: 1.0}}, "logit_bias 500"),
        ([1], {"logprobs": 21}, "logprobs 21 is above max_logprobs 20"),
    ],
)
def test_requests_that_cannot_run_are_refused(
    model: Llama, prompt: list[Any], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        engine_for(model).add("a", prompt, SamplingParams(**params))


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_size": 0},
        {"max_num_seqs": "8"},
        {"max_num_batched_tokens": 2.5},
        {"num_blocks": True},
        {"max_logprobs": -2},
        {"seed": "x"},
        {"gpu_memory_utilization": "0.5"},
        {"gpu_memory_utilization": 1.5},
        {"kv_cache_dtype": "int4"},
        {"policy": "lifo"},
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        EngineConfig(**wrong)


def test_a_cache_too_small_for_the_context_lowers_it(model: Llama, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_for(model, kv_cache_memory_bytes=10 * 4 * 2 * 2 * 2 * 8 * 4)
    assert engine.max_model_len == 40
    assert "max_model_len lowered from 256 to 40" in caplog.text
    with pytest.raises(ParameterError, match="max_model_len 40"):
        engine.add("a", [1] * 40, GREEDY)
