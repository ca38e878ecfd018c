"""The engine beside an event loop: each request is an async stream of outputs.

The engine runs in one thread of this process. Its steps spend their time in kernels that hold no interpreter
lock, and a thread needs no copies and no start-up of a second process (docs/performance.md has what was
measured). Prompts are encoded and grammars compiled in threads of the event loop's pool, so that a slow one
holds up no other stream. Cancelling a stream aborts its request at the next step and frees its blocks.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from puna.engine.sampling import RequestOutputKind, SamplingParams
from puna.errors import ParameterError
from puna.outputs import RequestOutput
from puna.served_adapters import LoRARequest
from puna.text_engine import PreparedRequest, TextEngine

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """Say that the engine's thread ended by an error; every stream gets it, and so does every new request."""


class RequestAborted(RuntimeError):
    """Say that somebody aborted the request whose stream this is."""


@dataclass
class _Stream:
    """Where the outputs of one request go, from the engine's thread into its event loop.

    A reader that is slower than the engine finds what it missed in one output: nothing piles up.
    """

    loop: asyncio.AbstractEventLoop
    joins: bool  # outputs hold what is new, so later ones are added to earlier ones
    aborted: bool = False  # before it was added
    _output: RequestOutput | None = None
    _error: BaseException | None = None
    _filled: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, item: RequestOutput | BaseException) -> None:
        """Hand on an output, or the error that ends the request, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self._take, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            logger.debug("an output came after its event loop had closed")

    async def get(self) -> RequestOutput:
        """Wait for an output and return it; raise the error once there is none before it."""
        await self._filled.wait()
        output, self._output = self._output, None
        if output is None:
            assert self._error is not None, "filled with nothing"
            raise self._error
        if self._error is None:
            self._filled.clear()
        return output

    def _take(self, item: RequestOutput | BaseException) -> None:
        if isinstance(item, BaseException):
            self._error = item
        elif self._output is None:
            self._output = item
        else:
            self._output.add(item, self.joins)
        self._filled.set()


class AsyncLLM:
    """Run a `TextEngine` in a thread of its own. All methods may be called from any thread or loop."""

    def __init__(self, text_engine: TextEngine) -> None:
        self.text_engine = text_engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._preparing: dict[str, _Stream] = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="puna-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Say whether the engine can take requests."""
        return self._error is None and self._thread.is_alive()

    async def generate(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        lora_request: LoRARequest | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request as it grows, last when it has finished.

        What came between two reads comes as one output. An adapter that is not loaded yet is read beside the
        engine's steps.
        Raises ParameterError where `LLMEngine.add` does, EngineDeadError when the engine has died.
        """
        if not self.is_alive:
            raise EngineDeadError(f"the engine has ended: {self._error}")
        joins = params.output_kind is RequestOutputKind.DELTA
        stream = _Stream(asyncio.get_running_loop(), joins)
        if self._preparing.setdefault(request_id, stream) is not stream:
            raise ParameterError(f"a request {request_id!r} is running already")
        try:
            request = await asyncio.to_thread(
                self.text_engine.prepare, prompt, params, lora_request=lora_request
            )
            self._commands.put(lambda: self._add(request_id, stream, request, priority, salt))
        finally:
            del self._preparing[request_id]
        if self._error is not None:  # the thread may have looked for the last time
            self._drain()
        finished = False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._commands.put(lambda: self._drop(request_id, stream))

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its stream raises RequestAborted. Unknown ids are ignored."""
        preparing = self._preparing.get(request_id)
        if preparing is not None:
            preparing.aborted = True
        self._commands.put(lambda: self._drop(request_id, self._streams.get(request_id)))

    def _add(
        self, request_id: str, stream: _Stream, request: PreparedRequest, priority: int, salt: bytes
    ) -> None:
        """Queue a prepared request, in the engine's thread."""
        if self._error is not None:
            stream.put(self._error)
        elif stream.aborted:
            stream.put(RequestAborted(f"request {request_id!r} was aborted"))
        else:
            try:
                self.text_engine.add_prepared(request_id, request, priority=priority, salt=salt)
                self._streams[request_id] = stream
            except Exception as error:  # given to the caller, who asked for it
                stream.put(error)

    def _drop(self, request_id: str, stream: _Stream | None) -> None:
        """Abort a request, if `stream` is still the one that reads it, and wake the reader."""
        if self._error is not None:
            return  # all have ended
        if stream is None or self._streams.get(request_id) is not stream:
            return
        del self._streams[request_id]
        self.text_engine.abort(request_id)
        stream.put(RequestAborted(f"request {request_id!r} was aborted"))

    def shutdown(self) -> None:
        """End the thread after the step it is in; running requests get EngineDeadError, blocks come back."""
        self._commands.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._take_commands():
                if self.text_engine.has_unfinished:
                    self._step()
            for request_id in self._streams:
                self.text_engine.abort(request_id)
            self._fail(EngineDeadError("the engine was shut down"))
        except BaseException as error:
            logger.exception("the engine died")
            self._fail(EngineDeadError(f"the engine died: {error}"))

    def _take_commands(self) -> bool:
        """Do what was asked for since the last step; wait for it when there is nothing to compute."""
        while True:
            try:
                command = self._commands.get(block=not self.text_engine.has_unfinished)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _step(self) -> None:
        for request in self.text_engine.step():
            stream = self._streams.get(request.request_id)
            if stream is None:
                continue
            output = request.snapshot()
            if output.finished:
                del self._streams[request.request_id]
            stream.put(output)

    def _drain(self) -> None:
        """Run what was asked for when the engine had ended; each request learns of it."""
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None:
                command()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._drain()
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()
