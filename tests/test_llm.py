"""vLLM's offline door: the golden story, results in order, stop strings, structured outputs, beams."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from puna import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from puna.async_llm import AsyncLLM, EngineDeadError, RequestAborted
from puna.cria import FOLDER
from puna.errors import ParameterError, UnsupportedError
from puna.model import PackedAttention

SMALL: dict[str, Any] = {"kv_cache_memory_bytes": 2**26}


@pytest.fixture(scope="module")
def llm(stories: Path) -> LLM:
    return LLM(stories / "hf", **SMALL)


@pytest.fixture(scope="module")
def golden(stories: Path) -> str:
    return (stories / "golden.txt").read_text()


GREEDY = SamplingParams(temperature=0.0, max_tokens=256)


def test_the_golden_story(llm: LLM, golden: str) -> None:
    (output,) = llm.generate("", GREEDY, use_tqdm=False)
    assert output.outputs[0].text == golden
    assert output.outputs[0].finish_reason == "length" and output.finished
    assert len(output.outputs[0].token_ids) == 256


def test_the_golden_story_among_64_mixed_requests(llm: LLM, golden: str) -> None:
    prompts = ["" if i == 20 else ["Once upon a time", "The dog", "Lily saw a big"][i % 3] for i in range(64)]
    params = [
        GREEDY
        if i == 20
        else SamplingParams(temperature=0.9, top_p=0.9, seed=i, max_tokens=1 + i % 12, n=1 + i % 2)
        for i in range(64)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert outputs[20].outputs[0].text == golden
    assert all(len(output.outputs) == 1 + i % 2 for i, output in enumerate(outputs) if i != 20)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_over_token_borders(llm: LLM, golden: str, include: bool) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=256, stop=["never", "was too hi"], include_stop_str_in_output=include
    )
    answer = llm.generate("", params, use_tqdm=False)[0].outputs[0]
    expected = golden[: golden.index("was too hi")] + ("was too hi" if include else "")
    assert answer.text == expected
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "was too hi")


def test_all_forms_of_prompts(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("The dog")
    forms: list[Any] = ["The dog", ids, {"prompt": "The dog"}, {"prompt_token_ids": ids}]
    params = SamplingParams(temperature=0.0, max_tokens=8)
    texts = [llm.generate(form, params, use_tqdm=False)[0].outputs[0].text for form in forms]
    texts += [output.outputs[0].text for output in llm.generate(forms, params, use_tqdm=False)]
    assert len(set(texts)) == 1
    with pytest.raises(UnsupportedError, match="prompt_embeds"):
        llm.generate({"prompt_embeds": 1}, params)
    with pytest.raises(ParameterError, match="2 sampling params"):
        llm.generate("a", [params, params])


def test_logprobs_name_their_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=0)
    output = llm.generate("Once upon", params, use_tqdm=False)[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None and output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token_id, found in zip(answer.token_ids, answer.logprobs, strict=True):
        assert next(iter(found)) == token_id and found[token_id].rank == 1
        assert found[token_id].decoded_token == llm.get_tokenizer().decode([token_id])
    total = sum(found[i].logprob for i, found in zip(answer.token_ids, answer.logprobs, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (StructuredOutputsParams(choice=["yes", "no"]), lambda text: text in ("yes", "no")),
        (StructuredOutputsParams(regex="[0-9]{3}-[a-f]{2}"), lambda text: len(text) == 6 and text[3] == "-"),
        (StructuredOutputsParams(grammar='root ::= "a" | "b"'), lambda text: text in ("a", "b")),
        (StructuredOutputsParams(grammar='start: "x" ("," "x")~0..5'), lambda text: set(text) <= {"x", ","}),
        (
            StructuredOutputsParams(
                json={"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]},
                disable_additional_properties=True,
                disable_any_whitespace=True,
            ),
            lambda text: set(json.loads(text)) == {"n"},
        ),
    ],
    ids=["choice", "regex", "gbnf", "lark", "json"],
)
def test_structured_outputs(llm: LLM, wanted: StructuredOutputsParams, fits: Any) -> None:
    params = SamplingParams(seed=3, max_tokens=120, structured_outputs=wanted, n=3)
    for answer in llm.generate("Lily said", params, use_tqdm=False)[0].outputs:
        assert answer.finish_reason == "stop" and fits(answer.text), answer.text


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"regex": "(a"}, "bad grammar"),
        ({"grammar": "start: missing"}, "bad grammar"),
        ({"json": "{"}, "not JSON"),
        ({"json": {"type": "nonsense"}}, "bad"),
        ({"regex": "a" * 600_000}, "600000 characters"),
    ],
    ids=str,
)
def test_a_bad_grammar_is_refused_when_added(llm: LLM, wanted: dict[str, Any], message: str) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**wanted))
    with pytest.raises(ParameterError, match=message):
        llm.generate("a", params, use_tqdm=False)
    assert not llm.text_engine.has_unfinished


@pytest.mark.parametrize("regex", ["(a{1000}){1000}", "(((a{50}){50}){50}){50}", "(a|aa|aaa)*b"])
def test_a_bomb_ends_in_an_error_or_in_an_answer(llm: LLM, regex: str) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex=regex), max_tokens=3, seed=0)
    try:
        answer = llm.generate("a", params, use_tqdm=False)[0].outputs[0]
    except ParameterError as error:
        assert "bad grammar" in str(error)
    else:
        assert answer.finish_reason in ("length", "error", "stop") and set(answer.text) <= {"a", "b"}


def test_beam_search_beats_greedy_and_gives_the_blocks_back(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=10)
    (found,) = llm.beam_search([{"prompt": "Once upon a time"}], params)
    scores = [beam.cum_logprob for beam in found.sequences]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=10, logprobs=0)
    alone = llm.generate("Once upon a time", greedy, use_tqdm=False)[0].outputs[0]
    assert alone.cumulative_logprob is not None
    assert scores[0] >= alone.cumulative_logprob - 1e-4
    for beam in found.sequences:  # each score is that of its ids
        ids = torch.tensor(beam.tokens)
        logits = llm.text_engine.engine.model(ids, torch.arange(len(ids)), PackedAttention([0, len(ids)]))
        logs = logits.log_softmax(dim=-1)
        first = len(ids) - 10
        total = sum(float(logs[i - 1, ids[i]]) for i in range(first, len(ids)))
        assert beam.cum_logprob == pytest.approx(total, abs=1e-3)
    pool = llm.text_engine.engine.pool
    assert pool.num_free == pool.num_blocks


def test_embeddings_and_scores(llm: LLM) -> None:
    one, other = llm.embed(["The dog ran.", "Lily sat."], use_tqdm=False)
    assert sum(x * x for x in one.outputs.embedding) == pytest.approx(1.0, abs=1e-5)
    assert one.outputs.hidden_size == 64
    alike, unlike = llm.score("The dog ran.", ["The dog ran.", "Lily sat."], use_tqdm=False)
    assert alike.outputs.score == pytest.approx(1.0, abs=1e-5)
    product = sum(a * b for a, b in zip(one.outputs.embedding, other.outputs.embedding, strict=True))
    assert unlike.outputs.score == pytest.approx(product, abs=1e-5)
    mean = llm.embed("The dog ran.", pooling="mean", use_tqdm=False)[0]
    assert mean.outputs.embedding != one.outputs.embedding


def test_speculation_writes_the_same_story(stories: Path, golden: str) -> None:
    for config in (
        {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
        {"model": str(stories / "gguf" / "stories260k-f32.gguf"), "num_speculative_tokens": 3},
    ):
        fast = LLM(stories / "hf", speculative_config=config, **SMALL)
        assert fast.generate("", GREEDY, use_tqdm=False)[0].outputs[0].text == golden
        assert fast.get_metrics()["accepted_tokens"] > 30
        assert fast.get_metrics()["steps"] < 230


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"quantization": "awq"}, "'awq'"),
        ({"max_model_len": -5}, "max_model_len must be at least 1"),
        ({"trust_remote_code": True}, "trust_remote_code=True"),
        ({"no_such_thing": 1}, "'no_such_thing'"),
        ({"speculative_config": {"method": "eagle", "num_speculative_tokens": 2}}, "'eagle'"),
        ({"dtype": "int3"}, "int3"),
        ({"structured_outputs_config": {"backend": "xgrammar"}}, "'xgrammar'"),
        ({"pooler_config": {"pooling_type": "CLS"}}, "'cls'"),
    ],
    ids=str,
)
def test_arguments_that_puna_lacks_are_refused_by_name(
    stories: Path, argument: dict[str, Any], message: str
) -> None:
    with pytest.raises((UnsupportedError, ParameterError), match=message):
        LLM(stories / "hf", **SMALL, **argument)


def test_the_seed_of_the_engine_makes_runs_repeatable(stories: Path) -> None:
    params = SamplingParams(max_tokens=12)
    texts = []
    for seed in (0, 0, 1):
        llm = LLM(stories / "hf", seed=seed, **SMALL)
        texts.append([o.outputs[0].text for o in llm.generate(["Once", "Once"], params, use_tqdm=False)])
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_default_sampling_is_what_the_file_lists(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()  # it lists do_sample alone
    cria = LLM("cria", **SMALL).get_default_sampling_params()
    listed = json.loads((FOLDER / "generation_config.json").read_text())
    assert (cria.temperature, cria.top_p) == (listed["temperature"], listed["top_p"])


def test_a_refused_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="1000000"):
        llm.generate([[1], [10**6]], SamplingParams(max_tokens=3), use_tqdm=False)
    assert not llm.text_engine.has_unfinished


def test_beams_that_do_not_fit_are_refused_with_the_numbers(stories: Path) -> None:
    small = LLM(stories / "hf", kv_cache_memory_bytes=7 * 16 * 2 * 5 * 4 * 8 * 4)
    with pytest.raises(ParameterError, match="may need 10 blocks of the cache, which has 7"):
        small.beam_search([{"prompt_token_ids": [5] * 60}], BeamSearchParams(beam_width=3, max_tokens=6))


def test_a_complete_grammar_ends_whatever_else_is_asked_for(llm: LLM) -> None:
    wanted = StructuredOutputsParams(choice=["yes", "no"])
    for extra in ({"ignore_eos": True}, {"min_tokens": 10}):
        params = SamplingParams(seed=0, max_tokens=20, structured_outputs=wanted, **extra)
        assert llm.generate("a", params, use_tqdm=False)[0].outputs[0].text in ("yes", "no")


def test_an_aborted_stream_ends_and_so_does_one_after_the_shutdown(stories: Path) -> None:
    engine = AsyncLLM(LLM(stories / "hf", **SMALL).text_engine)

    async def read(request_id: str) -> None:
        async for _ in engine.generate(request_id, "", GREEDY):
            engine.abort(request_id)

    async def scene() -> None:
        with pytest.raises(RequestAborted):
            await read("a")
        engine.shutdown()
        with pytest.raises(EngineDeadError):
            await read("b")

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_async_streams_grow_to_the_same_text_and_cancelling_frees(stories: Path, golden: str) -> None:
    llm = LLM(stories / "hf", **SMALL)
    engine = AsyncLLM(llm.text_engine)

    async def read(request_id: str) -> list[str]:
        return [output.outputs[0].text async for output in engine.generate(request_id, "", GREEDY)]

    async def read_three() -> None:
        async for output in engine.generate("cut", "Once", GREEDY):
            if len(output.outputs[0].token_ids) >= 3:
                break

    async def refused() -> None:
        async for _ in engine.generate("bad", [10**6], GREEDY):
            pass

    async def scene() -> None:
        whole, other, _ = await asyncio.gather(read("a"), read("b"), read_three())
        assert whole[-1] == other[-1] == golden
        assert all(later.startswith(earlier) for earlier, later in zip(whole, whole[1:], strict=False))
        with pytest.raises(ParameterError, match="1000000"):
            await refused()

    try:
        asyncio.run(asyncio.wait_for(scene(), 60))
    finally:
        engine.shutdown()
    assert not engine.is_alive
    pool = llm.text_engine.engine.pool
    assert pool.num_free == pool.num_blocks
