"""Compiled products with quantised weights against float64, for every type and usable instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from puna.errors import ConfigError
from puna.gguf_header import GGMLType
from puna.kernels import reference
from puna.weights.dequantize import dequantize

cpu = pytest.importorskip(
    "puna.kernels.cpu", reason="the compiled kernels were not built", exc_type=ImportError
)

# Where each type keeps its float16 scales.
SCALES = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
}
TYPES = pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)


@pytest.fixture(params=cpu.usable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.chosen()
    cpu.choose(request.param)
    yield request.param
    cpu.choose(before)


def random_rows(kind: GGMLType, rows: int, columns: int, *, seed: int = 0, scale: float = 0.01) -> Tensor:
    """Make packed rows of random bytes whose float16 scales are random and finite."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, columns // kind.block_size, kind.type_size), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = (scale * rng.standard_normal((*data.shape[:2], 1))).astype(np.float16)
        data[..., at : at + 2] = scales.view(np.uint8)
    return torch.from_numpy(data.reshape(rows, -1))


def random_activations(tokens: int, columns: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(tokens, columns // 32, 1, generator=generator) * 4
    return (torch.randn(tokens, columns // 32, 32, generator=generator) * sizes).reshape(tokens, columns)


def multiply(x: Tensor, rows: Tensor, kind: GGMLType) -> Tensor:
    out: Tensor = cpu.quant_linear(x, [cpu.TiledWeight.pack(rows, kind)])[0]
    return out


def assert_explained(out: Tensor, x: Tensor, rows: Tensor, kind: GGMLType) -> None:
    """Nothing but activations rounded to int8 and sums in float32 separate `out` from the product."""
    weight = dequantize(rows, kind).double()
    exact = reference.round_activations(x) @ weight.T
    terms = x.double().abs() @ weight.abs().T
    # Minima are subtracted as a sum of their own, which can be larger than the terms themselves.
    slack = x.double().abs().sum(-1, keepdim=True) * weight.abs().amax(-1)
    assert ((out.double() - exact).abs() <= 1e-6 * (terms + slack) + 1e-30).all()


@TYPES
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 67])
def test_product(isa: str, kind: GGMLType, tokens: int) -> None:
    rows = random_rows(kind, 37, 768)
    x = random_activations(tokens, 768)
    assert_explained(multiply(x, rows, kind), x, rows, kind)


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.Q5_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("columns", [32, 96, 288, 544])
def test_columns_that_are_no_whole_panel(isa: str, kind: GGMLType, columns: int) -> None:
    rows = random_rows(kind, 16, columns)
    for tokens in (1, 5):
        x = random_activations(tokens, columns)
        assert_explained(multiply(x, rows, kind), x, rows, kind)


def test_more_tokens_than_fit_the_cache(isa: str) -> None:
    rows = random_rows(GGMLType.Q4_K, 16, 12288)
    x = random_activations(41, 12288)
    assert_explained(multiply(x, rows, GGMLType.Q4_K), x, rows, GGMLType.Q4_K)


@TYPES
def test_error_is_what_int8_activations_explain(kind: GGMLType) -> None:
    rows, x = random_rows(kind, 64, 2048), random_activations(4, 2048)
    weight = dequantize(rows, kind).double()
    error = multiply(x, rows, kind).double() - x.double() @ weight.T
    steps = x.double().reshape(4, -1, 32).abs().amax(-1) / 127
    variance = steps.square().repeat_interleave(32, dim=-1) @ weight.square().T / 12
    assert error.square().mean().sqrt() < 1.1 * variance.mean().sqrt()


@TYPES
def test_largest_weights_and_activations_do_not_saturate(isa: str, kind: GGMLType) -> None:
    # All bits set, or the sign bit alone: the extreme quants of each type, with activations at +-127 steps.
    for byte in (0xFF, 0x80, 0x00):
        rows = torch.full((16, kind.type_size), byte, dtype=torch.uint8)
        for at in SCALES[kind]:
            rows[:, at : at + 2] = torch.tensor([0x00, 0x3C], dtype=torch.uint8)  # 1.0
        for tokens in (1, 4, 8):
            for sign in (1.0, -1.0):
                x = torch.full((tokens, kind.block_size), 127.0 * sign)
                out = multiply(x, rows, kind)
                exact = x.double() @ dequantize(rows, kind).double().T
                torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=0)


@TYPES
def test_extreme_scales_give_finite_values(isa: str, kind: GGMLType) -> None:
    for scale in (65504.0, 6e-8, 0.0):
        rows = random_rows(kind, 17, 256)
        view = rows.view(17, -1, kind.type_size)
        half = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
        for at in SCALES[kind]:
            view[..., at : at + 2] = half
        for size in (1e-38, 1e-12, 1.0, 1e12):
            x = random_activations(3, 256) * size
            assert multiply(x, rows, kind).isfinite().all()
    zero = multiply(torch.zeros(2, 256), random_rows(kind, 16, 256), kind)
    assert zero.eq(0).all()


def test_what_is_not_finite_shows(isa: str) -> None:
    rows = random_rows(GGMLType.Q4_0, 16, 64)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for tokens in (1, 5):
            x = random_activations(tokens, 64)
            x[tokens - 1, 40] = bad
            out = multiply(x, rows, GGMLType.Q4_0)
            assert not out[tokens - 1].isfinite().any()
            assert out[: tokens - 1].isfinite().all()


def test_the_largest_activations_are_finite(isa: str) -> None:
    rows = random_rows(GGMLType.Q8_0, 16, 64, scale=1e-6)
    for tokens in (1, 5):
        x = torch.zeros(tokens, 64)
        x[:, 3], x[:, 19] = 3e38, 3e38  # whose sum is not
        assert_explained(multiply(x, rows, GGMLType.Q8_0), x, rows, GGMLType.Q8_0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(isa: str, dtype: torch.dtype) -> None:
    rows = random_rows(GGMLType.Q6_K, 37, 512)
    for tokens in (1, 9):
        x = random_activations(tokens, 512).to(dtype)
        out = multiply(x, rows, GGMLType.Q6_K)
        assert out.dtype == dtype
        assert torch.equal(out, multiply(x.float(), rows, GGMLType.Q6_K).to(dtype))


def test_several_weights_strided_rows_and_leading_axes(isa: str) -> None:
    first, second = random_rows(GGMLType.Q4_K, 48, 256), random_rows(GGMLType.Q6_K, 19, 256, seed=5)
    weights = [cpu.TiledWeight.pack(first, GGMLType.Q4_K), cpu.TiledWeight.pack(second, GGMLType.Q6_K)]
    wide = random_activations(6, 512)
    outs = cpu.quant_linear(wide[:, 256:], weights)
    assert_explained(outs[0], wide[:, 256:], first, GGMLType.Q4_K)
    assert_explained(outs[1], wide[:, 256:], second, GGMLType.Q6_K)
    folded = cpu.quant_linear(wide[:, 256:].reshape(2, 3, 256), weights)
    assert torch.equal(folded[1].reshape(6, 19), outs[1])
    transposed = random_activations(256, 32).T[:5]  # columns are not contiguous
    assert torch.equal(
        cpu.quant_linear(transposed, weights)[0], cpu.quant_linear(transposed.contiguous(), weights)[0]
    )


def test_expanded_and_empty_inputs(isa: str) -> None:
    weight = cpu.TiledWeight.pack(random_rows(GGMLType.Q8_0, 16, 64), GGMLType.Q8_0)
    one = random_activations(1, 64)
    (out,) = cpu.quant_linear(one.expand(5, 64), [weight])
    assert torch.equal(out, cpu.quant_linear(one, [weight])[0].expand(5, 16))
    assert cpu.quant_linear(torch.empty(0, 64), [weight])[0].shape == (0, 16)


@TYPES
def test_tiles_are_a_permutation_that_can_be_turned_back(kind: GGMLType) -> None:
    rows = torch.from_numpy(
        np.random.default_rng(3).integers(0, 256, (37, 3 * kind.type_size), dtype=np.uint8)
    )
    weight = cpu.TiledWeight.pack(rows, kind)
    index = torch.tensor([36, 0, 5, 5, 17])
    assert torch.equal(weight.rows(index), rows[index])
    assert torch.equal(weight.rows(torch.arange(37)), rows)
    assert weight.tiles.numel() == 48 * rows.shape[1]


def test_wrong_calls_raise() -> None:
    weight = cpu.TiledWeight.pack(random_rows(GGMLType.Q4_0, 16, 64), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="96 columns, the weight 64"):
        cpu.quant_linear(torch.zeros(1, 96), [weight])
    with pytest.raises(ValueError, match="int64"):
        cpu.quant_linear(torch.zeros(1, 64, dtype=torch.int64), [weight])
    for x in (torch.tensor(1.0), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="without columns"):
            cpu.quant_linear(x, [weight])
    with pytest.raises(ValueError, match="no row 16"):
        weight.rows(torch.tensor([16]))
    with pytest.raises(ValueError, match="no kernel"):
        cpu.TiledWeight.pack(torch.zeros(16, 36, dtype=torch.uint8), GGMLType.Q8_1)
    with pytest.raises(ValueError, match="bytes are needed"):
        cpu.TiledWeight(torch.zeros(8, dtype=torch.uint8), GGMLType.Q4_0, (16, 64))
    with pytest.raises(ValueError, match="another shape"):
        weight.matrix.pack(torch.zeros(17, 36, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match="torch.bool"):
        weight.rows(torch.ones(16, dtype=torch.bool))
    with pytest.raises(ConfigError, match="abacus"):
        cpu.choose("abacus")


def test_sizes_that_overflow_are_refused() -> None:
    # 2**38 rows of 2**28 * 34 bytes are a multiple of 2**64.
    with pytest.raises(ValueError, match="bytes are needed, got 0"):
        cpu.TiledWeight(torch.empty(0, dtype=torch.uint8), GGMLType.Q8_0, (1 << 38, 1 << 33))


def test_what_would_have_to_be_copied_is_refused() -> None:
    weight = cpu.TiledWeight.pack(random_rows(GGMLType.Q4_0, 16, 64), GGMLType.Q4_0)
    numbers, out = torch.arange(4), torch.zeros(4, 72, dtype=torch.uint8)
    for wrong in (out[:, ::2], out[:, :36].to(torch.int16)):
        with pytest.raises(TypeError):
            weight.matrix.unpack(numbers, wrong, 1)
    for tiles in (weight.tiles.to(torch.int8), weight.tiles.repeat_interleave(2)[::2]):
        with pytest.raises(TypeError):
            cpu.TiledWeight(tiles, GGMLType.Q4_0, (16, 64))
