"""Requests with adapters, through `LLM` and `AsyncLLM`, against each adapter merged into the model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from puna import LLM, AsyncLLM, AutoModelForCausalLM, BeamSearchParams, LoRARequest, PeftModel, SamplingParams
from puna.engine.block_pool import BlockPool
from puna.engine.llm_engine import EngineConfig
from puna.engine.request import Sequence
from puna.engine.scheduler import Scheduler, SchedulerConfig
from puna.errors import ModelNotFoundError, ParameterError, UnsupportedError
from puna.model import PackedAttention
from puna.model.lora_config import LoraConfig
from puna.model.lora_serving import ServedAdapter
from puna.peft_model import get_peft_model
from puna.served_adapters import AdapterStore
from puna.text.tokenizer import load_tokenizer
from puna.text_engine import TextEngine
from puna.weights.loader import load_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
KINDS: dict[str, dict[str, Any]] = {
    "one": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8},
    "two": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    "three": {"target_modules": ["down_proj", "o_proj", "embed_tokens"], "lora_alpha": 6},
}
PROMPTS = ["Once upon a time", "The dog", "Lily and Tom went to the park. They", "One day, a big cat said"]


@pytest.fixture(scope="module")
def folders(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return three adapters that change what the model says."""
    place = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "init_lora_weights": False, **settings})
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(stories / "hf"), config)
        model.save_pretrained(place / name, save_embedding_layers=False)
    return {name: place / name for name in KINDS}


@pytest.fixture(scope="module")
def requests(folders: dict[str, Path]) -> dict[str, LoRARequest]:
    return {name: LoRARequest(name, place, str(folders[name])) for place, name in enumerate(KINDS, start=1)}


@pytest.fixture(scope="module")
def merged(stories: Path, folders: dict[str, Path]) -> dict[str | None, list[list[int]]]:
    """Return what each merged model, and the base (None), answers to the prompts."""
    found = {}
    for name in (None, *folders):
        model = AutoModelForCausalLM.from_pretrained(stories / "hf")
        if name is not None:
            model = PeftModel.from_pretrained(model, folders[name]).merge_and_unload()
        engine = TextEngine(model.llama, load_tokenizer(stories / "hf"), EngineConfig(num_blocks=64))
        found[name] = [answer(engine, prompt) for prompt in PROMPTS]
    assert len({str(answers) for answers in found.values()}) == 4
    return found


@pytest.fixture(scope="module")
def llm(stories: Path) -> LLM:
    return LLM(stories / "hf", kv_cache_memory_bytes=2**24, enable_lora=True, max_loras=3)


def answer(engine: TextEngine, prompt: str, lora_request: LoRARequest | None = None) -> list[int]:
    request = engine.add("alone", prompt, GREEDY, lora_request=lora_request)
    while engine.has_unfinished:
        engine.step()
    return list(request.sequences[0].sequence.output_ids)


def ids_of(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("max_loras", [1, 2, 3])
def test_a_mixed_batch_answers_as_each_merged_model_does(
    stories: Path,
    requests: dict[str, LoRARequest],
    merged: dict[str | None, list[list[int]]],
    max_loras: int,
) -> None:
    llm = LLM(stories / "hf", kv_cache_memory_bytes=2**24, enable_lora=True, max_loras=max_loras)
    names = [name for _ in PROMPTS for name in (None, *KINDS)]
    prompts = [prompt for prompt in PROMPTS for _ in (None, *KINDS)]
    asked = [None if name is None else requests[name] for name in names]
    outputs = llm.generate(prompts, GREEDY, lora_request=asked, use_tqdm=False)
    wanted = [merged[name][PROMPTS.index(prompt)] for name, prompt in zip(names, prompts, strict=True)]
    assert ids_of(outputs) == wanted
    assert [output.lora_request for output in outputs] == asked
    assert [output.outputs[0].lora_request for output in outputs] == asked
    pool = llm.text_engine.engine.pool
    assert pool.num_free == pool.num_blocks
    assert ids_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == merged[None]


def test_one_request_is_for_all_prompts_and_chats(
    llm: LLM, requests: dict[str, LoRARequest], merged: dict[str | None, list[list[int]]]
) -> None:
    assert (
        ids_of(llm.generate(PROMPTS, GREEDY, lora_request=requests["two"], use_tqdm=False)) == merged["two"]
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    template = "{{ bos_token }}{{ messages[0].content }}"
    found = llm.chat(chats, GREEDY, False, requests["one"], chat_template=template)
    assert ids_of(found) == merged["one"]


def test_guesses_change_no_answer_with_adapters(
    stories: Path, requests: dict[str, LoRARequest], merged: dict[str | None, list[list[int]]]
) -> None:
    llm = LLM(
        stories / "hf",
        kv_cache_memory_bytes=2**24,
        enable_lora=True,
        max_loras=3,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
    )
    asked = [None, requests["one"], requests["two"], requests["three"]]
    outputs = llm.generate(PROMPTS, GREEDY, lora_request=asked, use_tqdm=False)
    assert ids_of(outputs) == [merged[name][place] for place, name in enumerate((None, *KINDS))]
    assert llm.get_metrics()["drafted_tokens"] > 0


def test_a_prefix_is_shared_within_an_adapter_only(
    stories: Path, requests: dict[str, LoRARequest], merged: dict[str | None, list[list[int]]]
) -> None:
    llm = LLM(stories / "hf", kv_cache_memory_bytes=2**24, block_size=4, enable_lora=True, max_loras=3)
    cached = []
    for name in (None, "one", "two", "one", None, "three", "two"):
        asked = None if name is None else requests[name]
        (output,) = llm.generate(PROMPTS[2], GREEDY, lora_request=asked, use_tqdm=False)
        assert output.outputs[0].token_ids == merged[name][2]
        cached.append(output.num_cached_tokens or 0)
    hit = cached[3]
    assert cached == [0, 0, 0, hit, hit, 0, hit] and hit >= 12


def test_preempted_sequences_keep_their_adapter(
    stories: Path, requests: dict[str, LoRARequest], merged: dict[str | None, list[list[int]]]
) -> None:
    llm = LLM(
        stories / "hf",
        max_model_len=64,
        block_size=4,
        kv_cache_memory_bytes=18 * 4 * 5 * 2 * 4 * 8 * 4,  # 18 blocks: not enough for four at once
        enable_lora=True,
        max_loras=3,
    )
    asked = [None, requests["one"], requests["two"], requests["three"]]
    outputs = llm.generate(PROMPTS, GREEDY, lora_request=asked, use_tqdm=False)
    wanted = [merged[name][place] for place, name in enumerate((None, *KINDS))]
    assert ids_of(outputs) == wanted
    assert llm.get_metrics()["num_preemptions"] > 0


def test_an_abort_leaves_the_others_alone(
    llm: LLM, requests: dict[str, LoRARequest], merged: dict[str | None, list[list[int]]]
) -> None:
    engine = llm.text_engine
    running = {
        name: engine.add(name, PROMPTS[0], GREEDY, lora_request=request) for name, request in requests.items()
    }
    for _ in range(5):
        engine.step()
    engine.abort("two")
    while engine.has_unfinished:
        engine.step()
    for name in ("one", "three"):
        assert running[name].sequences[0].sequence.output_ids == merged[name][0]


def test_batches_without_adapters_are_computed_as_if_there_were_none(
    tmp_path: Path,
) -> None:
    """By the compiled layers where there are some: cria is in half precision, which they compute."""
    from puna.cria import FOLDER

    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(FOLDER), config).save_pretrained(tmp_path)
    llm = LLM("cria", kv_cache_memory_bytes=2**24, enable_lora=True, enable_prefix_caching=False)
    mine = LoRARequest("mine", 1, str(tmp_path))
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=0)
    (before,) = llm.generate("Llamas are", params, use_tqdm=False)
    (adapted,) = llm.generate("Llamas are", params, lora_request=mine, use_tqdm=False)
    (after,) = llm.generate("Llamas are", params, use_tqdm=False)
    assert after.outputs[0].token_ids == before.outputs[0].token_ids != adapted.outputs[0].token_ids
    assert after.outputs[0].logprobs == before.outputs[0].logprobs
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FOLDER), tmp_path)
    engine = TextEngine(merged.merge_and_unload().llama.float(), load_tokenizer(FOLDER))
    engine_params = SamplingParams(temperature=0.0, max_tokens=3)
    request = engine.add("x", "Llamas are", engine_params)
    while engine.has_unfinished:
        engine.step()
    assert list(request.sequences[0].sequence.output_ids) == adapted.outputs[0].token_ids[:3]


def test_forks_and_beams_have_the_adapter_too(
    llm: LLM, requests: dict[str, LoRARequest], merged: dict[str | None, list[list[int]]]
) -> None:
    several = SamplingParams(top_k=1, max_tokens=20, n=2)
    (output,) = llm.generate(PROMPTS[1], several, lora_request=requests["two"], use_tqdm=False)
    assert [one.token_ids for one in output.outputs] == [merged["two"][1]] * 2
    (beams,) = llm.beam_search(PROMPTS[1], BeamSearchParams(1, 20, ignore_eos=True), requests["two"])
    prompt = llm.get_tokenizer().encode(PROMPTS[1])
    assert beams.sequences[0].tokens[len(prompt) :] == merged["two"][1]
    assert beams.sequences[0].lora_request == requests["two"]


def test_vectors_are_those_of_the_adapter(
    stories: Path, llm: LLM, requests: dict[str, LoRARequest], folders: dict[str, Path]
) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories / "hf"), folders["two"])
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    llama, place = model.merge_and_unload().llama, torch.arange(len(ids))
    wanted = llama.hidden_states(torch.tensor(ids), place, PackedAttention([0, len(ids)]))[-1]
    wanted = wanted / wanted.norm()
    (found,) = llm.embed(PROMPTS[0], lora_request=requests["two"], use_tqdm=False)
    torch.testing.assert_close(torch.tensor(found.outputs.embedding), wanted, atol=1e-4, rtol=1e-3)
    (base,) = llm.embed(PROMPTS[0], use_tqdm=False)
    assert base.outputs.embedding != found.outputs.embedding


def test_streams_with_adapters(
    llm: LLM, requests: dict[str, LoRARequest], merged: dict[str | None, list[list[int]]]
) -> None:
    engine = AsyncLLM(llm.text_engine)

    async def read(name: str | None) -> list[int]:
        asked = None if name is None else requests[name]
        ids: list[int] = []
        async for output in engine.generate(str(name), PROMPTS[3], GREEDY, lora_request=asked):
            ids = output.outputs[0].token_ids
            assert output.lora_request is asked
        return ids

    async def scene() -> list[list[int]]:
        return await asyncio.gather(*(read(name) for name in (None, *KINDS)))

    async def wrong() -> None:
        async for _ in engine.generate("x", "a", GREEDY, lora_request=LoRARequest("no", 9, "nowhere")):
            pass

    try:
        assert asyncio.run(asyncio.wait_for(scene(), 60)) == [merged[name][3] for name in (None, *KINDS)]
        with pytest.raises(ModelNotFoundError, match="loading adapter 'no' failed: nowhere"):
            asyncio.run(asyncio.wait_for(wrong(), 60))
        assert engine.is_alive
    finally:
        engine.shutdown()


def test_a_request_is_checked() -> None:
    for bad in ({"lora_int_id": 0}, {"lora_path": ""}, {"lora_name": ""}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            LoRARequest(**{"lora_name": "a", "lora_int_id": 1, "lora_path": "p", **bad})  # type: ignore[arg-type]
    one, same = LoRARequest("a", 1, "p"), LoRARequest("a", 2, "q", base_model_name="llama")
    assert one == same and hash(one) == hash(same) and one != LoRARequest("b", 1, "p")
    assert (one.adapter_id, one.name, one.path) == (1, "a", "p")
    with pytest.raises(UnsupportedError, match="stacked experts"):
        LoRARequest("a", 1, "p", is_3d_lora_weight=True)


def test_wrong_use_is_named(llm: LLM, stories: Path, requests: dict[str, LoRARequest]) -> None:
    plain = LLM(stories / "hf", kv_cache_memory_bytes=2**22)
    with pytest.raises(ParameterError, match="lora_request 'one' needs LLM\\(enable_lora=True\\)"):
        plain.generate("a", GREEDY, lora_request=requests["one"])
    with pytest.raises(ParameterError, match="2 lora requests do not fit 1 prompts"):
        llm.generate("a", GREEDY, lora_request=[requests["one"], None])
    with pytest.raises(ParameterError, match="must be a LoRARequest"):
        llm.generate("a", GREEDY, lora_request="one")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="max_loras, .* need enable_lora=True"):
        LLM(stories / "hf", kv_cache_memory_bytes=2**22, max_loras=2)
    with pytest.raises(ParameterError, match="max_cpu_loras 1 must be at least max_loras, 2"):
        LLM(stories / "hf", kv_cache_memory_bytes=2**22, enable_lora=True, max_loras=2, max_cpu_loras=1)


@pytest.fixture
def store(stories: Path) -> Iterator[AdapterStore]:
    yield AdapterStore(load_model(stories / "hf"), max_loras=1, max_cpu_loras=2)


def test_adapters_in_use_stay_and_of_the_others_the_latest(
    store: AdapterStore, requests: dict[str, LoRARequest]
) -> None:
    held = store.load(requests["one"])
    store.load(requests["two"])
    store.load(requests["three"])
    assert store.names() == ["one", "three", "two"]  # one is used by whoever holds it
    assert store.load(requests["one"]) is held
    assert store.names() == ["one", "three"]
    del held
    store.load(requests["three"])
    store.load(requests["two"])
    assert store.names() == ["three", "two"]


def test_names_and_numbers_must_not_be_mixed_up(
    store: AdapterStore, requests: dict[str, LoRARequest], folders: dict[str, Path]
) -> None:
    first = store.load(requests["one"])
    with pytest.raises(ParameterError, match="lora_int_id 1 of 'other' is that of 'one'"):
        store.load(LoRARequest("other", 1, str(folders["two"])))
    with pytest.raises(ParameterError, match="'one' is loaded as number 1 from .*: give another name"):
        store.load(LoRARequest("one", 1, str(folders["two"])))
    again = store.load(LoRARequest("one", 1, str(folders["two"]), load_inplace=True))
    assert again.key != first.key
    assert store.load(LoRARequest("one", 1, str(folders["two"]))) is again


def sequences(*adapters: ServedAdapter | None) -> list[Sequence]:
    return [Sequence(str(i), [1, 2], GREEDY, max_tokens=5, adapter=one) for i, one in enumerate(adapters)]


def test_the_scheduler_keeps_to_the_number_of_adapters_and_passes_over_fairly() -> None:
    one, two = (ServedAdapter(name=name, key=b"", changes={}) for name in ("one", "two"))
    scheduler = Scheduler(SchedulerConfig(max_loras=1), BlockPool(64))
    first = sequences(one, two, one, None)
    for sequence in first:
        scheduler.add(sequence)
    assert scheduler.schedule().sequences == [first[0], first[2], first[3]]
    late = sequences(one, None)
    for sequence in late:
        scheduler.add(sequence)
    assert late[1] in scheduler.schedule().sequences  # the base is no adapter
    assert scheduler.waiting == [first[1], late[0]]  # what came after `two` had waited waits too
    for sequence in (first[0], first[2]):
        scheduler.finish(sequence)
    assert first[1] in scheduler.schedule().sequences
    assert scheduler.waiting == [late[0]]
