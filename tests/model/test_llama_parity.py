"""Logits equal Transformers' on tiny random models, for every switch of the architecture.

Each case is checked twice: a whole prompt at once, and the same tokens through a cache, a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.engine.paged_cache import PagedAttention, PagedKVCache
from puna.model import Llama, PackedAttention

from tiny import hf_llama, hf_llama4, puna_twin

TOLERANCE = 1e-5

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

DENSE: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "wide_heads": {"head_dim": 24},
    "narrow_heads": {"head_dim": 4},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "theta": {"rope_theta": 500000.0},
    "eps": {"rms_norm_eps": 1e-2},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "linear_old_name": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "yarn": {"rope_scaling": YARN},
    "yarn_not_truncated": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn_mscale": {"rope_scaling": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 16.0}},
    "yarn_attention_factor": {"rope_scaling": {**YARN, "attention_factor": 1.3}},
}

LLAMA4: dict[str, dict[str, Any]] = {
    "scout": {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0, "factor": 16.0, "rope_theta": 5e5}},
    "maverick": {"interleave_moe_layer_step": 2, "use_qk_norm": False},
    "two_experts_each": {"num_experts_per_tok": 2},
    "no_temperature": {"attn_temperature_tuning": False},
    "rope_everywhere": {"no_rope_layers": [1, 1, 1, 1]},
    "no_chunks": {"attention_chunk_size": 4096},
    "listed_layers": {"moe_layers": [1, 2], "no_rope_layers": [1, 0, 1, 0]},
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_logits_equal_transformers(name: str) -> None:
    theirs = hf_llama(**DENSE[name])
    _compare(theirs, puna_twin(theirs), positions=torch.arange(40))


@pytest.mark.parametrize("name", LLAMA4)
def test_llama4_logits_equal_transformers(name: str) -> None:
    theirs = hf_llama4(**LLAMA4[name])
    _compare(theirs, puna_twin(theirs), positions=torch.arange(40))


def test_far_positions_with_llama3_scaling() -> None:
    theirs = hf_llama(
        rope_theta=500000.0,
        max_position_embeddings=131072,
        rope_scaling={**LLAMA3_ROPE, "original_max_position_embeddings": 8192},
    )
    _compare(theirs, puna_twin(theirs), positions=torch.arange(131072 - 40, 131072))


def test_sequences_in_one_row_do_not_see_each_other() -> None:
    theirs = hf_llama4()
    ours = puna_twin(theirs)
    ids = torch.arange(50) % 96
    positions = torch.cat([torch.arange(n) for n in (7, 30, 13)])
    packed = ours(ids, positions, PackedAttention([0, 7, 37, 50]))
    alone = [_run_hf(theirs, part, torch.arange(len(part))) for part in (ids[:7], ids[7:37], ids[37:])]
    torch.testing.assert_close(packed, torch.cat(alone), atol=TOLERANCE, rtol=0)


def test_select_gives_the_chosen_rows_only() -> None:
    ours = puna_twin(hf_llama())
    ids, positions, attention = torch.arange(9), torch.arange(9), PackedAttention([0, 9])
    chosen = ours(ids, positions, attention, torch.tensor([8, 2]))
    torch.testing.assert_close(chosen, ours(ids, positions, attention)[[8, 2]], atol=1e-5, rtol=0)


def _compare(theirs: Any, ours: Llama, positions: Tensor) -> None:
    ids = torch.randint(0, 96, (len(positions),), generator=torch.Generator().manual_seed(1))
    expected = _run_hf(theirs, ids, positions)
    lengths = [0, len(ids)]
    whole = ours(ids, positions, _Offset(PackedAttention(lengths), int(positions[0])))
    torch.testing.assert_close(whole, expected, atol=TOLERANCE, rtol=0)
    if int(positions[0]) == 0:
        _compare_cached(theirs, ours, ids)


def _compare_cached(theirs: Any, ours: Llama, ids: Tensor) -> None:
    """Feed the ids in uneven steps to both caches: 11 (a prompt), 6 (a continued prompt), then one by one."""
    from transformers import DynamicCache

    their_cache = DynamicCache(config=theirs.config)
    mine = PagedKVCache(ours.config, num_blocks=6, block_size=8, dtype=torch.float32)
    table = [4, 1, 2, 0, 5, 3]
    assert len(ids) <= 48
    for start, end in _steps(len(ids)):
        part, positions = ids[start:end], torch.arange(start, end)
        got = ours(part, positions, PagedAttention(mine, [table], [start], [end - start]))
        with torch.no_grad():
            want = theirs(part[None], past_key_values=their_cache, position_ids=positions[None]).logits[0]
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def _steps(length: int) -> Iterator[tuple[int, int]]:
    yield 0, 11
    yield 11, 17
    for i in range(17, length):
        yield i, i + 1


def _run_hf(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids[None], position_ids=positions[None], use_cache=False).logits[0]
    return logits


class _Offset:
    """Attend as if the row began at a position other than 0 (no chunks there)."""

    def __init__(self, inner: PackedAttention, offset: int) -> None:
        self.inner, self.offset = inner, offset

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, chunk_size: int | None
    ) -> Tensor:
        return self.inner(q, k, v, layer=layer, scale=scale, chunk_size=chunk_size)

    def lengths(self) -> Tensor:
        return self.inner.lengths() + self.offset
