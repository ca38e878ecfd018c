"""Quantising: blocks made by hand, and errors held to the gguf package's and to llama.cpp's known ones."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from puna.errors import UnsupportedError
from puna.gguf_header import GGMLType
from puna.weights.dequantize import IQ4_VALUES
from puna.weights.quantize_blocks import can_quantize, quantize

SIMPLE = (GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1)
# Relative RMS error of llama.cpp's quantiser on normal weights, measured with benchmarks/quantize.py.
LLAMA_CPP = {
    GGMLType.Q8_0: 0.00536,
    GGMLType.Q6_K: 0.01776,
    GGMLType.Q5_K: 0.03612,
    GGMLType.Q5_1: 0.03784,
    GGMLType.Q5_0: 0.04270,
    GGMLType.Q4_K: 0.07139,
    GGMLType.Q4_1: 0.07827,
    GGMLType.Q4_0: 0.08597,
    GGMLType.IQ4_NL: 0.07614,
    GGMLType.IQ4_XS: 0.07672,
    GGMLType.Q3_K: 0.15083,
    GGMLType.Q2_K: 0.29655,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(x: Tensor, kind: GGMLType, importance: Tensor | None = None) -> float:
    lost = quantize(x, kind, importance).dequantize() - x
    counted = torch.ones(x.shape[-1]) if importance is None else importance
    return float(((lost.square() * counted).sum() / (x.square() * counted).sum()).sqrt())


@pytest.mark.parametrize("kind", LLAMA_CPP, ids=lambda kind: kind.name)
def test_the_error_is_at_most_that_of_llama_cpp(kind: GGMLType) -> None:
    assert relative_error(normal(64, 512) * 0.02, kind) < LLAMA_CPP[kind]


@pytest.mark.parametrize("kind", SIMPLE, ids=lambda kind: kind.name)
def test_the_error_of_whole_rows_is_at_most_that_of_the_gguf_package(kind: GGMLType) -> None:
    x = normal(96, 256, seed=1) * torch.logspace(-4, 3, 96)[:, None]
    theirs_type = gguf.GGMLQuantizationType(int(kind))
    packed = gguf.quants.quantize(x.numpy(), theirs_type)
    theirs = torch.from_numpy(gguf.quants.dequantize(packed, theirs_type))
    ours = quantize(x, kind).dequantize()
    assert bool(((ours - x).square().sum(1) <= (theirs - x).square().sum(1) * 1.0001).all())


@pytest.mark.parametrize("kind", LLAMA_CPP, ids=lambda kind: kind.name)
def test_values_on_the_levels_come_back_exactly(kind: GGMLType) -> None:
    levels = {
        GGMLType.IQ4_NL: torch.tensor(IQ4_VALUES),
        GGMLType.IQ4_XS: torch.tensor(IQ4_VALUES),
        GGMLType.Q8_0: torch.arange(-127, 128),
        GGMLType.Q6_K: torch.arange(-32, 32),
        GGMLType.Q5_K: torch.arange(-15, 17),
        GGMLType.Q5_0: torch.arange(-16, 16),
        GGMLType.Q5_1: torch.arange(-5, 27),
        GGMLType.Q3_K: torch.arange(-4, 4),
        GGMLType.Q2_K: torch.arange(-1, 3),
    }.get(kind, torch.arange(-8, 8))
    choice = torch.randint(len(levels), (4, 512), generator=torch.Generator().manual_seed(0))
    choice[:, ::16], choice[:, 1::16] = 0, len(levels) - 1  # every group spans the whole range
    x = levels[choice].float() / 128
    found = quantize(x, kind).dequantize()
    # The float above the scales of a K-quant is a quotient, so there half precision shows.
    torch.testing.assert_close(
        found, x, rtol=0, atol=0 if kind.block_size == 32 else 5e-4 * float(x.abs().max())
    )


def test_blocks_made_by_hand() -> None:
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([-1.0, 0.875, 0.125, -0.5])
    q4_0 = quantize(x, GGMLType.Q4_0).data[0]
    assert float(q4_0[:2].view(torch.float16)) == 0.125
    assert q4_0[2:].tolist() == [0x80, 0x8F, 0x89, 0x84] + [0x88] * 12  # element j low, j + 16 high
    x[0, :4] = torch.tensor([-127, 111, 16, -64])
    q8_0 = quantize(x, GGMLType.Q8_0).data[0]
    assert float(q8_0[:2].view(torch.float16)) == 1.0
    assert q8_0[2:].view(torch.int8).tolist() == [-127, 111, 16, -64] + [0] * 28
    q5_1 = quantize(torch.arange(32.0)[None] + 3, GGMLType.Q5_1).data[0]
    assert q5_1[:4].view(torch.float16).tolist() == [1.0, 3.0]
    assert q5_1[4:8].tolist() == [0, 0, 0xFF, 0xFF]  # the fifth bits of 16 to 31
    assert q5_1[8:].tolist() == [j | j << 4 for j in range(16)]


@pytest.mark.parametrize("kind", LLAMA_CPP, ids=lambda kind: kind.name)
def test_zeros_and_constants(kind: GGMLType) -> None:
    assert torch.equal(quantize(torch.zeros(2, 256), kind).dequantize(), torch.zeros(2, 256))
    negative = torch.full((1, 256), -0.75)
    torch.testing.assert_close(quantize(negative, kind).dequantize(), negative, rtol=2e-2, atol=0)


@pytest.mark.parametrize("kind", LLAMA_CPP, ids=lambda kind: kind.name)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4])
def test_extreme_scales_give_finite_values(kind: GGMLType, scale: float) -> None:
    x = normal(2, 256, seed=2) * scale
    found = quantize(x, kind).dequantize()
    assert float((found - x).abs().max()) <= max(1.5 * float(x.abs().max()), 1e-6)


@pytest.mark.parametrize("kind", LLAMA_CPP, ids=lambda kind: kind.name)
def test_an_importance_lessens_the_error_that_it_weighs(kind: GGMLType) -> None:
    x, importance = normal(16, 512, seed=3), normal(512, seed=4).exp()
    importance[:7] = 0
    plain = quantize(x, kind).dequantize() - x
    before = float(((plain.square() * importance).sum() / (x.square() * importance).sum()).sqrt())
    after = relative_error(x, kind, importance)
    assert after < before


@pytest.mark.parametrize("kind", [GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_1], ids=lambda kind: kind.name)
def test_rows_do_not_become_shorter(kind: GGMLType) -> None:
    x, importance = normal(8, 1024, seed=5), normal(1024, seed=6).exp()
    for counted in (None, importance):
        weights = torch.ones(1024) if counted is None else counted
        found = quantize(x, kind, counted).dequantize()
        ratio = (x * found * weights).sum(1) / (x * x * weights).sum(1)
        torch.testing.assert_close(ratio, torch.ones(8), rtol=0, atol=2e-4)


def test_a_constant_importance_changes_nothing() -> None:
    x = normal(4, 512)
    for kind in (GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.Q6_K):
        ours = quantize(x, kind).dequantize()
        torch.testing.assert_close(
            quantize(x, kind, torch.full((512,), 7.0)).dequantize(), ours, rtol=0, atol=0.1
        )
        assert relative_error(x, kind, torch.full((512,), 7.0)) == pytest.approx(
            relative_error(x, kind), rel=1e-3
        )


def test_rows_are_quantised_by_themselves_in_any_dtype() -> None:
    x = normal(3, 700, 256).bfloat16()  # more than is worked on at a time
    whole = quantize(x, GGMLType.Q4_K)
    assert whole.data.shape == (3, 700, 144)
    assert torch.equal(whole.data[2, 5:7], quantize(x[2, 5:7].float(), GGMLType.Q4_K).data)
    turned = quantize(x[0, :256].T, GGMLType.Q8_0)
    assert torch.equal(turned.data, quantize(x[0, :256].T.contiguous(), GGMLType.Q8_0).data)


def test_what_cannot_be_quantised_is_refused() -> None:
    assert can_quantize(GGMLType.Q4_K) and not can_quantize(GGMLType.F16)
    with pytest.raises(UnsupportedError, match="IQ2_XS"):
        quantize(torch.zeros(1, 256), GGMLType.IQ2_XS)
    with pytest.raises(ValueError, match="rows of 96 weights are no whole Q4_K blocks of 256"):
        quantize(torch.zeros(1, 96), GGMLType.Q4_K)
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.full((1, 32), float("nan")), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="beyond half precision"):
        quantize(torch.full((1, 32), 1e9), GGMLType.Q8_0)
    with pytest.raises(ValueError, match=r"shape \[32\] is needed, got \[16\]"):
        quantize(torch.zeros(1, 32), GGMLType.Q4_0, torch.ones(16))
    with pytest.raises(ValueError, match="negative"):
        quantize(torch.zeros(1, 32), GGMLType.Q4_0, -torch.ones(32))
