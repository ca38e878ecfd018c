"""Eight-bit weights against bitsandbytes: integers, scales, values."""

from __future__ import annotations

import pytest
import torch

from puna.weights.int8 import Int8Linear, Int8Tensor, quantize_int8, swap_in_int8

from tiny import hf_llama, puna_twin

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of bitsandbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_bitsandbytes(dtype: torch.dtype) -> None:
    weight = torch.randn(37, 83, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[5] = 0
    data, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    ours = quantize_int8(weight)
    assert torch.equal(ours.data, data)
    assert torch.equal(ours.absmax, absmax)
    assert torch.equal(ours.dequantize(), functional.int8_vectorwise_dequant(data, absmax))


def test_linear() -> None:
    generator = torch.Generator().manual_seed(1)
    packed = quantize_int8(torch.randn(12, 20, generator=generator))
    linear = Int8Linear(packed, torch.nn.Parameter(torch.ones(12)))
    x = torch.randn(3, 20, generator=generator, requires_grad=True)
    whole = packed.dequantize()
    torch.testing.assert_close(linear(x), x @ whole.T + 1)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, whole.sum(dim=0).expand(3, -1))
    assert torch.equal(linear.bfloat16().quantized.dequantize(), whole)


def test_a_model_keeps_its_head() -> None:
    network = puna_twin(hf_llama())
    assert len(swap_in_int8(network)) == 14
    assert isinstance(network.lm_head, torch.nn.Linear)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="matrix"):
        quantize_int8(torch.ones(3))
    parts = {"weight": torch.ones(2, 4, dtype=torch.int8), "SCB": torch.ones(3)}
    with pytest.raises(ValueError, match="SCB"):
        Int8Tensor.from_saved(parts, torch.Size((2, 4)))
    layout = {"SCB": torch.ones(2), "weight_format": torch.tensor(1, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="weight_format"):
        Int8Tensor.from_saved(parts | layout, torch.Size((2, 4)))
