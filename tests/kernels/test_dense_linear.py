"""Compiled products with 16-bit float weights against float64, for every usable instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from puna.kernels.dense_linear import linear
from puna.model.linear import Linear

cpu = pytest.importorskip(
    "puna.kernels.cpu", reason="the compiled kernels were not built", exc_type=ImportError
)

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=cpu.usable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.chosen()
    cpu.choose(request.param)
    yield request.param
    cpu.choose(before)


def random_matrix(rows: int, columns: int, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = cpu.dense_linear(x, [weight])[0]
    return out


def assert_explained(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Nothing but sums in float32 and one rounding to the dtype of x separates `out` from the product."""
    exact = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    rounding = torch.finfo(out.dtype).eps / 2 * exact.abs() if out.dtype != torch.float32 else 0.0
    assert ((out.double() - exact).abs() <= 1.01 * rounding + 2e-6 * terms).all()


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 13, 24, 67])
def test_product(isa: str, dtype: torch.dtype, tokens: int) -> None:
    weight, x = random_matrix(37, 531, dtype), random_matrix(tokens, 531, dtype, seed=1)
    out = multiply(x, weight)
    assert out.dtype == dtype
    assert_explained(out, x, weight)


@DTYPES
@pytest.mark.parametrize("columns", [1, 7, 8, 15, 16, 17, 255, 256, 257])
def test_odd_sizes(isa: str, dtype: torch.dtype, columns: int) -> None:
    for rows in (1, 17, 127):
        weight = random_matrix(rows, columns, dtype)
        for tokens in (1, 3, 9):
            x = random_matrix(tokens, columns, torch.float32, seed=tokens)
            assert_explained(multiply(x, weight), x, weight)


@pytest.mark.parametrize("tokens", [251, 252, 253, 510])
def test_more_tokens_than_are_taken_at_a_time(isa: str, tokens: int) -> None:
    weight, x = random_matrix(19, 41, torch.bfloat16), random_matrix(tokens, 41, torch.bfloat16, seed=1)
    assert_explained(multiply(x, weight), x, weight)


def test_long_sums(isa: str) -> None:
    weight = random_matrix(2, 20011, torch.bfloat16).abs()
    for tokens in (1, 5):
        x = random_matrix(tokens, 20011, torch.float32, seed=1).abs()
        exact = x.double() @ weight.double().T
        torch.testing.assert_close(multiply(x, weight).double(), exact, rtol=1e-5, atol=0)


@DTYPES
def test_every_value_of_a_weight_is_read_as_torch_reads_it(isa: str, dtype: torch.dtype) -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    one = torch.ones(5, 1)
    for tokens in (1, 5):
        out = multiply(one[:tokens], values[:, None])
        torch.testing.assert_close(out, values.float().expand(tokens, -1), rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 6])
def test_huge_values_and_nan_reach_only_their_own_outputs(isa: str, dtype: torch.dtype, tokens: int) -> None:
    largest = torch.finfo(dtype).max
    weight, x = random_matrix(18, 40, dtype), random_matrix(tokens, 40, dtype, seed=1)
    weight[17, 39] = torch.nan
    weight[3] = 0
    weight[3, 2] = largest
    x[-1, 2] = largest
    out = multiply(x, weight)
    assert out[:, 17].isnan().all()
    assert out[-1, 3] == torch.inf
    weight[17, 39] = 0
    x[-1, 2] = torch.inf
    out = multiply(x, weight)
    assert not out[-1].isfinite().any()
    assert out[:-1, :3].isfinite().all()
    assert_explained(out[:-1, 4:], x[:-1], weight[4:])


def test_several_weights_strided_rows_and_leading_axes(isa: str) -> None:
    weights = [random_matrix(48, 96, torch.bfloat16), random_matrix(19, 96, torch.bfloat16, seed=5)]
    wide = random_matrix(6, 200, torch.bfloat16, seed=1)
    part = wide[:, 101:197]  # starts at an odd address
    for tokens in (1, 2, 6):
        for out, weight in zip(cpu.dense_linear(part[:tokens], weights), weights, strict=True):
            assert_explained(out, part[:tokens], weight)
    folded = cpu.dense_linear(part.reshape(2, 3, 96), weights)[1]
    assert torch.equal(folded.reshape(6, 19), cpu.dense_linear(part, weights)[1])
    transposed = random_matrix(96, 32, torch.bfloat16).T[:5]  # columns are not contiguous
    assert torch.equal(multiply(transposed, weights[0]), multiply(transposed.contiguous(), weights[0]))
    one = random_matrix(1, 96, torch.bfloat16)
    assert torch.equal(multiply(one.expand(5, 96), weights[0])[4], multiply(one.repeat(5, 1), weights[0])[0])
    assert multiply(torch.empty(0, 96), weights[0]).shape == (0, 48)


def test_weights_at_odd_addresses(isa: str) -> None:
    flat = random_matrix(1, 1 + 17 * 33, torch.bfloat16)[0, 1:]
    weight = flat.view(17, 33)
    for tokens in (1, 5):
        x = random_matrix(tokens, 33, torch.bfloat16, seed=1)
        assert_explained(multiply(x, weight), x, weight)


def test_wrong_calls_raise() -> None:
    weight = random_matrix(16, 64, torch.bfloat16)
    x = torch.zeros(1, 64)
    with pytest.raises(ValueError, match="96 columns"):
        cpu.dense_linear(torch.zeros(1, 96), [weight])
    with pytest.raises(ValueError, match="int64"):
        cpu.dense_linear(x.long(), [weight])
    with pytest.raises(ValueError, match="float32"):
        cpu.dense_linear(x, [weight.float()])
    with pytest.raises(ValueError, match="all bfloat16"):
        cpu.dense_linear(x, [weight, weight.half()])
    with pytest.raises(ValueError, match="all bfloat16"):
        cpu.dense_linear(x, [])
    with pytest.raises(ValueError, match="contiguous"):
        cpu.dense_linear(torch.zeros(1, 16), [weight.T])
    with pytest.raises(ValueError, match="CPU"):
        cpu.dense_linear(x.to("meta"), [weight])
    with pytest.raises(ValueError, match="CPU"):
        cpu.dense_linear(x, [weight.to("meta")])


@DTYPES
def test_linear_takes_the_kernel_without_gradients_and_torch_with_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cpu.chosen() == "portable":
        pytest.skip("torch is faster than the portable kernels")
    calls = []
    kernel = cpu.dense_linear

    def counted(x: Tensor, weights: tuple[Tensor, ...]) -> list[Tensor]:
        calls.append(weights)
        outs: list[Tensor] = kernel(x, weights)
        return outs

    monkeypatch.setattr(cpu, "dense_linear", counted)
    weight = torch.nn.Parameter(random_matrix(24, 40, dtype))
    bias = random_matrix(1, 24, dtype, seed=3)[0]
    x = random_matrix(3, 40, dtype, seed=1)
    with torch.no_grad():
        out = linear(x, weight, bias)
    assert len(calls) == 1
    assert torch.equal(out, kernel(x, [weight])[0] + bias)
    linear(x, weight, bias).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.ones(24, 3, dtype=dtype) @ x)
    assert len(calls) == 1


# torch derives its own operations with torch.jit, which it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@DTYPES
def test_linear_keeps_tangents_and_can_be_mapped(dtype: torch.dtype) -> None:
    weight, x = random_matrix(24, 40, dtype), random_matrix(3, 40, dtype, seed=1)
    tangent = random_matrix(3, 40, dtype, seed=2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)  # type: ignore[no-untyped-call]
        out = forward_ad.unpack_dual(linear(dual, weight))  # type: ignore[no-untyped-call]
        assert out.tangent is not None
        torch.testing.assert_close(out.tangent, tangent @ weight.T)
    mapped = torch.func.vmap(lambda row: linear(row, weight))(x)
    torch.testing.assert_close(mapped, x @ weight.T)


def test_linear_leaves_to_torch_what_the_kernel_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(cpu, "dense_linear", refuse)
    weight, x = random_matrix(24, 40, torch.bfloat16), random_matrix(3, 40, torch.bfloat16)
    assert torch.equal(linear(x.float(), weight.float()), x.float() @ weight.float().T)
    assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
    columns = weight.T.contiguous().T
    torch.testing.assert_close(linear(x, columns), x @ weight.T)
    with torch.autocast("cpu", torch.float16):
        assert linear(x, weight).dtype == torch.float16
    with pytest.raises(RuntimeError):
        linear(x, weight[:, :39].contiguous())
    with pytest.raises(RuntimeError):
        linear(x, weight.half())


@DTYPES
def test_linear_module_is_an_nn_linear_in_everything_else(dtype: torch.dtype) -> None:
    ours, torchs = Linear(40, 24, dtype=dtype), torch.nn.Linear(40, 24, dtype=dtype)
    ours.load_state_dict(torchs.state_dict())
    assert isinstance(ours, torch.nn.Linear) and repr(ours) == repr(torchs)
    x = random_matrix(3, 40, dtype)
    with torch.no_grad():
        exact = torch.nn.functional.linear(x.double(), torchs.weight.double(), torchs.bias.double())
        torch.testing.assert_close(ours(x).double(), exact, rtol=torch.finfo(dtype).eps, atol=0.02)
