"""The engine beside an event loop: what is slow to prepare holds up nobody, and can be aborted meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from puna import LLM, RequestOutputKind, SamplingParams, StructuredOutputsParams
from puna.async_llm import AsyncLLM, EngineDeadError, RequestAborted
from puna.errors import ParameterError

SHORT = SamplingParams(temperature=0.0, max_tokens=12)
YES = SamplingParams(
    temperature=0.0, max_tokens=12, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])
)


class Gate:
    """Hold a function up until somebody opens the gate."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.reached.set()
        assert self.opened.wait(30), "nobody opened the gate"
        return self.function(*args, **options)


@pytest.fixture
def engine(stories: Path) -> Iterator[AsyncLLM]:
    made = AsyncLLM(LLM(stories / "hf", kv_cache_memory_bytes=2**24).text_engine)
    yield made
    made.shutdown()
    pool = made.text_engine.engine.pool
    assert pool.num_free == pool.num_blocks


async def read(engine: AsyncLLM, request_id: str, prompt: str | list[int], params: SamplingParams) -> str:
    text = ""
    async for output in engine.generate(request_id, prompt, params):
        text = output.outputs[0].text
    return text


@pytest.mark.parametrize(("held", "owner"), [("compile_grammar", "engine"), ("encode", "tokenizer")])
def test_a_slow_grammar_or_text_holds_up_no_other_stream(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch, held: str, owner: str
) -> None:
    at: Any = engine.text_engine if owner == "engine" else engine.text_engine.tokenizer
    ids = engine.text_engine.tokenizer.encode("The dog")
    gate = Gate(getattr(at, held))
    monkeypatch.setattr(at, held, gate)

    async def scene() -> None:
        slow = asyncio.create_task(read(engine, "slow", "Lily said", YES))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        assert len(await read(engine, "quick", ids, SHORT)) > 10  # while the gate is shut
        assert not slow.done()
        gate.opened.set()
        assert await slow in ("yes", "no")

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_what_is_still_being_prepared_can_be_aborted(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(engine.text_engine.compile_grammar)
    monkeypatch.setattr(engine.text_engine, "compile_grammar", gate)

    async def scene() -> None:
        slow = asyncio.create_task(read(engine, "slow", "Lily said", YES))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        with pytest.raises(ParameterError, match="'slow' is running already"):
            await read(engine, "slow", "a", SHORT)
        engine.abort("slow")
        gate.opened.set()
        with pytest.raises(RequestAborted):
            await slow
        assert await read(engine, "slow", "Lily said", YES) in ("yes", "no")  # the id is free again

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_cancelled_preparation_adds_nothing(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(engine.text_engine.compile_grammar)
    monkeypatch.setattr(engine.text_engine, "compile_grammar", gate)

    async def scene() -> None:
        slow = asyncio.create_task(read(engine, "slow", "Lily said", YES))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        gate.opened.set()
        await read(engine, "next", "a", SHORT)
        assert engine.text_engine.engine.snapshot()["finished_length"] == 1
        assert engine.text_engine.engine.snapshot()["steps"] == 12

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_bad_grammar_is_refused_to_the_one_who_asked(engine: AsyncLLM) -> None:
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="(a"))

    async def scene() -> None:
        with pytest.raises(ParameterError, match="bad grammar"):
            await read(engine, "bad", "a", bad)
        assert engine.is_alive and await read(engine, "bad", "Lily said", YES) in ("yes", "no")

    asyncio.run(asyncio.wait_for(scene(), 60))


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA])
def test_a_reader_that_falls_behind_gets_the_rest_in_one_output(
    engine: AsyncLLM, kind: RequestOutputKind
) -> None:
    settings: dict[str, Any] = {"n": 2, "seed": 3, "max_tokens": 150, "ignore_eos": True, "logprobs": 0}

    async def scene() -> None:
        stream = engine.generate("late", "Lily", SamplingParams(**settings, output_kind=kind))
        first = await anext(stream)
        while engine.text_engine.has_unfinished:
            await asyncio.sleep(0.005)
        step_has_ended = threading.Event()
        engine._commands.put(step_has_ended.set)
        await asyncio.to_thread(step_has_ended.wait)
        (rest,) = [output async for output in stream]
        assert len(first.outputs[0].token_ids) < 150 and not first.finished and rest.finished
        first.add(rest, aggregate=kind is RequestOutputKind.DELTA)
        final = SamplingParams(**settings, output_kind=RequestOutputKind.FINAL_ONLY)
        (whole,) = [output async for output in engine.generate("whole", "Lily", final)]
        assert [o.text for o in first.outputs] == [o.text for o in whole.outputs]
        assert first.outputs == whole.outputs and len(whole.outputs[1].logprobs or []) == 150

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_shutdown_ends_what_runs_and_gives_its_blocks_back(engine: AsyncLLM) -> None:
    async def scene() -> None:
        with pytest.raises(EngineDeadError, match="shut down"):
            async for _ in engine.generate("a", "", SamplingParams(max_tokens=400, ignore_eos=True)):
                engine.shutdown()

    asyncio.run(asyncio.wait_for(scene(), 60))
    pool = engine.text_engine.engine.pool
    assert pool.num_free == pool.num_blocks and not engine.text_engine.has_unfinished


def test_a_request_that_comes_as_the_thread_looks_for_the_last_time_learns_of_the_end(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, thread = engine.text_engine.prepare, engine._thread

    def late(*args: Any, **options: Any) -> Any:
        engine.shutdown()  # it has emptied the queue, and is not gone yet
        monkeypatch.setattr(engine, "_thread", threading.main_thread())
        return prepare(*args, **options)

    monkeypatch.setattr(engine.text_engine, "prepare", late)

    async def scene() -> None:
        with pytest.raises(EngineDeadError, match="shut down"):
            await read(engine, "late", "a", SHORT)

    try:
        asyncio.run(asyncio.wait_for(scene(), 20))
    finally:
        monkeypatch.setattr(engine, "_thread", thread)
