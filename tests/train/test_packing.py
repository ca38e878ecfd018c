"""Packs hold everything once and keep examples apart: losses and gradients are those of each alone."""

from __future__ import annotations

import random

import pytest
import torch

from puna.train.encoding import Example
from puna.train.losses import batch_loss
from puna.train.packing import Batch, epoch_order, pack

from tiny import hf_llama, hf_llama4, puna_twin


def example(size: int, seed: int, first_trained: int = 1) -> Example:
    ids = torch.randint(96, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(place="", ids=ids, trained=[index >= first_trained for index in range(size)])


def test_best_fit() -> None:
    assert pack([4, 7, 3, 6, 10], 10) == [[4], [1, 2], [3, 0]]
    assert pack([2, 8, 5, 5], 10) == [[1, 0], [2, 3]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="11 does not fit into 10"):
        pack([11], 10)


def test_every_example_is_in_one_pack_and_none_is_too_full() -> None:
    lengths = random.Random(0).choices(range(1, 41), k=500)
    packs = pack(lengths, 100)
    assert sorted(index for members in packs for index in members) == list(range(500))
    sizes = [sum(lengths[index] for index in members) for members in packs]
    assert max(sizes) <= 100
    assert len(packs) <= -(-sum(lengths) // 100) + 2  # close to what is possible


def test_orders_of_epochs() -> None:
    orders = [epoch_order(50, 3, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[1] == epoch_order(50, 3, 1) != epoch_order(50, 4, 1)


def test_a_batch() -> None:
    first = Example(place="", ids=[5, 6, 7], trained=[False, False, True])
    second = Example(place="", ids=[8, 9], trained=[False, True])
    batch = Batch.of([first, second])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens == [0, 3, 5]
    assert (batch.select.tolist(), batch.targets.tolist()) == ([1, 3], [7, 9])
    assert (batch.num_tokens, batch.num_trained) == (5, 2)


@pytest.mark.parametrize("make", [hf_llama, hf_llama4])
def test_packed_losses_and_gradients_are_those_of_each_alone(make: object) -> None:
    network = puna_twin(make()).requires_grad_()  # type: ignore[operator]
    examples = [example(13, 1), example(20, 2, 9), example(5, 3, 4)]
    alone = sum((batch_loss(network, Batch.of([each])) for each in examples), torch.zeros(()))
    alone.backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    packed = batch_loss(network, Batch.of(examples))
    packed.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)
    assert expected
    for name, parameter in network.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
