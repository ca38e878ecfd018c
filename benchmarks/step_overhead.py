"""What a step costs beside the forward pass, while an answer grows: it must not grow with it.

    python benchmarks/step_overhead.py [--tokens 4000] [--sequences 1]

A tiny random model writes `tokens` tokens with different settings. The time of the engine's steps (and of the
outputs that a stream would get) is taken less the time inside the network, where attention does grow with the
context. Processor time of the one thread is counted, so that other programs matter little. Prints, for each
setting, the median microseconds per sequence and step before some lengths.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from puna.cria import FOLDER
from puna.engine.llm_engine import EngineConfig
from puna.engine.sampling import SamplingParams
from puna.model import Llama, LlamaConfig
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.text_engine import TextEngine

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
    "stop string": {"temperature": 0.0, "stop": ["no such words"]},
    "logprobs 2": {"temperature": 0.0, "logprobs": 2},
}
WINDOW = 50  # steps before a length


def tiny_model(vocab_size: int, context: int) -> Llama:
    """Return a random model of one layer."""
    config = LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
        }
    )
    model = Llama(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False).normal_(generator=generator).mul_(0.1)
    return model.eval()


class Stopwatch:
    """Add up the time inside a function."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - began


def overheads(
    tokenizer: Tokenizer, tokens: int, sequences: int, setting: dict[str, Any], *, streams: bool
) -> list[float]:
    """Return the seconds of each step outside of the network, by this thread's own clock."""
    model: Any = tiny_model(tokenizer.vocab_size, tokens + 64)
    model.hidden_states = watch = Stopwatch(model.hidden_states)
    engine = TextEngine(model, tokenizer, EngineConfig(max_num_seqs=sequences))
    params = SamplingParams(**setting, seed=0, ignore_eos=True, max_tokens=tokens)
    for i in range(sequences):
        engine.add(str(i), [1, 2, 3, i + 4], params)
    found = []
    while engine.has_unfinished:
        began, inside = time.thread_time(), watch.seconds
        for request in engine.step():
            if streams:
                request.snapshot()
        found.append(time.thread_time() - began - (watch.seconds - inside))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--sequences", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(FOLDER)
    places = [p for p in (100, 500, 1000, 2000, 4000, 8000) if p <= args.tokens]
    print(f"us per sequence and step at output token {places}")
    for streams in (False, True):
        for name, setting in SETTINGS.items():
            found = overheads(tokenizer, args.tokens, args.sequences, setting, streams=streams)
            medians = [statistics.median(found[max(p - WINDOW, 0) : p]) for p in places]
            row = "  ".join(f"{1e6 * value / args.sequences:7.0f}" for value in medians)
            print(f"{name + (', streamed' if streams else ''):24}{row}", flush=True)


if __name__ == "__main__":
    main()
