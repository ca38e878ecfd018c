"""One request while it runs: its ids, its cache, its random numbers, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Literal

from puna.engine.kv_cache import KVCache
from puna.engine.sampling import SamplingParams, make_generator

FinishReason = Literal["stop", "length"]


class Sequence:
    """Hold a prompt, what was generated so far, and the rules to go on by."""

    def __init__(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, cache: KVCache, *, max_model_len: int
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.output_ids: list[int] = []
        self.params = params
        self.cache = cache
        self.generator = make_generator(params.seed)
        self.finish_reason: FinishReason | None = None
        room = max_model_len - len(self.prompt_ids)
        self.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)

    @property
    def token_ids(self) -> list[int]:
        """Return prompt and output as one list."""
        return self.prompt_ids + self.output_ids

    def append(self, token_id: int) -> None:
        """Take a new token, and end the sequence if it is a stop id or the last one allowed."""
        self.output_ids.append(token_id)
        if token_id in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.max_tokens:
            self.finish_reason = "length"
