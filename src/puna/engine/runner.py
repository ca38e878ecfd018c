"""One forward pass over a batch: flat ids and positions in, hidden states out.

The model is not changed for serving: it gets a `PagedAttention` that knows where each sequence's blocks are.
Logits are computed for few rows at a time, since a row is as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from puna.engine.compiled_decoder import CompiledDecoder
from puna.engine.paged_cache import PagedAttention, PagedKVCache
from puna.engine.request import Sequence
from puna.engine.scheduler import Batch
from puna.model.llama import Llama

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
        if self._decoder is not None and self._decoder.takes(attention, len(input_ids)):
            return self._decoder.hidden_states(input_ids, positions, attention, select)
        return self.model.hidden_states(input_ids, positions, attention, select)

    def logits(self, hidden: SequenceOf[Tensor]) -> Iterator[Tensor]:
        """Yield the logits (vocab,) of each row, in order."""
        rows = torch.cat(list(hidden))
        for start in range(0, len(rows), _LOGIT_ROWS):
            yield from self.model.logits(rows[start : start + _LOGIT_ROWS])

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
