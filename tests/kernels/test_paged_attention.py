"""Compiled attention over the paged cache against float64, for every usable instruction set."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

cpu = pytest.importorskip(
    "puna.kernels.cpu", reason="the compiled kernels were not built", exc_type=ImportError
)

E4M3 = torch.float8_e4m3fn


@pytest.fixture(params=cpu.usable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.chosen()
    cpu.choose(request.param)
    yield request.param
    cpu.choose(before)


class Case:
    """Random sequences in random blocks of a cache whose other blocks are NaN."""

    def __init__(
        self,
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        kv_heads: int = 2,
        group: int = 4,
        head_dim: int = 64,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = [-(-(s + c) // block_size) for s, c in zip(starts, counts, strict=True)]
        self.num_blocks, self.block_size = sum(sizes) + 3, block_size
        shuffled = random.Random(seed).sample(range(self.num_blocks), self.num_blocks)
        self.tables = torch.full((len(sizes), max(sizes)), -1, dtype=torch.int32)
        shape = (self.num_blocks, block_size, kv_heads, head_dim)
        keys, values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        for row, size in enumerate(sizes):
            blocks = [shuffled.pop() for _ in range(size)]
            self.tables[row, :size] = torch.tensor(blocks)
            for tensor in (keys, values):
                tensor[blocks] = torch.randn((size, *shape[1:]), generator=generator)
        self.scales = None
        if cache_dtype == torch.int8:
            self.scales = tuple(t.abs().amax(-1) / 127 for t in (keys, values))
            keys, values = (
                (t / s[..., None]).round().nan_to_num()
                for t, s in zip((keys, values), self.scales, strict=True)
            )
        self.keys, self.values = (t.to(cache_dtype or dtype) for t in (keys, values))
        self.q = torch.randn(sum(counts), kv_heads * group, head_dim, generator=generator).to(dtype)
        self.starts, self.counts = torch.tensor(starts), torch.tensor(counts)
        self.scale = head_dim**-0.5

    def batch(self) -> Any:
        return cpu.PagedBatch(
            self.tables, self.starts, self.counts, num_blocks=self.num_blocks, block_size=self.block_size
        )

    def run(self, chunk_size: int | None = None) -> Tensor:
        out: Tensor = cpu.paged_attention(
            self.q,
            self.keys,
            self.values,
            self.batch(),
            scale=self.scale,
            chunk_size=chunk_size,
            scales=self.scales,
        )
        return out

    def kept_values(self) -> tuple[Tensor, ...]:
        """Return keys and values in float64, of the whole cache."""
        kept = (self.keys.float().double(), self.values.float().double())
        if self.scales is None:
            return kept
        return tuple(t * s[..., None].double() for t, s in zip(kept, self.scales, strict=True))

    def exact(self, chunk_size: int | None = None) -> Tensor:
        """Attend in float64 with a whole score matrix."""
        outs, row = [], 0
        group = self.q.shape[1] // self.keys.shape[2]
        for table, start, count in zip(self.tables, self.starts.tolist(), self.counts.tolist(), strict=True):
            end = start + count
            blocks = table[: -(-end // self.block_size)].long()
            keys, values = (
                t[blocks].flatten(0, 1)[:end].repeat_interleave(group, 1) for t in self.kept_values()
            )
            scores = torch.einsum("qhd,khd->hqk", self.q[row : row + count].double(), keys) * self.scale
            own, seen = torch.arange(start, end)[:, None], torch.arange(end)
            hidden = seen > own
            if chunk_size is not None:
                hidden |= seen < own // chunk_size * chunk_size
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, values))
            row += count
        return torch.cat(outs)

    def check(self, chunk_size: int | None = None, *, atol: float = 3e-6) -> None:
        out, exact = self.run(chunk_size), self.exact(chunk_size)
        assert out.dtype == self.q.dtype
        # The result is rounded once; what comes before is float32.
        rounding = torch.finfo(out.dtype).eps / 2
        torch.testing.assert_close(out.double(), exact, rtol=rounding + 2e-6, atol=atol)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_decode_and_prefill_mixed(isa: str, group: int, head_dim: int) -> None:
    Case([0, 37, 130, 0], [21, 1, 3, 1], group=group, head_dim=head_dim).check()


@pytest.mark.parametrize("head_dim", [1, 8, 20, 72])
def test_head_dims_that_are_no_whole_vector(isa: str, head_dim: int) -> None:
    Case([0, 17], [40, 1], kv_heads=3, head_dim=head_dim).check()


@pytest.mark.parametrize("block_size", [1, 7, 16, 64, 100])
def test_block_sizes(isa: str, block_size: int) -> None:
    Case([90, 0, 150], [1, 70, 5], kv_heads=1, block_size=block_size).check()


@pytest.mark.parametrize("chunk_size", [1, 8, 50, 64, 1000])
def test_chunks_of_positions(isa: str, chunk_size: int) -> None:
    Case([90, 0, 150], [1, 120, 5], kv_heads=1).check(chunk_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16, E4M3, torch.int8])
@pytest.mark.parametrize("head_dim", [32, 40])
def test_dtypes(isa: str, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
    Case([0, 37, 77], [33, 1, 2], head_dim=head_dim, dtype=dtype, cache_dtype=cache_dtype).check()


def test_long_contexts_are_split_and_merged(isa: str) -> None:
    Case([700, 520, 255, 256], [1, 5, 1, 16], kv_heads=1, head_dim=16).check()


def test_prompts_of_several_query_blocks(isa: str) -> None:
    Case([0, 50], [200, 97], kv_heads=1, group=1, head_dim=16).check()
    Case([3], [1], kv_heads=1, group=130, head_dim=16).check()  # more heads than rows of a block


def test_scores_far_apart(isa: str) -> None:
    case = Case([300, 0], [1, 90], kv_heads=1)
    case.q *= 100
    case.check(atol=1e-4)  # scores of some hundred have steps of 3e-5


def test_all_bytes_of_e4m3(isa: str) -> None:
    case = Case([15], [1], kv_heads=1, group=1, head_dim=16, block_size=16, cache_dtype=E4M3)
    case.keys = torch.zeros_like(case.keys.float()).to(E4M3)
    every = torch.arange(256, dtype=torch.uint8).view(E4M3)
    finite = torch.where(every.float().isnan(), 0, every.float())
    case.values[case.tables[0, 0]] = finite.to(E4M3).view(16, 1, 16)
    torch.testing.assert_close(case.run()[0, 0], finite.view(16, 16).mean(0), rtol=1e-6, atol=1e-6)
    case.values[case.tables[0, 0]] = every.view(16, 1, 16)
    assert case.run().isnan().any(0)[0].tolist() == [False] * 15 + [True]


def test_what_is_not_a_number_shows(isa: str) -> None:
    for counts in (1, 70):
        case = Case([0], [counts], kv_heads=2, group=2)
        case.q[counts - 1, 1, 5] = torch.nan
        out = case.run()
        assert out[counts - 1, 1].isnan().all()
        assert out[counts - 1, [0, 2, 3]].isfinite().all()
        assert out[: counts - 1].isfinite().all()


def test_a_sequence_does_not_depend_on_its_batch(isa: str) -> None:
    together = Case([600, 40, 0], [1, 1, 50], dtype=torch.bfloat16)
    whole = together.run()
    for row, tokens in enumerate((slice(0, 1), slice(1, 2), slice(2, 52))):
        batch = cpu.PagedBatch(
            together.tables[row : row + 1],
            together.starts[row : row + 1],
            together.counts[row : row + 1],
            num_blocks=together.num_blocks,
            block_size=16,
        )
        alone = cpu.paged_attention(
            together.q[tokens], together.keys, together.values, batch, scale=together.scale
        )
        assert torch.equal(alone, whole[tokens])


def test_threads_do_not_change_the_result() -> None:
    case = Case([1000, 40], [1, 50], kv_heads=1)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(case.run())
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_queries_that_are_part_of_a_wider_tensor(isa: str) -> None:
    case = Case([0, 20], [10, 1])
    exact = case.exact()
    wide = torch.full((11, 3 * 8, 64), torch.nan)
    wide[:, 8:16] = case.q
    case.q = wide[:, 8:16]
    torch.testing.assert_close(case.run().double(), exact, rtol=2e-6, atol=3e-6)
    case.q = wide[:, 8:16].transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(case.run().double(), exact, rtol=2e-6, atol=3e-6)


def test_wrong_calls_raise() -> None:
    case = Case([0, 20], [10, 1])

    def batch(**changes: object) -> Any:
        arguments = {"block_tables": case.tables, "starts": case.starts, "counts": case.counts}
        sizes = {"num_blocks": case.num_blocks, "block_size": 16}
        return cpu.PagedBatch(**(arguments | sizes | changes))

    def attend(q: Tensor, keys: Tensor, values: Tensor, chunk_size: int | None = None) -> None:
        cpu.paged_attention(q, keys, values, case.batch(), scale=1.0, chunk_size=chunk_size)

    wrong_block = case.tables.clone()
    wrong_block[1, 1] = case.num_blocks
    for changes, message in (
        ({"block_tables": wrong_block}, f"no block {case.num_blocks}"),
        ({"block_tables": -case.tables - 1}, "no block -"),
        ({"block_tables": case.tables.long()}, "int32"),
        ({"block_tables": case.tables[:1]}, "one start"),
        ({"block_tables": case.tables[:, :1]}, "20 \\+ 1 tokens does not fit"),
        ({"starts": torch.tensor([0, -1])}, "-1 \\+ 1 tokens"),
        ({"starts": torch.tensor([0, 2**63 - 1])}, "does not fit"),
        ({"counts": torch.tensor([10, 0])}, "20 \\+ 0 tokens"),
        ({"counts": case.counts.int()}, "int64"),
        ({"num_blocks": 0}, "empty"),
        ({"block_size": 1 << 40}, "huge"),
    ):
        with pytest.raises(ValueError, match=message):
            batch(**changes)
    q, keys, values = case.q, case.keys, case.values
    for arguments, message in (
        ((q.double(), keys, values), "float64"),
        ((q, keys.double(), values.double()), "float64"),
        ((q, keys, values.bfloat16()), "differ"),
        ((q, keys, values[1:]), "differ"),
        ((q, keys[1:], values[1:]), "do not fit"),
        ((q[..., :32], keys, values), "do not fit"),
        ((q.flatten(1), keys, values), "do not fit"),
        ((q, keys.transpose(2, 3).contiguous().transpose(2, 3), values), "not contiguous"),
        ((q[1:], keys, values), "10 tokens were given, the sequences have 11"),
        ((q[:, :7], keys, values), "7 heads cannot share 2"),
        ((q[:, :0], keys, values), "0 heads cannot share 2"),
        ((q, keys, values, 0), "chunk_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(*arguments)


MANY = """
import re, torch
from pathlib import Path
from puna.kernels import cpu
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
cache = torch.full((1, 64, 1, 16), 0.5)
def attend(sequences, length):
    tables = torch.zeros(sequences, length // 64, dtype=torch.int32)  # they share one block
    starts, counts = torch.full((sequences,), length - 16), torch.full((sequences,), 16)
    batch = cpu.PagedBatch(tables, starts, counts, num_blocks=1, block_size=64)
    q = torch.ones(sequences * 16, 16, 16)
    out = cpu.paged_attention(q, cache, cache, batch, scale=0.25)
    assert ((out - 0.5).abs() < 1e-6).all()
attend(1, 1024)
before = peak()
attend(32, 16384)
print(peak() - before)
"""


def test_many_sequences_that_share_a_long_context_take_little_memory() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell the peak of memory")
    result = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 12 * 1024  # KiB


def test_no_tokens() -> None:
    batch = cpu.PagedBatch(
        torch.empty(0, 0, dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
        num_blocks=2,
        block_size=4,
    )
    cache = torch.zeros(2, 4, 1, 8)
    assert cpu.paged_attention(torch.empty(0, 1, 8), cache, cache, batch, scale=1.0).shape == (0, 1, 8)
