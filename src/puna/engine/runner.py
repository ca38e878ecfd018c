"""One forward pass over a batch: flat ids and positions in, hidden states out.

The model is not changed for serving: it gets a `PagedAttention` that knows where each sequence's blocks are.
Logits are computed for few rows at a time, since a row is as wide as the vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from puna.engine.compiled_decoder import CompiledDecoder
from puna.engine.paged_cache import PagedAttention, PagedKVCache
from puna.engine.request import Sequence
from puna.engine.scheduler import Batch
from puna.model.llama import Llama
from puna.model.lora_serving import ServedAdapter, install, rows_of

_LOGIT_ROWS = 128


class Runner:
    """Run the model over the batches of a scheduler."""

    def __init__(
        self, model: Llama, cache: PagedKVCache, follow: Callable[[Batch], None] | None = None
    ) -> None:
        """Take what must be told of every batch, before its tokens count as computed."""
        self.model = model
        self.cache = cache
        self.follow = follow
        self.device = model.model.norm.weight.device
        self._decoder = CompiledDecoder.of(model)
        self._rows, self._head_rows = rows_of(model)
        self._installed: weakref.WeakSet[ServedAdapter] = weakref.WeakSet()

    def run(self, batch: Batch) -> list[Tensor]:
        """Compute a batch; return for each sequence the hidden states that are needed, (rows, hidden).

        These are: of every new token of the prompt where prompt_logprobs are wanted, else of the last tokens
        from which a token may be drawn (one, or one more than there are drafts), none within a prompt.
        """
        self.cache.copy_blocks(batch.copies)
        ids: list[int] = []
        positions: list[int] = []
        select: list[int] = []
        rows: list[int] = []
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            start = sequence.num_computed
            end = start + count
            known = [*sequence.token_ids[start:end], *sequence.drafts[: max(end - sequence.num_tokens, 0)]]
            needed = rows_needed(sequence, count)
            ids.extend(known)
            positions.extend(range(start, end))
            select.extend(range(len(ids) - needed, len(ids)))
            rows.append(needed)
        with self.adapted([sequence.adapter for sequence in batch.sequences], batch.counts):
            hidden = self._hidden_states(
                torch.tensor(ids, device=self.device),
                torch.tensor(positions, device=self.device),
                self._attention(batch),
                torch.tensor(select, dtype=torch.long, device=self.device),
            )
        if self.follow is not None:
            self.follow(batch)
        return list(hidden.split(rows))  # type: ignore[no-untyped-call]

    def _hidden_states(
        self, input_ids: Tensor, positions: Tensor, attention: PagedAttention, select: Tensor
    ) -> Tensor:
        """Compute by the compiled decoder where it can stand for the model's modules, else by these."""
        decoder = None if self._rows.groups else self._decoder  # it knows no adapters
        if decoder is not None and decoder.takes(attention, len(input_ids)):
            return decoder.hidden_states(input_ids, positions, attention, select)
        return self.model.hidden_states(input_ids, positions, attention, select)

    def logits(self, batch: Batch, hidden: SequenceOf[Tensor]) -> Iterator[Tensor]:
        """Yield the logits (vocab,) of each row that `run` returned, in order."""
        rows = torch.cat(list(hidden))
        adapters = [
            sequence.adapter
            for sequence, states in zip(batch.sequences, hidden, strict=True)
            for _ in range(len(states))
        ]
        for start in range(0, len(rows), _LOGIT_ROWS):
            part = rows[start : start + _LOGIT_ROWS]
            with self._head_rows.of(adapters[start : start + _LOGIT_ROWS], [1] * len(part), self.device):
                logits = self.model.logits(part)
            yield from logits

    def adapted(
        self, adapters: SequenceOf[ServedAdapter | None], counts: SequenceOf[int]
    ) -> AbstractContextManager[None]:
        """Give the rows of passes within the block their adapters, counts[0] to adapters[0], and so on."""
        for adapter in adapters:
            if adapter is not None and adapter not in self._installed:
                install(self.model, adapter, self._rows, self._head_rows)
                self._installed.add(adapter)
        return self._rows.of(adapters, counts, self.device)

    def _attention(self, batch: Batch) -> PagedAttention:
        tables = [sequence.block_table for sequence in batch.sequences]
        starts = [sequence.num_computed for sequence in batch.sequences]
        prompts = [len(sequence.prompt_ids) for sequence in batch.sequences]
        return PagedAttention(self.cache, tables, starts, batch.counts, prompts)


def rows_needed(sequence: Sequence, count: int) -> int:
    """Return of how many of the `count` new tokens, from the last back, the hidden state is needed."""
    end = sequence.num_computed + count
    if sequence.params.prompt_logprobs is not None and sequence.num_computed < len(sequence.prompt_ids):
        return count
    return max(end - sequence.num_tokens + 1, 0)
