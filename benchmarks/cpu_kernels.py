"""Measure the CPU kernels beside the memory's read bandwidth and torch's own linear layers, in one run.

    python benchmarks/cpu_kernels.py [--rows 8192] [--columns 2048] [--tokens 1 8 32 512] [--types Q4_0 Q4_K]
    python benchmarks/cpu_kernels.py --dense [--tokens 1 8 128]

With --dense: bfloat16 weights of the shapes of Llama 3.2 1B, and how many times faster than torch's own.

Each line is the median of rounds in which all candidates take turns, with the 10th and 90th percentile.
GB/s count the bytes of the weight once per call; GOP/s two operations per weight and token.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from puna.gguf_header import GGMLType
from puna.kernels import cpu
from puna.kernels.dense_linear import linear

SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2)}

DENSE_SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192), (128256, 2048))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dense", action="store_true", help="bfloat16 weights instead of quantised ones")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, kernels {cpu.chosen()}")
    if args.dense:
        for rows, columns in DENSE_SHAPES:
            compare_dense(rows, columns, args.tokens, args.rounds)
        return
    print(f"{cpu.num_threads()} threads; weight ({args.rows}, {args.columns})")
    memory = torch.ones(1 << 26)  # 256 MiB, beyond every cache
    weights = {name: tiled(GGMLType[name], args.rows, args.columns) for name in args.types}
    plain = torch.randn(args.rows, args.columns)
    for tokens in args.tokens:
        x = torch.randn(tokens, args.columns)
        candidates: dict[str, tuple[Callable[[], object], int]] = {
            "read (sum)": (lambda: memory.sum(), memory.nbytes),
            "torch float32": (partial(functional.linear, x, plain), plain.nbytes),
        }
        for name, copies in weights.items():
            candidates[name] = (partial(next_product, x, copies), copies[0].tiles.nbytes)
        if tokens <= 32:
            narrow = plain.bfloat16()
            call = partial(functional.linear, x.bfloat16(), narrow)
            candidates["torch bfloat16"] = (call, narrow.nbytes)
        report(tokens, 2 * tokens * plain.numel(), measure(candidates, args.rounds), candidates)


def compare_dense(rows: int, columns: int, token_counts: list[int], rounds: int) -> None:
    """Print the kernel for bfloat16 weights beside torch's own and the memory's bandwidth."""
    print(f"\nbfloat16 weight ({rows}, {columns}), {cpu.num_threads()} threads")
    memory = torch.ones(1 << 26)
    weight = torch.randn(rows, columns).bfloat16()
    copies = [weight.clone() for _ in range(1 + (1 << 27) // weight.nbytes)]
    wide = weight.float()
    for tokens in token_counts:
        x = torch.randn(tokens, columns).bfloat16()
        candidates: dict[str, tuple[Callable[[], object], int]] = {
            "read (sum)": (lambda: memory.sum(), memory.nbytes),
            "torch float32": (partial(functional.linear, x.float(), wide), wide.nbytes),
            "torch bfloat16": (partial(next_dense, functional.linear, x, copies), weight.nbytes),
            "puna bfloat16": (partial(next_dense, linear, x, copies), weight.nbytes),
        }
        times = measure(candidates, rounds)
        report(tokens, 2 * tokens * weight.numel(), times, candidates)
        pairs = [times[name][len(times[name]) // 2] for name in ("torch bfloat16", "puna bfloat16")]
        print(f"puna is {pairs[0] / pairs[1]:.1f} times as fast as torch in bfloat16")


def next_dense(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, copies: list[Tensor]) -> None:
    """Multiply with the copy that was used longest ago, so that its values come from memory."""
    copies.append(copies.pop(0))
    multiply(x, copies[0])


def tiled(kind: GGMLType, rows: int, columns: int) -> list[cpu.TiledWeight]:
    """Make copies of a random weight that together exceed the caches."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (rows, columns // kind.block_size, kind.type_size), dtype=np.uint8)
    for at in SCALES.get(kind.name, (0,)):
        scales = (0.01 * rng.standard_normal((*data.shape[:2], 1))).astype(np.float16)
        data[..., at : at + 2] = scales.view(np.uint8)
    packed = torch.from_numpy(data.reshape(rows, -1))
    return [cpu.TiledWeight.pack(packed, kind) for _ in range(1 + (1 << 27) // packed.nbytes)]


def next_product(x: Tensor, copies: list[cpu.TiledWeight]) -> None:
    """Multiply with the copy that was used longest ago, so that its bytes come from memory."""
    copies.append(copies.pop(0))
    cpu.quant_linear(x, copies[:1])


def measure(candidates: dict[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, (call, _) in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(values[1:]) for name, values in times.items()}


def report(
    tokens: int,
    operations: int,
    times: dict[str, list[float]],
    candidates: dict[str, tuple[Callable[[], object], int]],
) -> None:
    print(f"\n{tokens} tokens      median ms   (10% .. 90%)        GB/s    GOP/s")
    for name, values in times.items():
        low, median, high = (values[int(len(values) * part)] for part in (0.1, 0.5, 0.9))
        speed = "" if name.startswith("read") else f"{operations / median / 1e9:8.0f}"
        spread = f"({low * 1e3:.2f} .. {high * 1e3:.2f})"
        print(
            f"{name:16} {median * 1e3:9.2f}   {spread:18} {candidates[name][1] / median / 1e9:7.1f} {speed}"
        )


if __name__ == "__main__":
    main()
