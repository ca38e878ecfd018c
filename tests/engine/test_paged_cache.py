"""The paged cache and attention over it, compiled and in torch, against attention over plain tensors."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puna.engine import paged_cache
from puna.engine.paged_cache import PagedAttention, PagedKVCache
from puna.kernels import compiled
from puna.model.config import LlamaConfig, RopeConfig

FORMS = pytest.mark.parametrize(
    "use_compiled",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(compiled() is None, reason="the compiled kernels are not in use")
        ),
    ],
)


def make_cache(num_blocks: int, block_size: int = 4, dtype: torch.dtype = torch.float32) -> PagedKVCache:
    config = LlamaConfig(
        model_type="llama",
        vocab_size=8,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(rope_theta=1e4),
    )
    return PagedKVCache(config, num_blocks=num_blocks, block_size=block_size, dtype=dtype)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, chunk_size: int | None) -> Tensor:
    """Attend in float64 from the last len(q) positions."""
    own, seen = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
    hidden = seen > own
    if chunk_size is not None:
        hidden |= seen < own // chunk_size * chunk_size
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def feed(
    cache: PagedKVCache,
    tables: Sequence[Sequence[int]],
    steps: Sequence[Sequence[int]],
    *,
    use_compiled: bool,
    chunk_size: int | None = None,
) -> None:
    """Run steps of `steps[i][sequence]` new tokens and compare each with attention over plain tensors."""
    generator = torch.Generator().manual_seed(0)
    known = [(torch.empty(0, 2, 16), torch.empty(0, 2, 16)) for _ in tables]
    for counts in steps:
        rows = sum(counts)
        q = torch.randn(rows, 4, 16, generator=generator)
        k, v = torch.randn(2, rows, 2, 16, generator=generator)
        starts = [len(keys) for keys, _ in known]
        attention = PagedAttention(cache, tables, starts, counts, use_compiled=use_compiled)
        out = attention(q, k, v, layer=1, scale=0.3, chunk_size=chunk_size)
        row = 0
        for i, count in enumerate(counts):
            new = slice(row, row + count)
            known[i] = (torch.cat((known[i][0], k[new])), torch.cat((known[i][1], v[new])))
            wanted = exact(q[new], *known[i], 0.3, chunk_size)
            torch.testing.assert_close(out[new].double(), wanted, rtol=2e-6, atol=3e-6)
            row += count


@FORMS
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("scattered", [False, True])
def test_steps_over_blocks(use_compiled: bool, chunk_size: int | None, scattered: bool) -> None:
    blocks = list(range(24))
    if scattered:
        random.Random(0).shuffle(blocks)
    tables = [blocks[:12], blocks[12:]]
    steps = [[9, 1], [1, 30], [1, 1], [7, 2]]
    feed(make_cache(24), tables, steps, use_compiled=use_compiled, chunk_size=chunk_size)


def test_pieces_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_cache, "_QUERY_PIECE", 4)
    monkeypatch.setattr(paged_cache, "_KEY_PIECE", 6)
    blocks = random.Random(1).sample(range(24), 24)
    feed(make_cache(24), [blocks[:12], blocks[12:]], [[9, 21], [1, 1], [7, 2]], use_compiled=False)


@FORMS
def test_no_sequences(use_compiled: bool) -> None:
    attention = PagedAttention(make_cache(1), [], [], [], use_compiled=use_compiled)
    q, k = torch.empty(0, 4, 16), torch.empty(0, 2, 16)
    assert attention(q, k, k, layer=0, scale=1.0, chunk_size=None).shape == (0, 4, 16)


def test_an_8_bit_cache_keeps_large_values_finite() -> None:
    cache = make_cache(1, dtype=torch.float8_e4m3fn)
    k = torch.tensor([1e4, -1e4, 448.0, 470.0]).view(4, 1, 1).expand(4, 2, 16)
    cache.write(0, torch.arange(4), k, -k.bfloat16())
    for kept, sign in ((cache.keys[0], 1), (cache.values[0], -1)):
        wanted = sign * torch.tensor([448.0, -448.0, 448.0, 448.0])
        assert torch.equal(kept.float(), wanted.view(1, 4, 1, 1).expand(1, 4, 2, 16))


def test_what_is_not_a_number_stays_so_in_an_8_bit_cache() -> None:
    cache = make_cache(1, dtype=torch.float8_e4m3fn)
    new = torch.full((1, 2, 16), torch.nan)
    cache.write(0, torch.tensor([2]), new, new)
    assert cache.keys[0][0, 2].float().isnan().all()


@FORMS
def test_a_cache_of_int8_keeps_each_head_within_half_a_step(use_compiled: bool) -> None:
    cache = make_cache(6, dtype=torch.int8)
    q, k, v = torch.randn(9, 4, 16), torch.randn(9, 2, 16), 1000 * torch.randn(9, 2, 16)
    k[3, 1] = 0
    attention = PagedAttention(cache, [[4, 0, 2]], [0], [9], use_compiled=use_compiled)
    got = attention(q, k, v, layer=0, scale=0.25, chunk_size=None)
    slots = attention.slots
    kept = [
        cache.keys[0].flatten(0, 1)[slots] * cache.key_scales[0].flatten(0, 1)[slots][..., None],
        cache.values[0].flatten(0, 1)[slots] * cache.value_scales[0].flatten(0, 1)[slots][..., None],
    ]
    for read, new in zip(kept, (k, v), strict=True):
        assert ((read - new).abs() <= 0.501 * new.abs().amax(-1, keepdim=True) / 127).all()
    expected = exact(q, kept[0], kept[1], 0.25, None)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-3)
    cache.copy_blocks([(4, 5)])
    assert torch.equal(cache.key_scales[0][5], cache.key_scales[0][4])


LONG = """
import re, torch
from pathlib import Path
from puna.engine.paged_cache import PagedAttention, PagedKVCache
from puna.model.config import LlamaConfig, RopeConfig
config = LlamaConfig(
    model_type="llama", vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=64, max_position_embeddings=131072,
    rms_norm_eps=1e-5, rope=RopeConfig(rope_theta=1e4),
)
cache = PagedKVCache(config, num_blocks=8192, block_size=16, dtype=torch.bfloat16)
generator = torch.Generator().manual_seed(0)
for kept in (*cache.keys, *cache.values):
    kept.fill_(0.5)
table = torch.randperm(8192, generator=generator).tolist()
def peak():
    # Not getrusage, whose peak is inherited from the process that started this one.
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
def attend(start, count, use_compiled):
    q = torch.ones(count, 1, 64, dtype=torch.bfloat16)
    k = torch.full((count, 1, 64), 0.5, dtype=torch.bfloat16)
    attention = PagedAttention(cache, [table], [start], [count], use_compiled=use_compiled)
    out = attention(q, k, k, layer=0, scale=0.125, chunk_size=None)
    assert (out == 0.5).all()
for use_compiled in (True, False):
    attend(64, 64, use_compiled)
    before = peak()
    attend(131072 - 64, 64, use_compiled)
    attend(131071, 1, use_compiled)
    print(peak() - before)
"""


def test_a_context_of_131072_takes_no_score_matrix() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell the peak of memory")
    result = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    for peak in result.stdout.split():
        # KiB. A score matrix would take 64 * 131072 * 4 bytes, 32 MiB, a copy of the cache the same.
        assert int(peak) < 16 * 1024, result.stdout
