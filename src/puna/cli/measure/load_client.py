"""Send a benchmark's requests to an OpenAI-compatible server, and note when each chunk came.

It speaks completions and chat completions as streams of server-sent events, asks for the counts of tokens
(`stream_options.include_usage`), and takes an answer for whole only when the server said that it ended.
Arrivals are those of `vllm bench serve`: gaps from a gamma distribution, Poisson with `burstiness` 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from puna.cli.measure.http_client import Address, HTTPError, open_answer
from puna.cli.measure.request_sets import BenchRequest
from puna.cli.measure.timelines import Timeline
from puna.errors import ParameterError, PunaError

Backend = Literal["openai", "openai-chat"]
ENDPOINTS: dict[Backend, str] = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
_SHOWN = 300  # characters of an error's body

SendOne = Callable[[BenchRequest], Awaitable[Timeline]]


@dataclass(frozen=True, kw_only=True)
class Client:
    """Say which server and model are measured, and what is put into every request."""

    address: Address
    backend: Backend
    endpoint: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 3600.0

    async def send(self, request: BenchRequest) -> Timeline:
        """Send one request and read its stream; what fails gives a timeline with an error."""
        sent = time.perf_counter()
        stream = _Stream()
        error: str | None = None
        try:
            async with asyncio.timeout(self.timeout):
                await self._read(request, stream)
        except HTTPError as failure:
            error = str(failure)
        except TimeoutError:
            error = f"no end after {self.timeout:g} s"
        return Timeline(
            prompt_len=request.prompt_len if stream.prompt_tokens is None else stream.prompt_tokens,
            output_len=len(stream.times) if stream.output_tokens is None else stream.output_tokens,
            sent=sent,
            chunk_times=tuple(stream.times),
            text="".join(stream.pieces),
            error=error,
        )

    async def _read(self, request: BenchRequest, stream: _Stream) -> None:
        body = json.dumps(self._payload(request)).encode()
        async with open_answer(self.address, self.endpoint, body=body, headers=self.headers) as answer:
            if answer.status != 200:
                raise HTTPError(_refusal(answer.status, answer.reason, await answer.read()))
            async with contextlib.aclosing(answer.lines()) as lines:
                async for line in lines:
                    if stream.take(line, time.perf_counter()):
                        break
        stream.check_whole()

    def _payload(self, request: BenchRequest) -> dict[str, Any]:
        if self.backend == "openai":
            asked: dict[str, Any] = {"prompt": request.prompt}
        else:
            asked = {"messages": [{"role": "user", "content": request.prompt}]}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, **asked, "max_tokens": request.output_len, **stream, **self.extra}


class _Stream:
    """What came of one answer."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.pieces: list[str] = []
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self._has_finished = False

    def take(self, line: str, now: float) -> bool:
        """Take one line of the stream; True when it says that nothing follows."""
        if not line.startswith("data:"):
            return False  # comments, event names, empty lines
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self._has_finished = True
            return True
        try:
            event = json.loads(data)
        except ValueError:
            raise HTTPError(f"the stream holds what is not JSON: {data[:_SHOWN]}") from None
        if not isinstance(event, dict) or event.get("error"):
            raise HTTPError(f"the stream holds an error: {data[:_SHOWN]}")
        self._take_usage(event.get("usage"))
        choices = event.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            self._take_choice(choices[0], now)
        return False

    def check_whole(self) -> None:
        """Raise HTTPError unless the answer has ended as the server meant it to."""
        if not self._has_finished:
            raise HTTPError("the stream broke off: it ended before its answer did")
        if not self.times:
            raise HTTPError("the answer has no token")

    def _take_choice(self, choice: Mapping[str, Any], now: float) -> None:
        """Note a chunk that brings a token, though its text may be empty yet; a chat's first brings none."""
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or delta.get("reasoning") or ""
        has_ended = choice.get("finish_reason") is not None
        is_opening = "role" in delta and not text
        # An answer whose every token is no text yet (half a character) has at least its end.
        if text or not (has_ended or is_opening) or (has_ended and not self.times):
            self.times.append(now)
            self.pieces.append(text)
        self._has_finished = self._has_finished or has_ended

    def _take_usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
            self.output_tokens = _count(usage.get("completion_tokens"), self.output_tokens)


def _count(value: Any, known: int | None) -> int | None:
    return value if isinstance(value, int) else known


def _refusal(status: int, reason: str, body: bytes) -> str:
    shown = " ".join(body.decode("utf-8", errors="replace").split())
    return f"HTTP {status} {reason}: {shown[:_SHOWN] or 'no body'}"


async def first_model(address: Address, headers: Mapping[str, str]) -> str:
    """Return the id that the server lists first. Raises PunaError when there is no server or no list."""
    try:
        async with open_answer(address, "/v1/models", headers=headers) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise HTTPError(_refusal(answer.status, answer.reason, body))
        return str(json.loads(body)["data"][0]["id"])
    except HTTPError as error:
        raise PunaError(f"{address}/v1/models: {error}") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise PunaError(f"{address}/v1/models lists no model: name one with --model") from None


async def send_all(
    requests: Sequence[BenchRequest],
    send: SendOne,
    *,
    request_rate: float = math.inf,
    burstiness: float = 1.0,
    max_concurrency: int | None = None,
    seed: int = 0,
) -> tuple[list[Timeline], float]:
    """Send requests as they arrive; return their timelines, in order, and the seconds that all took.

    `request_rate` is in requests/s. At most `max_concurrency` run at once; the others wait unsent.
    """
    if request_rate <= 0 or burstiness <= 0:
        raise ParameterError("request_rate and burstiness must be above 0")
    if max_concurrency is not None and max_concurrency < 1:
        raise ParameterError(f"max_concurrency must be at least 1, got {max_concurrency}")
    room = contextlib.nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)

    async def send_in_turn(request: BenchRequest) -> Timeline:
        async with room:
            return await send(request)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        arrivals = arrival_times(request_rate, burstiness, seed)
        for request, arrival in zip(requests, arrivals, strict=False):
            await asyncio.sleep(max(began + arrival - time.perf_counter(), 0.0))
            tasks.append(group.create_task(send_in_turn(request)))
    return [task.result() for task in tasks], time.perf_counter() - began


def arrival_times(request_rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Yield when requests arrive, in seconds since the first; all at once at an infinite rate."""
    rng = random.Random(seed)
    arrival = 0.0
    while True:
        yield arrival
        if math.isfinite(request_rate):
            arrival += rng.gammavariate(burstiness, 1 / (request_rate * burstiness))
