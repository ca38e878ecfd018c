"""Measure the time and the memory of loading a quantised GGUF file, beside the time that reading it takes.

    python benchmarks/load_gguf.py FILE... [--rounds 3] [--cold] [--threads 2]

In turns: `cat FILE > /dev/null`, then a process of its own that loads the file and lets the engine write
three tokens. Resident memory is counted with and without what Python, torch and Puna's modules take before
the file is opened; the cache's size is known and taken off. Rules: at most 1.1 times the file beside the
cache, and at most twice the time of `cat`. With --cold the file is dropped from the page cache before each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from load import drop_from_page_cache

GB = 1_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.files[0])))
        return
    for path in args.files:
        report(path, args.rounds, cold=args.cold, threads=args.threads)


def report(path: Path, rounds: int, *, cold: bool, threads: int) -> None:
    """Measure one file in turns and print medians."""
    reads, loads = [], []
    for _ in range(rounds):
        if cold:
            drop_from_page_cache([path])
        began = time.perf_counter()
        with open(os.devnull, "wb") as nothing:
            subprocess.run(["cat", path], stdout=nothing, check=True)
        reads.append(time.perf_counter() - began)
        if cold:
            drop_from_page_cache([path])
        command = [sys.executable, __file__, str(path), "--measure"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
        loads.append(json.loads(done.stdout.splitlines()[-1]))
    size = path.stat().st_size
    seconds = statistics.median(load["seconds"] for load in loads)
    read = statistics.median(reads)
    ratios = [load["seconds"] / cat for load, cat in zip(loads, reads, strict=True)]
    print(
        f"{path.name}: {size / GB:.3f} GB, {threads} threads, {rounds} rounds, {'cold' if cold else 'warm'}"
    )
    print(
        f"  cat {read:.2f} s, load {seconds:.2f} s: {statistics.median(ratios):.2f} times"
        f" ({min(ratios):.2f}-{max(ratios):.2f})"
    )
    for what in ("loaded", "running", "peak"):
        resident = statistics.median(load[what] for load in loads)
        before = statistics.median(load["imports"] for load in loads)
        rest = resident - (0 if what == "loaded" else loads[0]["cache"])
        print(
            f"  {what:8} {resident / GB:.3f} GB; without the cache {rest / size:.3f} of the file,"
            f" and without {before / GB:.3f} GB of imports {(rest - before) / size:.3f}",
            flush=True,
        )


def measure(path: Path) -> dict[str, float]:
    """Load once, write three tokens; return seconds, and bytes that are resident."""
    from puna.engine.llm_engine import EngineConfig, LLMEngine
    from puna.engine.sampling import SamplingParams
    from puna.weights.loader import load_model

    found = {"imports": resident("VmRSS")}
    began = time.perf_counter()
    model = load_model(path)
    found["seconds"] = time.perf_counter() - began
    found["loaded"] = resident("VmRSS")
    engine = LLMEngine(model, EngineConfig(max_model_len=512, kv_cache_memory_bytes=1 << 26))
    cache = [*engine.runner.cache.keys, *engine.runner.cache.values]
    for part in cache:
        part.zero_()  # or its pages were not there yet
    found["cache"] = float(sum(part.nbytes for part in cache))
    engine.add("0", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    return found | {"running": resident("VmRSS"), "peak": resident("VmHWM")}


def resident(what: str) -> float:
    """Return a count of bytes of this process."""
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{what}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
