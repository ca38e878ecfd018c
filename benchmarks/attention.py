"""Measure attention over the paged cache, compiled and in torch, in turns, in one run.

    python benchmarks/attention.py [--heads 32] [--kv-heads 8] [--head-dim 64] [--dtype bfloat16] [--rounds 9]

Each line is the median of rounds in which all candidates take turns, in microseconds per call with the
writing of the new keys and values; GB/s count the keys and values once. "whole": a sequence's blocks follow
each other; "shuffled": they lie anywhere.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from puna.engine.paged_cache import PagedAttention, PagedKVCache
from puna.kernels import cpu
from puna.model.config import LlamaConfig, RopeConfig

BLOCK = 16


def main() -> None:
    """Run all shapes and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache-dtype", default="bfloat16")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, kernels {cpu.chosen()}, {cpu.num_threads()} threads")
    for batch in args.batches:
        for context in args.contexts:
            measure(f"decode {batch:3} x {context:6}", [context - 1] * batch, [1] * batch, args)
    measure("prefill 512", [0], [512], args)
    measure("prefill 512 after 1536", [1536], [512], args)


def make_config(args: argparse.Namespace) -> LlamaConfig:
    """Return a config of one layer with these heads."""
    return LlamaConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=args.heads * args.head_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=max(args.contexts),
        rms_norm_eps=1e-5,
        rope=RopeConfig(rope_theta=10000.0),
    )


def measure(name: str, starts: list[int], counts: list[int], args: argparse.Namespace) -> None:
    """Print the medians of one batch."""
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    sizes = [-(-end // BLOCK) for end in ends]
    dtype = getattr(torch, args.dtype)
    cache = PagedKVCache(
        make_config(args), num_blocks=sum(sizes), block_size=BLOCK, dtype=getattr(torch, args.cache_dtype)
    )
    for kept in (*cache.keys, *cache.values):
        kept.copy_(torch.randn(kept.shape))
    q = torch.randn(sum(counts), args.heads, args.head_dim).to(dtype)
    new = torch.randn(sum(counts), args.kv_heads, args.head_dim).to(dtype)
    candidates: dict[str, Callable[[], object]] = {}
    for layout in ("whole", "shuffled"):
        blocks = list(range(sum(sizes)))
        if layout == "shuffled":
            random.Random(0).shuffle(blocks)
        tables = [[blocks.pop() for _ in range(size)][::-1] for size in sizes]
        for kind in ("compiled", "torch"):
            attention = PagedAttention(cache, tables, starts, counts, use_compiled=kind == "compiled")
            scale = args.head_dim**-0.5
            candidates[f"{kind} {layout}"] = partial(
                attention, q, new, new, layer=0, scale=scale, chunk_size=None
            )
    times: dict[str, list[float]] = {key: [] for key in candidates}
    for turn in range(args.rounds + 1):
        for key, call in candidates.items():
            began = time.perf_counter()
            call()
            if turn > 0:
                times[key].append(time.perf_counter() - began)
    medians = {key: statistics.median(values) for key, values in times.items()}
    read = sum(ends) * 2 * args.kv_heads * args.head_dim * cache.keys[0].element_size()
    columns = "  ".join(f"{key} {1e6 * value:9.0f} us" for key, value in medians.items())
    print(f"{name:24} {columns}   {read / medians['compiled whole'] / 1e9:5.1f} GB/s", flush=True)


if __name__ == "__main__":
    main()
