"""The engine in a thread beside an event loop, or in a process of its own: what each does to the loop.

    python benchmarks/async_engine.py [--model cria] [--streams 8] [--tokens 64] [--rounds 3]

A ticker in the loop sleeps 1 ms again and again and notes how late it wakes, while streams are read. Prints,
for an idle loop and for both engines in turns: output tokens per second, and the lateness in milliseconds
(median, 99th percentile, longest; medians over the rounds).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import threading
import time
from collections.abc import AsyncGenerator
from queue import Empty
from typing import Any

from puna import LLM, SamplingParams
from puna.async_llm import AsyncLLM
from puna.outputs import RequestOutput

PROMPT = "Tell me a story about a llama in the mountains."


def serve(model: str, commands: Any, outputs: Any) -> None:
    """Run an engine in this process: requests come by a queue, outputs go out by another."""
    engine = LLM(model, kv_cache_memory_bytes=2**28).text_engine
    outputs.put(None)
    while True:
        try:
            command = commands.get(block=not engine.has_unfinished)
            if command is None:
                return
            engine.add(*command)
        except Empty:
            outputs.put([request.snapshot() for request in engine.step()])


class EngineProcess:
    """Do what `AsyncLLM.generate` does with an engine in another process."""

    def __init__(self, model: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._commands, self._outputs = context.Queue(), context.Queue()
        self._process = context.Process(target=serve, args=(model, self._commands, self._outputs))
        self._process.start()
        self._outputs.get()  # it is ready
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[RequestOutput]]] = {}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    async def generate(
        self, request_id: str, prompt: str, params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request as it grows."""
        items: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._streams[request_id] = (asyncio.get_running_loop(), items)
        self._commands.put((request_id, prompt, params))
        while True:
            output = await items.get()
            yield output
            if output.finished:
                return

    def shutdown(self) -> None:
        """End the process."""
        self._commands.put(None)
        self._process.join()
        self._outputs.put(None)
        self._thread.join()

    def _read(self) -> None:
        while (step := self._outputs.get()) is not None:
            for output in step:
                loop, items = self._streams[output.request_id]
                loop.call_soon_threadsafe(items.put_nowait, output)


async def tick(late: list[float]) -> None:
    """Note how late each wake-up is, in seconds, until cancelled."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        late.append(time.perf_counter() - began - 0.001)


async def measure(engine: AsyncLLM | EngineProcess | None, streams: int, tokens: int) -> list[float]:
    """Return tokens per second, and the lateness in ms: median, 99th percentile, longest."""
    late: list[float] = []
    ticker = asyncio.create_task(tick(late))

    async def read(key: str, seed: int) -> int:
        params = SamplingParams(seed=seed, max_tokens=tokens, ignore_eos=True)
        count = 0
        async for output in engine.generate(key, PROMPT, params):  # type: ignore[union-attr]
            count = len(output.outputs[0].token_ids)
        return count

    began = time.perf_counter()
    if engine is None:
        await asyncio.sleep(2)
        done = [0]
    else:
        done = await asyncio.gather(*(read(f"{began}-{i}", i) for i in range(streams)))
    seconds = time.perf_counter() - began
    ticker.cancel()
    percentiles = statistics.quantiles(late, n=100)
    return [sum(done) / seconds, 1e3 * statistics.median(late), 1e3 * percentiles[98], 1e3 * max(late)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cria")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    engines: dict[str, AsyncLLM | EngineProcess | None] = {
        "idle loop": None,
        "thread": AsyncLLM(LLM(args.model, kv_cache_memory_bytes=2**28).text_engine),
        "process": EngineProcess(args.model),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in engines}
    for round_number in range(-1, args.rounds):
        for name, engine in engines.items():
            values = asyncio.run(measure(engine, args.streams, args.tokens))
            if round_number >= 0:  # the one before warms up
                found[name].append(values)
    print(f"{'engine':12}{'tokens/s':>10}{'late p50 ms':>14}{'late p99 ms':>14}{'longest ms':>14}")
    for name, rounds in found.items():
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        print(f"{name:12}{medians[0]:10.0f}{medians[1]:14.2f}{medians[2]:14.2f}{medians[3]:14.2f}")
    ratios = [p[0] / t[0] for p, t in zip(found["process"], found["thread"], strict=True)]
    print(
        f"tokens/s, process / thread: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )
    for engine in engines.values():
        if engine is not None:
            engine.shutdown()


if __name__ == "__main__":
    main()
