"""A request and its sequences while they run: ids, blocks, random numbers, times, and why each ended.

A request has one sequence per answer asked for (`n`). They share the blocks of the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from puna.engine.block_pool import BlockHash, hash_block
from puna.engine.sampling import SamplingParams
from puna.model.lora_serving import ServedAdapter

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]


class Grammar(Protocol):
    """Say which tokens may come next, for one sequence; `puna.text.grammar` has them."""

    @property
    def is_complete(self) -> bool:
        """Say whether nothing can follow but the end."""

    @property
    def error(self) -> str:
        """Return why the grammar gave up, or an empty string."""

    def prepare(self) -> None:
        """Begin to work out `allowed`, beside the forward pass."""

    def allowed_bits(self) -> bytes:
        """Return a bit field, lowest bit first, of the ids that may come next."""

    def accept(self, token_id: int) -> None:
        """Go on by one token."""

    def fork(self) -> Grammar:
        """Return an independent copy at the same place."""


@dataclass
class RequestTimes:
    """Monotonic seconds of what happened to a request; None until it did."""

    arrived: float = field(default_factory=time.monotonic)
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None


@dataclass
class Logprobs:
    """Log-probabilities at one position: ids with value and rank, the chosen token first."""

    token_ids: list[int]
    values: list[float]
    ranks: list[int]


class TokenCounts:
    """How often each id occurs in the prompt and in the output, (vocab,) each, for penalties.

    Kept while a sequence grows: what a step costs does not depend on how much was said before.
    """

    def __init__(self, prompt_ids: SequenceOf[int], vocab_size: int, device: torch.device) -> None:
        kept = torch.tensor([i for i in prompt_ids if i < vocab_size], dtype=torch.long)  # it may be padded
        self.prompt = torch.bincount(kept, minlength=vocab_size).to(device)
        self.output = torch.zeros(vocab_size, dtype=torch.long, device=device)
        self._counted = 0

    def update(self, output_ids: SequenceOf[int]) -> None:
        """Count the ids behind those counted before."""
        new = torch.tensor(output_ids[self._counted :], dtype=torch.long)
        if len(new):
            self.output += torch.bincount(new, minlength=len(self.output)).to(self.output.device)
            self._counted = len(output_ids)


class Sequence:
    """One answer in the making. `num_computed` tokens of it have their keys and values in `block_table`."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        index: int = 0,
        max_tokens: int,
        end_ids: frozenset[int] = frozenset(),
        priority: int = 0,
        salt: bytes = b"",
        grammar: Grammar | None = None,
        adapter: ServedAdapter | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.prompt_ids = list(prompt_ids)
        self.token_ids = list(prompt_ids)
        self._output_ids: list[int] = []
        self._counts: TokenCounts | None = None
        self.params = params
        self.max_tokens = max_tokens
        self.end_ids = end_ids  # end an answer without being a stop reason of the user's
        self.priority = priority
        self.salt = salt
        self.grammar = grammar
        self.adapter = adapter
        self.passed_over: float | None = None  # when another that came later first went before it
        self.generator = _generator(params, index)
        self.times = RequestTimes()
        self.block_table: list[int] = []
        self.block_hashes: list[BlockHash] = []  # of the full blocks, as far as they were needed
        self.num_computed = 0
        self.num_remembered = 0  # full blocks that the pool can find by hash
        self.num_cached = 0  # of the prompt, found in the prefix cache when first scheduled
        self.num_preemptions = 0
        self.drafts: list[int] = []  # guesses behind token_ids, to be verified
        self.num_draft_computed = 0  # tokens whose keys and values the draft model has in the same blocks
        self.pending_forks = params.n - 1 if index == 0 else 0
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of prompt and output."""
        return len(self.token_ids)

    @property
    def output_ids(self) -> list[int]:
        """Return what was generated so far: one list that grows with the sequence, so copy it to keep it."""
        new = self.num_output - len(self._output_ids)
        if new > 0:
            self._output_ids.extend(self.token_ids[-new:])
        elif new < 0:  # a stop string was found in what an earlier token began
            del self._output_ids[new:]
        return self._output_ids

    @property
    def num_output(self) -> int:
        """Return how many tokens were generated so far."""
        return len(self.token_ids) - len(self.prompt_ids)

    def counts(self, vocab_size: int, device: torch.device) -> TokenCounts:
        """Return how often each id below `vocab_size` occurs, brought up to date with the new tokens."""
        if self._counts is None:
            self._counts = TokenCounts(self.prompt_ids, vocab_size, device)
        self._counts.update(self.output_ids)
        return self._counts

    def append(self, token_id: int) -> None:
        """Take a new token, and end the sequence if it is a stop id or the last one allowed."""
        self.token_ids.append(token_id)
        self.times.last_token = time.monotonic()
        repetition = self.params.repetition_detection
        if self.grammar is not None:
            self.grammar.accept(token_id)
        if token_id in self.end_ids:
            self.finish_reason = "stop"
        elif token_id in (self.params.stop_token_ids or ()):
            self.finish_reason, self.stop_reason = "stop", token_id
        elif self.grammar is not None and self.grammar.error:
            self.finish_reason = "error"
        elif self.grammar is not None and self.grammar.is_complete and not self.end_ids:
            self.finish_reason = "stop"
        elif self.num_output >= self.max_tokens:
            self.finish_reason = "length"
        elif repetition is not None and repetition.repeats(self.output_ids):
            self.finish_reason = "repetition"

    def hashes(self, block_size: int, count: int) -> list[BlockHash]:
        """Return the hashes of the first `count` blocks, which must be full."""
        while len(self.block_hashes) < count:
            first = len(self.block_hashes) * block_size
            parent = self.block_hashes[-1] if self.block_hashes else b""
            ids = self.token_ids[first : first + block_size]
            salt = self.salt if self.adapter is None else self.adapter.key + self.salt
            self.block_hashes.append(hash_block(parent, ids, salt))
        return self.block_hashes[:count]

    def fork(self, index: int) -> Sequence:
        """Return a copy that shares the blocks (the caller counts the holders) and draws its own numbers."""
        child = Sequence(
            self.request_id,
            self.prompt_ids,
            self.params,
            index=index,
            max_tokens=self.max_tokens,
            end_ids=self.end_ids,
            priority=self.priority,
            salt=self.salt,
            grammar=self.grammar.fork() if self.grammar is not None else None,
            adapter=self.adapter,
        )
        child.token_ids = list(self.token_ids)
        child.times = RequestTimes(self.times.arrived, self.times.scheduled)
        child.block_table = list(self.block_table)
        child.block_hashes = list(self.block_hashes)
        child.num_computed, child.num_cached = self.num_computed, self.num_cached
        child.num_remembered, child.num_draft_computed = self.num_remembered, self.num_draft_computed
        child.logprobs, child.prompt_logprobs = list(self.logprobs), self.prompt_logprobs
        return child


def _generator(params: SamplingParams, index: int) -> torch.Generator:
    """Return the sequence's own random numbers, seeded from the system where no seed is given."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed((params.seed + index) % 2**64)
    return generator
