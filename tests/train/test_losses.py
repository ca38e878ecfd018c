"""Chunked cross entropy equals the whole one: its value, and the gradients of everything that it reaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from puna.gguf_header import GGMLType
from puna.model.llama import Llama
from puna.model.lora_config import LoraConfig
from puna.peft_model import get_peft_model
from puna.train.losses import chunked_cross_entropy
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quant import swap_in

from tiny import hf_llama, puna_twin

ROWS = 37


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(ROWS, 64, generator=generator).requires_grad_()
    return hidden, torch.randint(96, (ROWS,), generator=generator)


def network_with(head: str) -> Llama:
    tied = head.startswith("tied")
    network = puna_twin(hf_llama(tie_word_embeddings=tied))
    if head in ("whole", "tied"):
        return network.requires_grad_()
    targets = ["embed_tokens", "q_proj"] if head == "tied embedding lora" else ["lm_head", "q_proj"]
    torch.manual_seed(0)
    get_peft_model(
        network, LoraConfig(r=3, target_modules=targets, init_lora_weights=False, use_dora="dora" in head)
    )
    return network


@pytest.mark.parametrize("head", ["whole", "tied", "lora", "lora dora", "tied lora", "tied embedding lora"])
@pytest.mark.parametrize("chunk_rows", [1, 8, 36, 37, 100])
def test_it_equals_the_whole_cross_entropy(head: str, chunk_rows: int) -> None:
    network = network_with(head)
    hidden, targets = inputs()
    whole = functional.cross_entropy(network.logits(hidden), targets, reduction="sum")
    (0.25 * whole).backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    grad, hidden.grad = hidden.grad, None
    network.zero_grad()
    loss = chunked_cross_entropy(network, hidden, targets, chunk_rows=chunk_rows)
    (0.25 * loss).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad, grad, rtol=1e-5, atol=1e-6)
    assert expected or head == "tied embedding lora"
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_frozen_head_and_no_gradients() -> None:
    network = puna_twin(hf_llama())
    hidden, targets = inputs()
    whole = functional.cross_entropy(network.logits(hidden), targets, reduction="sum")
    loss = chunked_cross_entropy(network, hidden, targets, chunk_rows=8)
    loss.backward()  # type: ignore[no-untyped-call]
    (expected,) = torch.autograd.grad(whole, hidden)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        again = chunked_cross_entropy(network, hidden, targets, chunk_rows=8)
    assert not again.requires_grad
    torch.testing.assert_close(again, whole, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("reference_kernels")
def test_a_quantised_head() -> None:
    network = puna_twin(hf_llama())
    rows = torch.randint(256, (96, 2 * 34), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    rows[:, ::34], rows[:, 1::34] = 0, 20  # the float16 scale of a block
    swap_in(network, "lm_head.weight", QuantTensor(rows, GGMLType.Q8_0))
    hidden, targets = inputs()
    whole = functional.cross_entropy(network.logits(hidden), targets, reduction="sum")
    loss = chunked_cross_entropy(network, hidden, targets, chunk_rows=8)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    loss.backward()  # type: ignore[no-untyped-call]
    (expected,) = torch.autograd.grad(whole, hidden)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-6)


class _LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the largest result of any operation, in values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_logits_are_never_whole() -> None:
    network = puna_twin(hf_llama(vocab_size=1000))
    hidden = torch.randn(200, 64, requires_grad=True)
    with _LargestTensor() as largest:
        loss = chunked_cross_entropy(network, hidden, torch.zeros(200, dtype=torch.long), chunk_rows=4)
        loss.backward()  # type: ignore[no-untyped-call]
    assert largest.numel == 64 * 1000  # the weight; all logits are 200 * 1000
