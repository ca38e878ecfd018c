"""Products with frozen weights against float64, forward and backward, dense and packed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from puna.gguf_header import GGMLType
from puna.kernels import frozen_linear as module
from puna.kernels.dense_linear import linear
from puna.kernels.frozen_linear import DenseRows, frozen_linear
from puna.weights.dequantize import dequantize
from puna.weights.nf4 import FourBitTensor, dynamic_code, four_bit_code, quantize_4bit
from puna.weights.packed_matrix import PackedMatrix, QuantTensor

cpu = pytest.importorskip(
    "puna.kernels.cpu", reason="the compiled kernels were not built", exc_type=ImportError
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_both_directions_are_those_of_the_float64_product(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_VALUES", 5 * 19)  # several blocks, the last one smaller
    weight, x = draw(rows, 19).to(dtype), draw(2, 3, 19, seed=1).requires_grad_()
    out = frozen_linear(x, DenseRows(weight))
    grad = draw(2, 3, rows, seed=2)
    out.backward(grad)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, (grad.double() @ weight.double()).float(), rtol=1e-5, atol=1e-5)


def test_sixteen_bit_activations_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_native", lambda dtype: dtype == torch.float32)
    weight, x = draw(8, 600).bfloat16(), draw(4, 600, seed=1).bfloat16().requires_grad_()
    out = frozen_linear(x, DenseRows(weight))
    exact = x.double() @ weight.double().T
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= exact.abs() / 256 + 1e-4).all()
    out.backward(out.detach())  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_a_linear_layer_takes_wide_activations() -> None:
    weight, bias = draw(6, 10).bfloat16(), draw(6, seed=3).bfloat16()
    x = draw(4, 10, seed=1).requires_grad_()
    out = linear(x, weight, bias)
    torch.testing.assert_close(out, x @ weight.float().T + bias.float(), rtol=1e-5, atol=1e-5)
    out.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)
    trained = weight.clone().requires_grad_()
    linear(x.detach(), trained).sum().backward()  # type: ignore[no-untyped-call]
    assert trained.grad is not None and trained.grad.dtype == torch.bfloat16
    torch.testing.assert_close(trained.grad.float()[0], x.detach().sum(0), rtol=1e-2, atol=1e-2)


def test_nothing_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = draw(4, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frozen_linear(x, DenseRows(draw(8, 64).bfloat16()))
        frozen_linear(x, quantize_4bit(draw(8, 64)))
    assert kept == []


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (130, 192), (5, 31), (1, 1), (37, 100)])
def test_four_bit_rows_are_those_of_the_twin(quant_type: str, double: bool, shape: tuple[int, int]) -> None:
    packed = quantize_4bit(draw(*shape), quant_type=quant_type, double=double)  # type: ignore[arg-type]
    expected = packed._values(0, math.prod(shape)).view(shape)
    found = packed.dequantize()
    assert torch.equal(found, expected)
    for start, count in ((0, 1), (shape[0] - 1, 1), (0, shape[0]), (shape[0] // 2, shape[0] - shape[0] // 2)):
        out = torch.full((count, shape[1]), math.nan)
        packed.write_rows(start, out)
        assert torch.equal(out, expected[start : start + count])
        halves = torch.empty(count, shape[1], dtype=torch.bfloat16)
        packed.write_rows(start, halves)
        assert torch.equal(halves, expected[start : start + count].bfloat16())


def test_four_bit_values_against_the_formula() -> None:
    code = four_bit_code("nf4")
    packed = FourBitTensor(
        data=torch.tensor([[0x0F], [0x71], [0x80]], dtype=torch.uint8),
        absmax=torch.tensor([2.0]),
        shape=torch.Size((1, 6)),
        dtype=torch.float32,
    )
    assert torch.equal(packed.dequantize()[0], 2 * code[torch.tensor([0, 15, 7, 1, 8, 0])])


@pytest.mark.parametrize("size", [32, 64, 4096])
def test_other_block_sizes(size: int) -> None:
    packed = quantize_4bit(draw(9, 4096), block_size=size)
    assert torch.equal(packed.dequantize(), packed._values(0, 9 * 4096).view(9, 4096))


def test_the_kernel_refuses_what_is_not_there() -> None:
    packed = quantize_4bit(draw(4, 64))
    codes = four_bit_code("nf4"), dynamic_code()
    with pytest.raises(ValueError, match="from the beginning of a block"):
        cpu.dequantize_4bit(packed, *codes, 32, torch.empty(8))
    with pytest.raises(ValueError, match="the weight ends before"):
        cpu.dequantize_4bit(packed, *codes, 64, torch.empty(4, 64))
    with pytest.raises(ValueError, match="the output float32"):
        cpu.dequantize_4bit(packed, *codes, 0, torch.empty(4, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="must be contiguous"):
        cpu.dequantize_4bit(packed, *codes, 0, torch.empty(64, 4).T)


def test_packed_blocks_of_gguf_files_flow_back() -> None:
    rows = torch.randint(256, (48, 2 * 34), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    rows[:, ::34], rows[:, 1::34] = 0, 20  # the float16 scale of a block
    matrix = PackedMatrix(QuantTensor(rows, GGMLType.Q8_0))
    whole = dequantize(rows, GGMLType.Q8_0, torch.empty(48, 64))
    x, grad = draw(3, 64).requires_grad_(), draw(3, 48, seed=2)
    matrix(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_what_comes_out_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    out = frozen_linear(x, DenseRows(torch.randn(6, 8)))
    with torch.no_grad():
        out.detach().mul_(2)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert grad.shape == x.shape
