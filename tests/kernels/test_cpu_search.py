"""The compiled searches for scales beside their twins in torch, for every type and usable instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from puna import kernels
from puna.gguf_header import GGMLType
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quantize_blocks import quantize

cpu = pytest.importorskip(
    "puna.kernels.cpu", reason="the compiled kernels were not built", exc_type=ImportError
)

SEARCHED = (
    GGMLType.Q8_0,
    GGMLType.Q4_0,
    GGMLType.Q4_1,
    GGMLType.Q5_0,
    GGMLType.Q5_1,
    GGMLType.IQ4_NL,
    GGMLType.Q2_K,
    GGMLType.Q3_K,
    GGMLType.Q4_K,
    GGMLType.Q5_K,
    GGMLType.Q6_K,
    GGMLType.IQ4_XS,
)
TYPES = pytest.mark.parametrize("kind", SEARCHED, ids=lambda kind: kind.name)


@pytest.fixture(params=cpu.usable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.chosen()
    cpu.choose(request.param)
    yield request.param
    cpu.choose(before)


def weights(kind: GGMLType) -> Tensor:
    """Return rows of an odd number of blocks: heavy tails, a group of zeros, one that is all positive."""
    generator = torch.Generator().manual_seed(0)
    columns = 3 * kind.block_size
    x = torch.randn(5, columns, generator=generator) * torch.randn(5, columns, generator=generator).exp()
    x[1, :32], x[2, 32:64] = 0, x[2, 32:64].abs() + 1
    return x * 0.02


def error_of_blocks(x: Tensor, packed: QuantTensor, importance: Tensor | None) -> Tensor:
    lost = (packed.dequantize() - x).double().square()
    if importance is not None:
        lost *= importance
    return lost.view(-1, packed.type.block_size).sum(1)


@TYPES
@pytest.mark.parametrize("weighted", [False, True])
def test_they_lose_as_much_as_their_twins(
    kind: GGMLType, weighted: bool, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = weights(kind)
    importance = None
    if weighted:
        importance = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(1)).exp()
    ours = quantize(x, kind, importance)
    monkeypatch.setattr(kernels, "_cpu", None)
    twin = quantize(x, kind, importance)
    assert float((ours.data == twin.data).float().mean()) > 0.95
    mine, theirs = (error_of_blocks(x, packed, importance) for packed in (ours, twin))
    # Sums in another order may prefer another of two scales that are nearly as good.
    torch.testing.assert_close(mine, theirs, rtol=0.1, atol=1e-12)
    torch.testing.assert_close(mine.sum(), theirs.sum(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("kind", [GGMLType.IQ4_XS, GGMLType.Q6_K, GGMLType.Q4_K, GGMLType.IQ4_NL])
def test_scales_beyond_half_precision_are_an_error(kind: GGMLType, isa: str) -> None:
    x = torch.zeros(1, 256)
    x[0, :40] = 1e12
    with pytest.raises(ValueError, match="beyond half precision"):
        quantize(x, kind)


def test_threads_change_nothing(isa: str) -> None:
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(quantize(x, GGMLType.Q4_K).data)
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_wrong_call_raises() -> None:
    x, trials = torch.zeros(4, 32), [-8.0]
    for wrong, options, message in (
        (x.double(), {}, "float32 on the CPU"),
        (x[:, :20], {}, "groups of 16 or 32"),
        (torch.zeros(2, 8, 32), {}, "2 dimensions"),
        (x, {"weights": torch.zeros(1, 16)}, "do not fit"),
        (x, {"weights": torch.zeros(0, 32)}, "do not fit"),
        (x, {"table": torch.zeros(16)}, "512 levels"),
        (x, {"levels": (-200, 7)}, "8 bits"),
        (x, {"levels": (-8, 7), "affine": True}, "start at 0"),
        (x, {"affine": True, "levels": (0, 15), "table": torch.zeros(512)}, "symmetric groups"),
    ):
        arguments = {"weights": None, "levels": (-8, 7), "table": None, "trials": trials, **options}
        with pytest.raises(ValueError, match=message):
            cpu.search_scales(wrong, **arguments)
    for shape, scale_range, message in (
        ((4, 32), (-32, 31), "3 dimensions"),
        ((1, 7, 32), (-32, 31), "8 or 16 groups"),
        ((1, 8, 32), (-300, 31), "8 bits"),
        ((1, 8, 32), (0, 31), "without a range"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.search_blocks(torch.zeros(shape), None, (-4, 3), None, trials, scale_range)
    empty = cpu.search_blocks(torch.zeros(0, 8, 32), None, (-4, 3), None, trials, (-32, 31))
    assert empty.levels.shape == (0, 8, 32)
