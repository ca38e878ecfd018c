"""Prefill and decode of a 1B-shaped bfloat16 model: Puna beside Transformers, in turns, in one process.

    python benchmarks/generation.py [--dir FOLDER] [--rounds 5] [--prompt 512] [--new 32]

Prints tokens per second of each (median, min, max) and the ratio of each round's pair (median, min, max).
Decoding time is that of `new + 1` tokens less that of one, from the same prompt of 32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import SamplingParams
from puna.weights.loader import load_model

from shapes import make_checkpoint

Generate = Callable[[list[int], int], list[int]]


def puna_generate(path: Path) -> Generate:
    """Return a greedy generate(prompt, count) on Puna's engine, without prefix reuse."""
    engine = LLMEngine(
        load_model(path), EngineConfig(enable_prefix_caching=False, max_model_len=4096, max_num_seqs=1)
    )

    def generate(prompt: list[int], count: int) -> list[int]:
        engine.add("a", prompt, SamplingParams(temperature=0.0, max_tokens=count))
        new: list[int] = []
        while engine.has_unfinished:
            new += [token for output in engine.step() for token in output.new_token_ids]
        return new

    return generate


def transformers_generate(path: Path) -> Generate:
    """Return a greedy generate(prompt, count) on Transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.eval()

    @torch.inference_mode()
    def generate(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        new: list[int] = out[0, len(prompt) :].tolist()
        return new

    return generate


def seconds(generate: Generate, prompt: list[int], count: int) -> float:
    """Time one call."""
    began = time.perf_counter()
    assert len(generate(prompt, count)) == count
    return time.perf_counter() - began


def main() -> None:
    """Run both in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "puna-bench")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    arguments = parser.parse_args()
    path = make_checkpoint(arguments.dir, "Llama 3.2 1B")
    contestants = {"puna": puna_generate(path), "transformers": transformers_generate(path)}
    long_prompt = [(7 * i) % 100_000 for i in range(arguments.prompt)]
    short_prompt = long_prompt[:32]
    same = {name: tuple(generate(short_prompt, 8)) for name, generate in contestants.items()}
    print(f"threads {torch.get_num_threads()}; first 8 greedy tokens equal: {len(set(same.values())) == 1}")
    rates: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
    for _ in range(arguments.rounds):
        for name, generate in contestants.items():
            prefill = arguments.prompt / seconds(generate, long_prompt, 1)
            first = seconds(generate, short_prompt, 1)
            decode = arguments.new / (seconds(generate, short_prompt, arguments.new + 1) - first)
            rates["prefill"].setdefault(name, []).append(prefill)
            rates["decode"].setdefault(name, []).append(decode)
    for phase, by_name in rates.items():
        for name, values in by_name.items():
            print(f"{phase:8} {name:13} tok/s  {_spread(values)}")
        ratios = [a / b for a, b in zip(by_name["puna"], by_name["transformers"], strict=True)]
        print(f"{phase:8} puna/transformers   {_spread(ratios)}")


def _spread(values: list[float]) -> str:
    return f"median {statistics.median(values):8.2f}   min {min(values):8.2f}   max {max(values):8.2f}"


if __name__ == "__main__":
    main()
