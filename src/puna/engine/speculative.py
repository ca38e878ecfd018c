"""Guesses of the next tokens, so that one forward pass can confirm several.

A proposer guesses; the engine computes the guesses together with the last token, draws a token at each
place as ever, and keeps the drawn tokens as long as they equal the guesses. Output is the same as without,
token for token and seed for seed; only the number of passes differs.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from puna.engine.paged_cache import PagedAttention, PagedKVCache, bytes_per_block
from puna.engine.request import Sequence
from puna.engine.scheduler import Batch
from puna.errors import ParameterError
from puna.model.llama import Llama


class Proposer(Protocol):
    """Guess how sequences go on."""

    num_speculative_tokens: int

    def bytes_per_block(self, block_size: int) -> int:
        """Return the memory that the proposer needs beside each block of the engine's cache."""

    def make_cache(self, num_blocks: int, block_size: int) -> None:
        """Take that memory, for an engine with so many blocks; called once."""

    def follow(self, batch: Batch) -> None:
        """Take note of what the engine has just computed."""

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        """Return guesses for each sequence, none or up to its limit; its blocks have room for so many."""

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has ended."""


@dataclass(frozen=True)
class _Row:
    """Tokens that the draft model has not seen yet, from position `first` of a sequence on."""

    sequence: Sequence
    first: int
    token_ids: list[int]


class NgramProposer:
    """Guess that what followed the last tokens before will follow them again (prompt lookup)."""

    def __init__(self, num_speculative_tokens: int, *, lookup_min: int = 2, lookup_max: int = 5) -> None:
        if num_speculative_tokens < 1 or not 1 <= lookup_min <= lookup_max:
            raise ParameterError(
                f"num_speculative_tokens {num_speculative_tokens} must be at least 1, and "
                f"prompt_lookup_min {lookup_min} from 1 to prompt_lookup_max {lookup_max}"
            )
        self.num_speculative_tokens = num_speculative_tokens
        self._sizes = range(lookup_max, lookup_min - 1, -1)
        self._last_seen: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def bytes_per_block(self, block_size: int) -> int:
        """See `Proposer`."""
        return 0

    def make_cache(self, num_blocks: int, block_size: int) -> None:
        """See `Proposer`."""

    def follow(self, batch: Batch) -> None:
        """See `Proposer`."""

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        """See `Proposer`."""
        return [self._lookup(*wanted) for wanted in zip(sequences, limits, strict=True)]

    def forget(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        self._last_seen.pop(id(sequence), None)

    def _lookup(self, sequence: Sequence, limit: int) -> list[int]:
        ids = sequence.token_ids
        first_seen = self._index(sequence)
        for size in self._sizes:
            if len(ids) > size:
                end = first_seen.get(tuple(ids[-size:]))
                if end is not None and end < len(ids):
                    return ids[end : end + limit]
        return []

    def _index(self, sequence: Sequence) -> dict[tuple[int, ...], int]:
        """Return where each run of tokens first ended, brought up to date with the new tokens."""
        done, first_seen = self._last_seen.get(id(sequence), (0, {}))
        ids = sequence.token_ids
        for end in range(done + 1, len(ids)):
            for size in self._sizes:
                if end >= size:
                    first_seen.setdefault(tuple(ids[end - size : end]), end)
        self._last_seen[id(sequence)] = (max(done, len(ids) - 1), first_seen)
        return first_seen


class DraftModelProposer:
    """Let a smaller model with the same vocabulary write ahead, greedily.

    Its keys and values lie in the blocks of the engine's pool, in a cache of its own with as many blocks:
    what shares, copies or reuses a block does so for both models. It reads prompts in the pieces that the
    engine reads. Where a sequence ended before its last guess was computed here, a later owner of the block
    finds one token missing; that costs guesses, never output.
    """

    def __init__(self, model: Llama, num_speculative_tokens: int, *, vocab_size: int) -> None:
        if model.config.vocab_size != vocab_size:
            raise ParameterError(
                f"the draft model's vocabulary of {model.config.vocab_size} is not the model's {vocab_size}"
            )
        if num_speculative_tokens < 1:
            raise ParameterError(f"num_speculative_tokens must be at least 1, got {num_speculative_tokens}")
        self._model = model
        self._dtype = model.model.norm.weight.dtype
        self._device = model.model.norm.weight.device
        self._cache: PagedKVCache | None = None
        self.num_speculative_tokens = num_speculative_tokens

    def bytes_per_block(self, block_size: int) -> int:
        """See `Proposer`."""
        return bytes_per_block(self._model.config, block_size, self._dtype)

    def make_cache(self, num_blocks: int, block_size: int) -> None:
        """See `Proposer`."""
        self._cache = PagedKVCache(
            self._model.config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=self._dtype,
            device=self._device,
        )

    def follow(self, batch: Batch) -> None:
        """See `Proposer`. What decodes is caught up with when guessing, unless it is a block behind."""
        assert self._cache is not None, "follow before make_cache"
        self._cache.copy_blocks(batch.copies)
        rows: list[_Row] = []
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            first = sequence.num_draft_computed
            decodes = sequence.num_output > 0 and sequence.num_computed == sequence.num_tokens - 1
            if decodes and sequence.num_computed - first < self._cache.block_size:
                continue
            end = min(sequence.num_computed + count, sequence.num_tokens, self._model.config.context_length)
            if first < end:
                rows.append(_Row(sequence, first, sequence.token_ids[first:end]))
        if rows:
            self._compute(rows, [])

    def propose(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[list[int]]:
        """See `Proposer`; all sequences go through the draft model together."""
        guesses: list[list[int]] = [[] for _ in sequences]
        longest = self._model.config.context_length
        for sequence in sequences:
            # The token that was drawn last has not been seen here, whatever was guessed.
            sequence.num_draft_computed = min(sequence.num_draft_computed, sequence.num_tokens - 1)
        for place in range(max(limits, default=0)):
            rows, writing = [], []
            for sequence, limit, found in zip(sequences, limits, guesses, strict=True):
                if place < min(limit, longest - sequence.num_tokens):
                    first = sequence.num_draft_computed
                    behind = sequence.token_ids[first:] + found[max(first - sequence.num_tokens, 0) :]
                    rows.append(_Row(sequence, first, behind))
                    writing.append(found)
            if not rows:
                break
            ends = list(accumulate(len(row.token_ids) for row in rows))
            hidden = self._compute(rows, [end - 1 for end in ends])
            best = self._model.logits(hidden).argmax(dim=-1).tolist()
            for found, token_id in zip(writing, best, strict=True):
                found.append(token_id)
        return guesses

    def forget(self, sequence: Sequence) -> None:
        """See `Proposer`: the blocks are the scheduler's."""

    def _compute(self, rows: SequenceOf[_Row], select: list[int]) -> Tensor:
        """Compute keys and values of the rows; return the hidden states of the selected tokens."""
        assert self._cache is not None, "propose before make_cache"
        ids = [token_id for row in rows for token_id in row.token_ids]
        positions = [p for row in rows for p in range(row.first, row.first + len(row.token_ids))]
        attention = PagedAttention(
            self._cache,
            [row.sequence.block_table for row in rows],
            [row.first for row in rows],
            [len(row.token_ids) for row in rows],
            [len(row.sequence.prompt_ids) for row in rows],
        )
        hidden: Tensor = self._model.hidden_states(
            torch.tensor(ids, device=self._device),
            torch.tensor(positions, device=self._device),
            attention,
            torch.tensor(select, dtype=torch.long, device=self._device),
        )
        for row in rows:
            row.sequence.num_draft_computed = row.first + len(row.token_ids)
        return hidden
