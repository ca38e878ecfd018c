"""The compiled small operations against torch's own, in every dtype and instruction set, on odd sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from puna import kernels
from puna.kernels import layer_ops

cpu = pytest.importorskip(
    "puna.kernels.cpu", reason="the compiled kernels were not built", exc_type=ImportError
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=cpu.usable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.chosen()
    cpu.choose(request.param)
    yield request.param
    cpu.choose(before)


def torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_cpu", None)


def assert_near(got: Tensor, expected: Tensor, *, ulps: int = 4) -> None:
    """Compare within a few roundings of the dtype."""
    assert got.dtype == expected.dtype
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=ulps * eps, atol=ulps * eps)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 2048), (3, 5), (37, 1000), (2, 16)])
def test_rms_norm(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, columns: int) -> None:
    x = torch.randn(rows, 2 * columns).to(dtype)[:, :columns]  # rows with gaps
    weight = torch.randn(columns).to(dtype)
    got, plain = cpu.rms_norm(x, weight, 1e-5), cpu.rms_norm(x, None, 1e-5)
    torch_form(monkeypatch)
    assert_near(got, layer_ops.rms_norm(x, weight, 1e-5))
    assert_near(plain, layer_ops.rms_norm(x, None, 1e-5))


@pytest.mark.usefixtures("isa")
def test_rms_norm_of_zeros_and_of_nan() -> None:
    x = torch.zeros(2, 40)
    x[1, 7] = torch.nan
    out = cpu.rms_norm(x, torch.ones(40), 1e-5)
    assert out[0].eq(0).all()
    assert out[1].isnan().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 6, 40, 34])
def test_rotate(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, interleaved: bool, head_dim: int
) -> None:
    heads, tokens = 3, 5
    x = torch.randn(tokens, 2 * heads * head_dim).to(dtype)[:, : heads * head_dim].view(tokens, heads, -1)
    angles = torch.randn(tokens, 1, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    got = cpu.rotate(x, cos, sin, interleaved=interleaved)
    torch_form(monkeypatch)
    assert_near(got, layer_ops.rotate(x, cos, sin, interleaved=interleaved))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 31, 4096, 70_003])
def test_swiglu(dtype: torch.dtype, count: int) -> None:
    gate, up = (4 * torch.randn(count)).to(dtype), torch.randn(count).to(dtype)
    assert_near(cpu.swiglu(gate, up), functional.silu(gate) * up)


@pytest.mark.usefixtures("isa")
def test_swiglu_far_from_zero() -> None:
    gate = torch.tensor([-3e38, -1e30, -1e4, -200.0, -100.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30, torch.nan])
    got, expected = cpu.swiglu(gate, torch.ones(12)), functional.silu(gate)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_store(dtype: torch.dtype, kept: torch.dtype) -> None:
    x = torch.randn(4, 3, 7)
    x[0, 0, 0], x[1, 0, 0], x[2, 0, 0] = 3.3e38, -3.3e38, torch.nan
    x = x.to(dtype)
    limit = torch.finfo(kept).max
    expected = torch.zeros(9, 3, 7, dtype=kept)
    places = torch.tensor([8, 0, 3, 5])
    is_narrower = limit < torch.finfo(dtype).max
    expected[places] = (x.float().clamp(-limit, limit) if is_narrower else x).to(kept)
    cache = torch.zeros(9, 3, 7, dtype=kept)
    cpu.store(x, cache, places)
    torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 7, 40])
def test_store_int8(dtype: torch.dtype, head_dim: int) -> None:
    x = torch.randn(4, 3, head_dim).to(dtype)
    x[1, 2] = 0
    x[2, 1, 0] = torch.nan
    cache, scales = torch.zeros(9, 3, head_dim, dtype=torch.int8), torch.zeros(9, 3)
    places = torch.tensor([8, 0, 3, 5])
    cpu.store_int8(x, cache, scales, places)
    read = cache[places] * scales[places, :, None]
    assert read[2, 1].isnan().all()
    x[2, 1], read[2, 1] = 0, 0
    half_a_step = 0.501 * x.float().abs().amax(-1, keepdim=True) / 127
    assert ((read - x.float()).abs() <= half_a_step).all()
    assert not cache[[1, 2, 4, 6, 7]].any()


def test_gradients_take_torchs_form() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    weight = nn.Parameter(torch.randn(8))
    layer_ops.swiglu(layer_ops.rms_norm(x, weight, 1e-5), x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and weight.grad is not None and x.grad.abs().sum() > 0
    angles = torch.randn(3, 1, 2)
    turned = layer_ops.rotate(x.view(3, 2, 4), angles.cos(), angles.sin(), interleaved=False)
    assert turned.requires_grad


def test_a_row_does_not_depend_on_its_company() -> None:
    x = torch.randn(70, 1000)
    whole = cpu.rms_norm(x, torch.ones(1000), 1e-5)
    assert torch.equal(whole[37:38], cpu.rms_norm(x[37:38], torch.ones(1000), 1e-5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: cpu.rms_norm(torch.zeros(2, 4), torch.zeros(5), 1e-5), "weight"),
        (lambda: cpu.rms_norm(torch.zeros(2, 4, dtype=torch.float64), None, 1e-5), "float64"),
        (lambda: cpu.swiglu(torch.zeros(4), torch.zeros(5)), "up"),
        (lambda: cpu.rotate(torch.zeros(2, 1, 4), *[torch.zeros(2, 1, 3)] * 2, interleaved=True), "angles"),
        (lambda: cpu.store(torch.zeros(1, 4), torch.zeros(3, 4), torch.tensor([3])), "no place 3"),
        (lambda: cpu.store(torch.zeros(1, 4), torch.zeros(3, 4), torch.tensor([-1])), "no place -1"),
        (lambda: cpu.store(torch.zeros(1, 4), torch.zeros(3, 5), torch.tensor([1])), "rows"),
    ],
)  # fmt: skip
def test_wrong_calls_raise(wrong, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        wrong()
