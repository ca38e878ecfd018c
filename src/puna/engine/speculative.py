"""Guesses of the next tokens, so that one forward pass can confirm several.

A proposer guesses; the engine computes the guesses together with the last token, draws a token at each
place as ever, and keeps the drawn tokens as long as they equal the guesses. Output is the same as without,
token for token and seed for seed; only the number of passes differs.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch

from puna.engine.kv_cache import CachedAttention, KVCache
from puna.engine.request import Sequence
from puna.errors import ParameterError
from puna.model.llama import Llama


class Proposer(Protocol):
    """Guess how sequences go on."""

    def propose(self, sequences: SequenceOf[Sequence]) -> list[list[int]]:
        """Return guesses for each sequence, which may be none."""

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has ended."""


class NgramProposer:
    """Guess that what followed the last tokens before will follow them again (prompt lookup)."""

    def __init__(self, num_speculative_tokens: int, *, lookup_min: int = 2, lookup_max: int = 5) -> None:
        if num_speculative_tokens < 1 or not 1 <= lookup_min <= lookup_max:
            raise ParameterError(
                f"num_speculative_tokens {num_speculative_tokens} must be at least 1, and "
                f"prompt_lookup_min {lookup_min} from 1 to prompt_lookup_max {lookup_max}"
            )
        self._count = num_speculative_tokens
        self._sizes = range(lookup_max, lookup_min - 1, -1)
        self._last_seen: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, sequences: SequenceOf[Sequence]) -> list[list[int]]:
        """See `Proposer`."""
        return [self._lookup(sequence) for sequence in sequences]

    def forget(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        self._last_seen.pop(id(sequence), None)

    def _lookup(self, sequence: Sequence) -> list[int]:
        ids = sequence.token_ids
        first_seen = self._index(sequence)
        for size in self._sizes:
            if len(ids) > size:
                end = first_seen.get(tuple(ids[-size:]))
                if end is not None and end < len(ids):
                    return ids[end : end + self._count]
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
    """Let a smaller model with the same vocabulary write ahead, greedily."""

    def __init__(self, model: Llama, num_speculative_tokens: int, *, vocab_size: int) -> None:
        if model.config.vocab_size != vocab_size:
            raise ParameterError(
                f"the draft model's vocabulary of {model.config.vocab_size} is not the model's {vocab_size}"
            )
        if num_speculative_tokens < 1:
            raise ParameterError(f"num_speculative_tokens must be at least 1, got {num_speculative_tokens}")
        self._model = model
        self._count = num_speculative_tokens
        self._caches: dict[int, KVCache] = {}

    def propose(self, sequences: SequenceOf[Sequence]) -> list[list[int]]:
        """See `Proposer`; all sequences go through the draft model together."""
        longest = self._model.config.context_length
        able = [s for s in sequences if s.num_tokens + self._count < longest]
        texts = [list(sequence.token_ids) for sequence in able]
        caches = [self._cache_of(sequence) for sequence in able]
        for cache, text in zip(caches, texts, strict=True):
            cache.keep_prefix(text)
        for _ in range(self._count if able else 0):
            for text, token_id in zip(texts, self._next(caches, texts), strict=True):
                text.append(token_id)
        guesses = {id(s): text[s.num_tokens :] for s, text in zip(able, texts, strict=True)}
        return [guesses.get(id(sequence), []) for sequence in sequences]

    def forget(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        self._caches.pop(id(sequence), None)

    def _cache_of(self, sequence: Sequence) -> KVCache:
        weight = self._model.model.norm.weight
        if id(sequence) not in self._caches:
            self._caches[id(sequence)] = KVCache(self._model.config, dtype=weight.dtype, device=weight.device)
        return self._caches[id(sequence)]

    def _next(self, caches: list[KVCache], texts: list[list[int]]) -> list[int]:
        """Return the likeliest next id of each text, computing what its cache does not hold."""
        device = self._model.model.norm.weight.device
        parts = [text[cache.length :] for cache, text in zip(caches, texts, strict=True)]
        ids = [token_id for part in parts for token_id in part]
        positions = [
            p for c, part in zip(caches, parts, strict=True) for p in range(c.length, c.length + len(part))
        ]
        ends = torch.tensor([len(part) for part in parts], device=device).cumsum(0) - 1
        attention = CachedAttention(caches, [len(part) for part in parts])
        logits = self._model(
            torch.tensor(ids, device=device), torch.tensor(positions, device=device), attention, ends
        )
        attention.advance(ids)
        best: list[int] = logits.argmax(dim=-1).tolist()
        return best
