"""The rest of vLLM's door: kinds of output, special tokens in prompts, beams under rules, pooling."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from puna import LLM, AsyncLLM, BeamSearchParams, PoolingParams, RequestOutputKind, SamplingParams
from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.request import Logprobs
from puna.engine.sampling import RepetitionDetectionParams, StructuredOutputsParams
from puna.errors import ParameterError, UnsupportedError
from puna.llm_arguments import (
    check_quantization,
    check_structured_outputs,
    make_proposer,
    pooling_of,
    refuse_unknown,
    sampling_defaults,
    speculative_of,
)
from puna.outputs import FlatLogprobs, Logprob, PositionLogprobs, RequestOutput, name_logprobs
from puna.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llm(stories: Path) -> LLM:
    return LLM(stories / "hf", kv_cache_memory_bytes=2**24)


@pytest.fixture(scope="module")
def golden_ids(stories: Path) -> list[int]:
    """Return the ids of the golden story without BOS."""
    ids: list[int] = json.loads((stories / "golden_ids.json").read_text())
    return ids[1:] if ids[0] == 1 else ids


def one(llm: LLM, prompt: Any = "", **params: Any) -> RequestOutput:
    greedy = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})
    return llm.generate(prompt, greedy, use_tqdm=False)[0]


def stream(llm: LLM, params: SamplingParams) -> list[RequestOutput]:
    """Return all outputs of one request."""
    engine = llm.text_engine
    request = engine.add("stream", "Lily", params)
    found = []
    while engine.has_unfinished:
        for due in engine.step():
            assert due is request
            found.append(due.snapshot())
    return found


def test_a_stop_string_that_begins_within_the_least_length_counts_and_one_that_ends_there_does_not(
    llm: LLM, golden_ids: list[int]
) -> None:
    decode = llm.get_tokenizer().decode
    early, late, whole = (decode(golden_ids[:count]) for count in (6, 7, 20))
    assert early != late
    stop = late[-len(late[len(early) :]) - 1 :]  # begins one character before the sixth token ends
    assert whole.index(stop) == len(early) - 1
    answer = one(llm, min_tokens=6, max_tokens=20, stop=stop).outputs[0]
    assert (answer.text, answer.stop_reason, len(answer.token_ids)) == (early[:-1], stop, 7)
    answer = one(llm, min_tokens=7, max_tokens=20, stop=stop).outputs[0]
    assert (answer.text, answer.stop_reason) == (whole, None)


@pytest.mark.parametrize("interval", [None, 1, 3])
def test_deltas_join_to_the_whole(llm: LLM, interval: int | None) -> None:
    same: dict[str, Any] = {"seed": 5, "n": 2, "max_tokens": 11, "logprobs": 1, "stop": "zzz"}
    whole = stream(llm, SamplingParams(**same))[-1]
    deltas = stream(
        llm, SamplingParams(**same, output_kind=RequestOutputKind.DELTA, stream_interval=interval)
    )
    joined = deltas[0]
    for later in deltas[1:]:
        joined.add(later, aggregate=True)
    joined.outputs.sort(key=lambda answer: answer.index)
    assert joined.outputs == whole.outputs and joined.finished
    assert len(deltas) == (5 if interval == 3 else 11)  # 1, 4, 7, 10 and 11 tokens


def test_a_final_output_comes_alone_and_cumulative_ones_by_the_interval(llm: LLM) -> None:
    (final,) = stream(llm, SamplingParams(seed=5, max_tokens=11, output_kind=RequestOutputKind.FINAL_ONLY))
    several = stream(llm, SamplingParams(seed=5, max_tokens=11, stream_interval=4))
    assert [len(output.outputs[0].token_ids) for output in several] == [1, 5, 9, 11]
    assert several[-1].outputs == final.outputs
    generated = llm.generate(
        "Lily", SamplingParams(seed=5, max_tokens=11, output_kind=RequestOutputKind.DELTA)
    )
    assert generated[0].outputs == final.outputs  # whole in any case
    several[0].add(several[-1], aggregate=False)
    assert several[0].outputs == final.outputs


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
def test_async_streams_have_the_kind_asked_for(llm: LLM, kind: RequestOutputKind) -> None:
    engine = AsyncLLM(llm.text_engine)
    params = SamplingParams(temperature=0.0, max_tokens=9, output_kind=kind)

    async def read() -> list[RequestOutput]:
        return [output async for output in engine.generate("a", "Lily", params)]

    try:
        outputs = asyncio.run(asyncio.wait_for(read(), 60))
    finally:
        engine.shutdown()
    whole = one(llm, "Lily", max_tokens=9).outputs[0]
    assert "".join(output.outputs[0].text for output in outputs) == whole.text
    assert [i for output in outputs for i in output.outputs[0].token_ids] == whole.token_ids
    assert len(outputs) <= (9 if kind is RequestOutputKind.DELTA else 1) and outputs[-1].finished


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA])
@pytest.mark.parametrize("flat", [False, True])
def test_a_position_is_named_once_however_often_it_is_shown(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, kind: RequestOutputKind, flat: bool
) -> None:
    whole = one(llm, "Lily", logprobs=1, prompt_logprobs=0, flat_logprobs=flat, max_tokens=11)
    named: list[Logprobs] = []

    def counted(found: Logprobs, tokenizer: Tokenizer | None) -> PositionLogprobs:
        named.append(found)
        return name_logprobs(found, tokenizer)

    monkeypatch.setattr("puna.outputs.name_logprobs", counted)
    wish: dict[str, Any] = {"logprobs": 1, "prompt_logprobs": 0, "flat_logprobs": flat, "output_kind": kind}
    shown = stream(llm, SamplingParams(temperature=0.0, max_tokens=11, **wish))
    assert len(named) == 11 + len(whole.prompt_token_ids) - 1
    wanted, step = list(whole.outputs[0].logprobs or []), kind is RequestOutputKind.DELTA
    for place, output in enumerate(shown):
        assert list(output.outputs[0].logprobs or []) == wanted[place if step else 0 : place + 1]
    assert shown[-1].outputs[0].cumulative_logprob == whole.outputs[0].cumulative_logprob
    assert list(shown[-1].prompt_logprobs or []) == list(whole.prompt_logprobs or [])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts must be text"),
        (5, "prompts must be text"),
        ([None], "a prompt must be text, token ids or a dict of these, got None"),
        ([["a", "b"]], "token id 'a' is outside the vocabulary"),
        ({"prompt": 5}, "'prompt' must be text, got 5"),
        ({"prompt_token_ids": "abc"}, "'prompt_token_ids' must be a list of ids, got 'abc'"),
        ({"prompt_token_ids": 7}, "'prompt_token_ids' must be a list of ids, got 7"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt must be text, got 5"),
        ({}, "a prompt needs 'prompt' or 'prompt_token_ids'"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        llm.generate(prompts, use_tqdm=False)
    assert not llm.text_engine.has_unfinished


@pytest.mark.parametrize("params", [5, {"temperature": 0.5}, [{"temperature": 0.5}], [None]], ids=str)
def test_what_is_no_sampling_params_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(ParameterError, match="must be SamplingParams or a list of them"):
        llm.generate("a", params, use_tqdm=False)


def test_ids_that_only_pad_the_vocabulary_are_refused(llm: LLM) -> None:
    config = EngineConfig(kv_cache_memory_bytes=2**20)
    engine = LLMEngine(llm.text_engine.engine.model, config, num_token_ids=500)
    engine.check([499], SamplingParams(allowed_token_ids=[499]))
    with pytest.raises(ParameterError, match="allowed_token_ids 505 is outside the vocabulary of 500"):
        engine.check([499], SamplingParams(allowed_token_ids=[505]))


def test_logprobs_of_chosen_ids_flat_and_without_text(llm: LLM) -> None:
    plain = one(llm, logprobs=3, prompt_logprobs=1, prompt="Once")
    flat = one(llm, logprobs=3, prompt_logprobs=1, prompt="Once", flat_logprobs=True)
    found, prompt = flat.outputs[0].logprobs, flat.prompt_logprobs
    assert isinstance(found, FlatLogprobs) and isinstance(prompt, FlatLogprobs)
    assert list(found) == plain.outputs[0].logprobs and prompt[0] == {}
    assert plain.prompt_logprobs is not None and list(prompt)[1:] == plain.prompt_logprobs[1:]
    assert list(found[2:7:2]) == list(found)[2:7:2] and found[-1] == list(found)[-1]
    chosen = one(llm, logprob_token_ids=[300, 301], detokenize=False).outputs[0]
    assert chosen.text == "" and chosen.logprobs is not None and chosen.cumulative_logprob is not None
    for token_id, position in zip(chosen.token_ids, chosen.logprobs, strict=True):
        assert list(position) == [token_id, *(i for i in (300, 301) if i != token_id)]
        assert all(value.decoded_token is None for value in position.values())
    with pytest.raises(ParameterError, match="logprob_token_ids 9999"):
        one(llm, logprob_token_ids=[9999])


def test_flat_logprobs_hold_what_was_put_in() -> None:
    positions = [{3: Logprob(-0.5, 1, "a"), 4: Logprob(-1.5, 2, "b")}, {7: Logprob(-2.0)}]
    flat = FlatLogprobs([None, *positions])
    assert list(flat) == [{}, *positions] and len(flat) == 3
    assert (flat.start_indices, flat.end_indices) == ([0, 0, 2], [0, 2, 3])
    with pytest.raises(IndexError):
        flat[3]


def test_a_repeating_answer_ends(llm: LLM) -> None:
    detection = RepetitionDetectionParams(max_pattern_size=2, min_count=4)
    answer = one(llm, allowed_token_ids=[300], max_tokens=30, repetition_detection=detection).outputs[0]
    assert (answer.finish_reason, answer.token_ids) == ("repetition", [300] * 4)


def test_no_tokenizer_of_a_llama_puts_spaces_between_special_tokens(llm: LLM, stories: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(stories / "hf")
    ids = [1, 2, 2, 1, 410, 2, 411]
    expected = llm.get_tokenizer().decode(ids)
    for spaces in (True, False):
        assert theirs.decode(ids, spaces_between_special_tokens=spaces) == expected
        special = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces}
        answer = one(llm, allowed_token_ids=[1], ignore_eos=True, max_tokens=3, **special).outputs[0]
        assert answer.text == "<s><s><s>"


def test_a_second_bos_is_kept_and_warned_of_once(stories: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(stories / "hf", kv_cache_memory_bytes=2**24)
    with caplog.at_level(logging.WARNING):
        one(llm, "Once")
        assert not caplog.records
        outputs = [one(llm, "<s>Once") for _ in range(2)]
    assert [record.getMessage()[:25] for record in caplog.records] == ["a prompt begins with <s>,"]
    assert outputs[0].prompt == "<s>Once" and outputs[0].prompt_token_ids[:2] == [1, 1]


def test_tokenization_can_be_changed(llm: LLM) -> None:
    def ids(prompt: Any, **options: Any) -> list[int]:
        params = SamplingParams(max_tokens=1)
        (output,) = llm.generate(prompt, params, use_tqdm=False, tokenization_kwargs=options)
        return output.prompt_token_ids

    whole = ids("Once upon a time")
    assert whole[0] == 1 and ids("<s>Once upon a time", add_special_tokens=False) == whole
    assert 1 not in ids("<s>Once", split_special_tokens=True)[1:]
    assert ids("Once upon a time", truncate_prompt_tokens=3) == whole[-3:]
    assert ids(list(range(3, 503)) * 2, truncate_prompt_tokens=-1)[-1] == 502
    with pytest.raises(ParameterError, match="truncate_prompt_tokens must be -1 or 1 to 511, got 0"):
        ids("a", truncate_prompt_tokens=0)
    with pytest.raises(ParameterError, match="add_special_tokens must be True or False, got 'no'"):
        ids("a", add_special_tokens="no")
    with pytest.raises(UnsupportedError, match="'padding'"):
        ids("a", padding=True)


def test_chat_shows_the_rendered_prompt_and_takes_its_arguments_by_place(llm: LLM) -> None:
    made: list[dict[str, Any]] = []

    def bar(**options: Any) -> Any:
        made.append(options)
        return tqdm(disable=True, **options)

    messages = [{"role": "user", "content": "Once upon"}]
    params = SamplingParams(temperature=0.0, max_tokens=2)
    (output,) = llm.chat(messages, params, bar, chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert output.prompt is not None and output.prompt.endswith("Once upon")
    assert output.prompt_token_ids == llm.get_tokenizer().encode("Once upon")
    assert made == [{"total": 1, "desc": "Generate", "unit": "req"}]
    with pytest.raises(UnsupportedError, match="chat_template_content_format='string'"):
        llm.chat(messages, chat_template_content_format="string")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="add_special_tokens"):
        llm.chat(messages, chat_template="a", tokenization_kwargs={"add_special_tokens": True})
    with pytest.raises(ParameterError, match="lora_request"):
        llm.chat(messages, params, True, "adapter", chat_template="a")  # type: ignore[arg-type]


def test_metrics_are_in_order(llm: LLM) -> None:
    metrics = one(llm).metrics
    assert metrics is not None and metrics.num_generation_tokens == 8 and metrics.arrival_time > 1.6e9
    times = [metrics.queued_ts, metrics.scheduled_ts, metrics.first_token_ts, metrics.last_token_ts]
    assert times == sorted(times) and times[0] > 0
    total = metrics.queue_seconds + metrics.prefill_seconds + metrics.decode_seconds
    assert total == pytest.approx(times[-1] - times[0])
    assert metrics.first_token_latency == pytest.approx(times[2] - times[0])


def test_beams_have_logprobs_and_their_prompt(llm: LLM) -> None:
    (found,) = llm.beam_search("Once upon", BeamSearchParams(beam_width=3, max_tokens=5), use_tqdm=False)
    prompt = llm.get_tokenizer().encode("Once upon")
    for beam in found.sequences:
        assert beam.tokens[: len(prompt)] == prompt and len(beam.logprobs) == 5
        assert beam.text is not None and beam.text.startswith("Once upon") and beam.finish_reason == "length"
        values = [best[i].logprob for best, i in zip(beam.logprobs, beam.tokens[len(prompt) :], strict=True)]
        assert sum(values) == pytest.approx(beam.cum_logprob, abs=1e-4)
        assert all(len(best) == 6 and min(p.rank or 0 for p in best.values()) == 1 for best in beam.logprobs)


@pytest.mark.parametrize("include", [False, True])
def test_beams_end_by_the_rules(llm: LLM, include: bool) -> None:
    wanted = StructuredOutputsParams(choice=["yes", "no", "never"])
    params = BeamSearchParams(
        beam_width=3, max_tokens=12, structured_outputs=wanted, include_stop_str_in_output=include
    )
    prompt = llm.get_tokenizer().encode("Lily said")
    (found,) = llm.beam_search(["Lily said"], params)
    texts = set()
    for beam in found.sequences:
        assert (beam.finish_reason, beam.stop_reason) == ("stop", 2)
        assert (beam.tokens[-1] == 2) is include
        ids = beam.tokens[len(prompt) : -1 if include else None]
        texts.add(b"".join(map(llm.get_tokenizer().token_bytes, ids)))
        assert len(beam.logprobs) == len(ids) + 1
    assert texts == {b"yes", b"no", b"never"}
    assert llm.text_engine.engine.pool.num_free == llm.text_engine.engine.pool.num_blocks


def test_beams_keep_to_allowed_ids_and_rank_by_length(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=4, allowed_token_ids=[2, 300], length_penalty=2.0)
    prompt = llm.get_tokenizer().encode("Once")
    (found,) = llm.beam_search([{"prompt": "Once"}], params)
    scores = []
    for beam in found.sequences:
        assert set(beam.tokens[len(prompt) :]) <= {300}
        scores.append(beam.cum_logprob / len(beam.tokens) ** 2)
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(UnsupportedError, match="priority"):
        llm.beam_search("a", params, priority=[1])  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="concurrency_limit"):
        llm.beam_search("a", params, concurrency_limit=0)


def test_pooling_by_params(llm: LLM) -> None:
    (vector,) = llm.embed("The dog ran.", use_tqdm=False)
    assert vector.finished and vector.error is None and vector.num_cached_tokens == 0
    raw = llm.embed("The dog ran.", pooling_params=PoolingParams(use_activation=False), use_tqdm=False)[0]
    length = math.sqrt(sum(x * x for x in raw.outputs.embedding))
    assert [x / length for x in raw.outputs.embedding] == pytest.approx(vector.outputs.embedding, abs=1e-5)
    assert length != pytest.approx(1.0, abs=1e-2)
    (each,) = llm.encode("The dog ran.", pooling_task="token_embed", use_tqdm=False)
    assert each.outputs.data.shape == (len(vector.prompt_token_ids), 64)
    assert each.outputs.data[-1].tolist() == pytest.approx(vector.outputs.embedding, abs=1e-6)
    (same,) = llm.encode("The dog ran.", PoolingParams(task="embed"), use_tqdm=False)
    assert torch.equal(same.outputs.data, each.outputs.data[-1])
    (score,) = llm.score("The dog ran.", "Lily sat.", use_tqdm=False)
    assert score.prompt_token_ids[: len(vector.prompt_token_ids)] == vector.prompt_token_ids


def test_pooling_that_a_llama_cannot_do_is_refused(llm: LLM) -> None:
    with pytest.raises(UnsupportedError, match="dimensions=8"):
        PoolingParams(dimensions=8)
    with pytest.raises(UnsupportedError, match="'classify'"):
        llm.encode("a", pooling_task="classify")
    with pytest.raises(ParameterError, match="pooling_task"):
        llm.encode("a")
    with pytest.raises(ParameterError, match="'token_embed'"):
        llm.embed("a", pooling_params=PoolingParams(task="token_embed"))


def test_arguments_that_are_translated(stories: Path, tmp_path: Path) -> None:
    assert pooling_of({"pooling_type": "MEAN", "use_activation": False}) == ("mean", False)
    assert pooling_of(None) == ("last", True)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 5}')
    override = {"top_k": 7, "max_new_tokens": 9}
    expected = {"temperature": 0.7, "top_k": 7, "max_tokens": 9}
    assert sampling_defaults(tmp_path, "auto", override) == expected
    assert sampling_defaults(stories, str(tmp_path), override) == expected
    assert sampling_defaults(tmp_path, "vllm", None) == {}
    assert speculative_of(None, "ngram", None, 3) == {"method": "ngram", "num_speculative_tokens": 3}
    assert speculative_of(None, None, None, None) is None
    check_quantization("gguf", next((stories / "gguf").glob("*.gguf")))
    check_structured_outputs({"backend": "guidance"})
    refuse_unknown({"enforce_eager": False, "tensor_parallel_size": 1, "hf_overrides": {}})


def test_arguments_that_are_refused(stories: Path) -> None:
    with pytest.raises(UnsupportedError, match="'CLS'|'cls'"):
        pooling_of({"pooling_type": "CLS"})
    with pytest.raises(UnsupportedError, match="'step_tag_id'"):
        pooling_of({"step_tag_id": 3})
    with pytest.raises(UnsupportedError, match="'top_q'"):
        sampling_defaults(stories / "hf", "auto", {"top_q": 1})
    with pytest.raises(ParameterError, match="'nowhere'"):
        sampling_defaults(stories / "hf", "nowhere", None)
    with pytest.raises(ParameterError, match="not both"):
        speculative_of({"method": "ngram"}, "ngram", None, 3)
    model: Any = None  # these are found before a model is needed
    for config, message in (
        ({"method": "ngram"}, "needs num_speculative_tokens"),
        ({"num_speculative_tokens": "3"}, "num_speculative_tokens must be an integer, got '3'"),
        ({"num_speculative_tokens": 3, "prompt_lookup_max": "5"}, "prompt_lookup_max must be an integer"),
        ({"num_speculative_tokens": 3, "prompt_lookup_min": 0}, "prompt_lookup_min must be at least 1"),
        ({"num_speculative_tokens": 3, "method": "draft_model"}, "needs a model"),
    ):
        with pytest.raises(ParameterError, match=message):
            make_proposer(config, model, "cpu")
    with pytest.raises(UnsupportedError, match="'gguf'"):
        check_quantization("gguf", stories / "hf")
    with pytest.raises(UnsupportedError, match="'xgrammar'"):
        check_structured_outputs({"backend": "xgrammar"})
    with pytest.raises(UnsupportedError, match="hf_overrides"):
        refuse_unknown({"hf_overrides": {"a": 1}})
    with pytest.raises(ParameterError, match="temperature"):
        LLM(stories / "hf", override_generation_config={"temperature": -1})
