"""Run a benchmark's requests on the engine in this process, and note when each token came.

Requests are answered as `vllm bench` asks for it: sampled, to their full length whatever end the model would
choose. The clock of throughput begins when the first request is added, after the model was loaded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from puna.async_llm import AsyncLLM
from puna.cli.measure.request_sets import BenchRequest
from puna.cli.measure.timelines import Timeline
from puna.engine.sampling import SamplingParams
from puna.errors import ParameterError
from puna.llm import LLM
from puna.outputs import RequestOutputs
from puna.text_engine import TextEngine


def check_lengths(requests: Sequence[BenchRequest], max_model_len: int) -> None:
    """Raise ParameterError for the first request that the engine would cut short."""
    for request in requests:
        if request.prompt_len + request.output_len > max_model_len:
            raise ParameterError(
                f"{request.prompt_len} prompt tokens and {request.output_len} output tokens do not fit "
                f"into max_model_len {max_model_len}"
            )


def full_length(request: BenchRequest, temperature: float, *, detokenize: bool) -> SamplingParams:
    """Return the settings that give exactly the tokens wanted."""
    return SamplingParams(
        temperature=temperature, max_tokens=request.output_len, ignore_eos=True, detokenize=detokenize
    )


def run_offline(
    engine: TextEngine, requests: Sequence[BenchRequest], params: Sequence[SamplingParams]
) -> tuple[list[Timeline], float]:
    """Add all requests, step until they have ended; return their timelines, in order, and the seconds."""
    began = time.perf_counter()
    clocks = {}
    for number, (request, wanted) in enumerate(zip(requests, params, strict=True)):
        clocks[str(number)] = _Clock(request)
        engine.add(str(number), request.prompt, wanted)
    while engine.has_unfinished:
        touched = engine.step()
        now = time.perf_counter()
        for outputs in touched:
            clocks[outputs.request_id].update(outputs, now)
    return [clock.timeline() for clock in clocks.values()], time.perf_counter() - began


async def run_async(
    engine: AsyncLLM, requests: Sequence[BenchRequest], params: Sequence[SamplingParams]
) -> tuple[list[Timeline], float]:
    """Do the same through the engine's thread, one stream for each request."""

    async def follow(number: int) -> Timeline:
        request, times, count, sent = requests[number], [], 0, time.perf_counter()
        async for output in engine.generate(str(number), request.prompt, params[number]):
            grown = len(output.outputs[0].token_ids)
            if grown > count:
                times.append(time.perf_counter())
                count = grown
        return Timeline(prompt_len=request.prompt_len, output_len=count, sent=sent, chunk_times=tuple(times))

    began = time.perf_counter()
    timelines = await asyncio.gather(*map(follow, range(len(requests))))
    return timelines, time.perf_counter() - began


def time_batches(
    llm: LLM, requests: Sequence[BenchRequest], params: Sequence[SamplingParams], *, warmups: int, rounds: int
) -> list[float]:
    """Answer the same batch again and again; return the seconds of each round after the warm-up."""
    latencies = []
    prompts = [request.prompt for request in requests]
    for _ in range(warmups + rounds):
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        latencies.append(time.perf_counter() - began)
    return latencies[warmups:]


class _Clock:
    """Note when one request's tokens came."""

    def __init__(self, request: BenchRequest) -> None:
        self._request = request
        self._sent = time.perf_counter()
        self._times: list[float] = []
        self._count = 0

    def update(self, outputs: RequestOutputs, now: float) -> None:
        count = outputs.sequences[0].sequence.num_output
        if count > self._count:
            self._times.append(now)
            self._count = count

    def timeline(self) -> Timeline:
        return Timeline(
            prompt_len=self._request.prompt_len,
            output_len=self._count,
            sent=self._sent,
            chunk_times=tuple(self._times),
        )
