"""What a sequence keeps while it grows: its output, and the counts of its ids."""

from __future__ import annotations

import torch

from puna.engine.request import Sequence
from puna.engine.sampling import SamplingParams


def test_the_output_follows_the_tokens() -> None:
    sequence = Sequence("a", [7, 8], SamplingParams(), max_tokens=9)
    assert sequence.output_ids == []
    for token_id in (1, 2, 3):
        sequence.append(token_id)
    assert sequence.output_ids == [1, 2, 3]
    child = sequence.fork(1)
    child.append(5)
    sequence.append(4)
    assert (sequence.output_ids, child.output_ids) == ([1, 2, 3, 4], [1, 2, 3, 5])
    del sequence.token_ids[4:]
    assert sequence.output_ids == [1, 2]


def test_ids_are_counted_once_each_as_they_come() -> None:
    device = torch.device("cpu")
    sequence = Sequence("a", [1, 1, 9], SamplingParams(), max_tokens=9)
    counts = sequence.counts(5, device)  # id 9 is of a padded vocabulary
    assert counts.prompt.tolist() == [0, 2, 0, 0, 0] and counts.output.tolist() == [0] * 5
    for token_id in (3, 1, 3):
        sequence.append(token_id)
    assert sequence.counts(5, device).output.tolist() == [0, 1, 0, 2, 0]
    child = sequence.fork(1)
    child.append(4)
    assert child.counts(5, device).output.tolist() == [0, 1, 0, 2, 1]
    assert sequence.counts(5, device).output.tolist() == [0, 1, 0, 2, 0]
