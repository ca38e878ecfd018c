"""Put examples into rows of tokens without padding: which go together, and what the model is given.

Best fit, longest first: an example goes where it leaves the least room. An example is never cut, and
attention ends at its borders (`PackedAttention`), where positions begin again, so a packed batch has exactly
the losses of its examples alone. The order of an epoch follows from seed and epoch: nothing needs to be
stored to go on.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puna.model.attention import PackedAttention
from puna.train.encoding import Example


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return packs of indices whose lengths add up to at most `capacity`, by best fit, longest first.

    Raises ValueError for a length that does not fit alone.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, index of the pack), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a length of {length} does not fit into {capacity}")
        place = bisect.bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(index)
        bisect.insort(rooms, (room - length, number))
    return packs


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Return the order in which packs come in an epoch: another one for each."""
    generator = torch.Generator().manual_seed(abs(seed * 1_000_003 + epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Hold several examples as one row of tokens, and what shall be predicted where."""

    input_ids: Tensor  # (tokens,)
    positions: Tensor  # (tokens,), from 0 on for each example
    cu_seqlens: list[int]
    select: Tensor  # (trained,): the places that predict a trained token
    targets: Tensor  # (trained,): those tokens
    owners: Tensor  # (trained,): which example each belongs to
    labels: Sequence[bool] = ()  # of KTO: which examples have a desirable answer

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Batch:
        """Put examples into one row."""
        ids: list[int] = []
        positions: list[int] = []
        select: list[int] = []
        owners: list[int] = []
        borders = [0]
        for number, example in enumerate(examples):
            start = len(ids)
            owners += [number] * example.num_trained
            select += [start + index - 1 for index, trained in enumerate(example.trained) if trained]
            ids += example.ids
            positions += range(len(example.ids))
            borders.append(len(ids))
        row = torch.tensor(ids)
        chosen = torch.tensor(select, dtype=torch.long)
        return cls(
            input_ids=row,
            positions=torch.tensor(positions),
            cu_seqlens=borders,
            select=chosen,
            targets=row[chosen + 1],
            owners=torch.tensor(owners, dtype=torch.long),
            labels=[example.label for example in examples if example.label is not None],
        )

    @property
    def num_tokens(self) -> int:
        """Count all tokens."""
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """Count the tokens that the loss is taken over."""
        return len(self.targets)

    @property
    def num_examples(self) -> int:
        """Count the examples."""
        return len(self.cu_seqlens) - 1

    @property
    def attention(self) -> PackedAttention:
        """Return what keeps the examples apart."""
        return PackedAttention(self.cu_seqlens)

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            positions=self.positions.to(device),
            select=self.select.to(device),
            targets=self.targets.to(device),
            owners=self.owners.to(device),
        )


def mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Give each prompt the answer of the example before it, and the first one that of the last.

    As TRL pairs them to measure how far a model has moved; cut to `max_length` tokens.
    """
    found = []
    for index, example in enumerate(examples):
        other = examples[index - 1]
        prompt, answer = _answer_start(example), _answer_start(other)
        ids = [*example.ids[:prompt], *other.ids[answer:]]
        trained = [*([False] * prompt), *other.trained[answer:]]
        found.append(replace(example, ids=ids[:max_length], trained=trained[:max_length]))
    return found


def _answer_start(example: Example) -> int:
    return list(example.trained).index(True)
