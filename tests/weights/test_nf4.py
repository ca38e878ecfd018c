"""Four-bit weights against bitsandbytes: bytes, scales, nested state, values, saved tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from puna.errors import ParameterError, UnsupportedError
from puna.weights.nf4 import (
    FourBitLinear,
    FourBitTensor,
    QuantType,
    dynamic_code,
    four_bit_code,
    quantize_4bit,
)

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of bitsandbytes and of torch's compiler


def weights(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def theirs(weight: Tensor, kind: str, double: bool, size: int = 64) -> tuple[Tensor, Any]:
    packed, state = functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=double, blocksize=size
    )
    return packed, state


def zeros_and_ties() -> Tensor:
    """Make a block of zeros, and one of values just between two codes."""
    code = torch.sort(four_bit_code("nf4")).values
    ties = torch.cat(((code[:-1] + code[1:]) / 2, torch.ones(49)))
    return torch.stack((torch.zeros(64), ties, -ties))


CASES = {
    "whole blocks": weights(torch.float32, 64, 128),
    "many blocks": weights(torch.float32, 300, 128),
    "a rest": weights(torch.float32, 6, 100),
    "odd": weights(torch.float32, 7, 33),
    "bfloat16": weights(torch.bfloat16, 32, 96),
    "float16": weights(torch.float16, 32, 96),
    "zeros and ties": zeros_and_ties(),
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", CASES)
def test_equals_bitsandbytes(name: str, kind: QuantType, double: bool) -> None:
    weight = CASES[name]
    packed, state = theirs(weight, kind, double)
    ours = quantize_4bit(weight, quant_type=kind, double=double)
    assert torch.equal(ours.data, packed)
    assert torch.equal(ours.absmax, state.absmax)
    saved = ours.saved_tensors()
    expected = state.as_dict(packed=True)
    assert saved.keys() == {"", *(f".{key}" for key in expected)}
    for key, value in expected.items():
        assert torch.equal(saved[f".{key}"], value), key
    values = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(ours.dequantize(weight.dtype), values, atol=0, rtol=2**-22)
    read = FourBitTensor.from_saved({"": packed, **{f".{key}": value for key, value in expected.items()}})
    assert torch.equal(read.dequantize(), ours.dequantize())


def test_codes() -> None:
    assert torch.equal(dynamic_code(), functional.create_dynamic_map())
    for kind in ("nf4", "fp4"):
        assert torch.equal(four_bit_code(kind), functional.get_4bit_type(kind, device="cpu"))


def test_linear() -> None:
    weight, x = weights(torch.float32, 48, 64), weights(torch.float32, 5, 64).requires_grad_()
    bias = torch.nn.Parameter(torch.ones(48))
    linear = FourBitLinear(quantize_4bit(weight), bias)
    whole = linear.quantized.dequantize()
    expected = torch.nn.functional.linear(x, whole, bias)
    torch.testing.assert_close(linear(x), expected)
    linear(x).square().sum().backward()
    got, x.grad = x.grad, None
    expected.square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(got, x.grad)
    assert torch.equal(linear.bfloat16().quantized.dequantize(), whole)


def test_refusals() -> None:
    with pytest.raises(ParameterError, match="48"):
        quantize_4bit(torch.ones(4, 4), block_size=48)
    with pytest.raises(UnsupportedError, match="af4"):
        quantize_4bit(torch.ones(4, 4), quant_type="af4")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="quant_state"):
        FourBitTensor.from_saved({"": torch.ones(4, 1, dtype=torch.uint8)})
