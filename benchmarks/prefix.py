"""Two requests that share a prefix: how much of the second's prompt is computed, and how long each takes.

    python benchmarks/prefix.py                           # 1B-shaped bfloat16, 2,000 tokens shared, 5 rounds
    python benchmarks/prefix.py --shape tiny --prefix 200 --rounds 1

Each round has a prefix of its own, so nothing is left of the round before. The times are those to the first
token, in one process. "computed" counts what went through the model; "cached" what the engine found.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from batch import SHAPES, checkpoint

from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import SamplingParams
from puna.weights.loader import load_model


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "puna-bench")
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--prefix", type=int, default=2000, help="tokens that both prompts begin with")
    parser.add_argument("--tail", type=int, default=50, help="tokens that each prompt has for itself")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-json", type=Path)
    arguments = parser.parse_args()
    length = arguments.prefix + arguments.tail
    engine = LLMEngine(
        load_model(checkpoint(arguments.dir, arguments.shape)),
        EngineConfig(max_model_len=length + 1, max_num_seqs=2),
    )
    rng = random.Random(arguments.seed)
    vocabulary = range(engine.model.config.vocab_size)
    rounds = []
    for number in range(arguments.rounds + 1):
        prefix = rng.choices(vocabulary, k=arguments.prefix)
        pair = [prefill(engine, prefix + rng.choices(vocabulary, k=arguments.tail)) for _ in range(2)]
        if number:  # the round before the first is the warm-up
            rounds.append(pair)
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}; {arguments.shape}")
    for name, which in (("first", 0), ("second", 1)):
        print(row(name, [pair[which] for pair in rounds]))
    tokens = [second["computed"] / first["computed"] for first, second in rounds]
    times = [second["seconds"] / first["seconds"] for first, second in rounds]
    print(f"second/first: {max(tokens):.2%} of the tokens computed, {spread(times)} of the time")
    if arguments.output_json:
        result = {**vars(arguments), "dir": str(arguments.dir), "output_json": None, "rounds": rounds}
        arguments.output_json.write_text(json.dumps(result, indent=1) + "\n")


def prefill(engine: LLMEngine, prompt: list[int]) -> dict[str, Any]:
    """Answer with one token; return the seconds, and the prompt's tokens that were computed and found."""
    before = engine.stats.prompt_tokens
    began = time.perf_counter()
    engine.add("one", prompt, SamplingParams(temperature=0.0, max_tokens=1))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    seconds = time.perf_counter() - began
    (output,) = outputs
    computed = engine.stats.prompt_tokens - before
    return {"seconds": seconds, "computed": computed, "cached": output.sequence.num_cached}


def row(name: str, found: list[dict[str, Any]]) -> str:
    """Return one line of the table."""
    computed, cached = max(one["computed"] for one in found), min(one["cached"] for one in found)
    seconds = spread([one["seconds"] for one in found])
    return f"{name:7} computed {computed:6}   cached {cached:6}   seconds to first token: {seconds}"


def spread(values: list[float]) -> str:
    """Return median, min and max as text."""
    return f"median {statistics.median(values):.4f} (min {min(values):.4f}, max {max(values):.4f})"


if __name__ == "__main__":
    main()
