"""Quantised models on the CPU: Puna beside llama.cpp, on the same files, in turns, each in its own process.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python   # its source has all of llama.cpp
    tar xzf llama_cpp_python-*.tar.gz
    python benchmarks/llama_cpp.py --source llama_cpp_python-*/vendor/llama.cpp --dir /tmp/puna-gguf \
        [--shape "Llama 3.2 1B"] [--types Q4_0 Q4_K_M Q8_0] [--streams 16 32] [--rounds 3] [--threads 2]

Builds llama.cpp for this machine (`-DGGML_NATIVE=ON`), writes a random F16 model of the shape with its own
converter's names, quantises it with llama-quantize, then measures the prefill of 512 tokens, decoding of 64
from an empty context, and decoding of several streams at once (llama-bench, llama-batched-bench). Prints the
median of each, in tokens per second, and the median, minimum and maximum of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np

from puna.catalog.lineup import LINEUP

PROMPT, NEW, STREAM_PROMPT, DEEP_NEW = 512, 64, 32, 16
TARGETS = ("llama-bench", "llama-batched-bench", "llama-quantize")
Rates = dict[str, float]


def main() -> None:
    """Build, write, quantise what is missing, measure in turns and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="llama.cpp's source; built in a folder `build` beside it")
    parser.add_argument("--build", type=Path, help="a folder where llama.cpp is built already")
    parser.add_argument("--dir", type=Path, help="folder of the models, made if absent")
    parser.add_argument("--shape", default="Llama 3.2 1B")
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q4_K_M", "Q8_0"])
    parser.add_argument("--streams", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--depth", type=int, default=0, help="also decode after a context of so many tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_puna(args.measure, args.streams, args.depth)))
        return
    if not args.dir or not (args.source or args.build):
        parser.error("--dir and one of --source and --build are needed")
    build = args.build or build_llama_cpp(args.source)
    for kind in args.types:
        model = quantised(args.dir, args.shape, kind, build)
        size = model.stat().st_size
        rounds: list[tuple[Rates, Rates]] = []
        for _ in range(args.rounds):
            rounds.append((run_puna(model, args), run_llama_cpp(model, build, args)))
        print(f"{args.shape} {kind}, {size / 1e9:.2f} GB, {args.threads} threads, {args.rounds} rounds")
        for what in rounds[0][1]:
            ours, theirs = ([pair[side][what] for pair in rounds] for side in (0, 1))
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            print(
                f"  {what:12} puna {statistics.median(ours):8.1f}"
                f"   llama.cpp {statistics.median(theirs):8.1f}"
                f"   ratio {statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            )
        peak = statistics.median(pair[0]["peak"] for pair in rounds)
        load = statistics.median(pair[0]["load"] for pair in rounds)
        share = statistics.median(pair[0]["decode"] * size / pair[0]["bandwidth"] for pair in rounds)
        bandwidth = statistics.median(pair[0]["bandwidth"] for pair in rounds) / 1e9
        print(f"  puna decodes at {share:.0%} of what torch's reading of {bandwidth:.1f} GB/s allows")
        print(f"  puna loads in {load:.1f} s; most memory {peak / size:.2f} of the file", flush=True)


def build_llama_cpp(source: Path) -> Path:
    """Build the programs that are measured, once."""
    build = source / "build"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"]
    subprocess.run(["cmake", "-S", source, "-B", build, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        ["cmake", "--build", build, "-j", str(os.cpu_count()), "--target", *TARGETS],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return build


def quantised(folder: Path, shape: str, kind: str, build: Path) -> Path:
    """Return the model of this shape and type, made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = shape.lower().replace(" ", "-")
    target = folder / f"{stem}-{kind.lower()}.gguf"
    if not target.exists():
        source = folder / f"{stem}-f16.gguf"
        if not source.exists():
            write_random_model(source, shape)
        part = target.with_suffix(".part")
        command: list[str | Path] = [build / "bin" / "llama-quantize", source, part, kind]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        part.rename(target)
    return target


def write_random_model(path: Path, shape: str) -> None:
    """Write random float16 weights with the shape of one of the lineup's dense models, and no vocabulary."""
    config = next(model for model in LINEUP if model.name == shape).hf_config()
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, vocab = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "vocab_size"))
    head_dim = config.get("head_dim") or hidden // heads
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["output"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"blk.{layer}.attn_norm": (hidden,),
            f"blk.{layer}.ffn_norm": (hidden,),
            f"blk.{layer}.attn_q": (heads * head_dim, hidden),
            f"blk.{layer}.attn_k": (kv_heads * head_dim, hidden),
            f"blk.{layer}.attn_v": (kv_heads * head_dim, hidden),
            f"blk.{layer}.attn_output": (hidden, heads * head_dim),
            f"blk.{layer}.ffn_gate": (width, hidden),
            f"blk.{layer}.ffn_up": (width, hidden),
            f"blk.{layer}.ffn_down": (hidden, width),
        }
    for name, size in shapes.items():
        kind = np.float32 if len(size) == 1 else np.float16
        writer.add_tensor_info(f"{name}.weight", size, np.dtype(kind), int(np.prod(size)) * kind().itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    noise = np.random.default_rng(0)
    for size in shapes.values():
        if len(size) == 1:
            writer.write_tensor_data(np.ones(size, np.float32))
        else:
            values = noise.standard_normal(size, np.float32) / np.float32(size[1] ** 0.5)
            writer.write_tensor_data(values.astype(np.float16))
    writer.close()
    shutil.move(part, path)


def run_puna(model: Path, args: argparse.Namespace) -> Rates:
    """Measure Puna in a new process."""
    command = [sys.executable, __file__, "--measure", str(model), "--depth", str(args.depth)]
    command += ["--streams", *map(str, args.streams)]
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threads)
    rates: Rates = json.loads(done.stdout.splitlines()[-1])
    return rates


def run_llama_cpp(model: Path, build: Path, args: argparse.Namespace) -> Rates:
    """Measure llama.cpp: its own programs, their own warm-up."""
    threads: list[str | Path] = ["-t", str(args.threads)]
    bench: list[str | Path] = [build / "bin" / "llama-bench", "-m", model, *threads, "-r", "1", "-o", "json"]
    done = subprocess.run(
        [*bench, "-p", str(PROMPT), "-n", str(NEW)], check=True, capture_output=True, text=True
    )
    rates = {"prefill" if row["n_prompt"] else "decode": row["avg_ts"] for row in json.loads(done.stdout)}
    if args.depth:
        deep = [*bench, "-p", "0", "-n", str(DEEP_NEW), "-d", str(args.depth)]
        done = subprocess.run(deep, check=True, capture_output=True, text=True)
        rates[f"decode at {args.depth}"] = json.loads(done.stdout)[0]["avg_ts"]
    if args.streams:
        batched: list[str | Path] = [
            build / "bin" / "llama-batched-bench",
            "-m",
            model,
            *threads,
            "-c",
            "16384",
            "-b",
            "2048",
        ]
        batched += ["-npp", str(STREAM_PROMPT), "-ntg", str(NEW), "-npl", ",".join(map(str, args.streams))]
        done = subprocess.run(
            [*batched, "--output-format", "jsonl"], check=True, capture_output=True, text=True
        )
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        rates |= {f"decode x{row['pl']}": row["speed_tg"] for row in rows}
    return rates


def measure_puna(model: Path, streams: list[int], depth: int) -> Rates:
    """Return tokens per second of each phase, the seconds of loading, and the most memory, in bytes.

    The bandwidth is that of torch adding up 256 MiB, in bytes a second: the best of some tries.
    """
    from puna.engine.llm_engine import EngineConfig, LLMEngine
    from puna.engine.sampling import SamplingParams
    from puna.weights.loader import load_model

    began = time.perf_counter()
    loaded = load_model(model)
    load = time.perf_counter() - began
    most = max([1, *streams])
    config = EngineConfig(
        enable_prefix_caching=False, max_model_len=max(2048, depth + NEW), max_num_seqs=most
    )
    engine = LLMEngine(loaded, config)

    def decode(count: int, prompt: int, new: int) -> tuple[float, float]:
        """Return the seconds until all have their first token, and those of the rest."""
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        for i in range(count):
            engine.add(str(i), [(7 * j + i) % 100_000 for j in range(prompt)], params)
        started, seen, first = time.perf_counter(), set(), 0.0
        while engine.has_unfinished:
            seen |= {output.sequence.request_id for output in engine.step() if output.new_token_ids}
            if not first and len(seen) == count:
                first = time.perf_counter()
        return first - started, time.perf_counter() - first

    decode(1, PROMPT, 2)
    rates = {"load": load, "prefill": PROMPT / decode(1, PROMPT, 1)[0]}
    rates["decode"] = NEW / decode(1, 1, NEW + 1)[1]
    if depth:
        rates[f"decode at {depth}"] = DEEP_NEW / decode(1, depth, DEEP_NEW + 1)[1]
    for count in streams:
        rates[f"decode x{count}"] = count * NEW / decode(count, STREAM_PROMPT, NEW + 1)[1]
    status = Path("/proc/self/status").read_text()
    rates["peak"] = float(status.split("VmHWM:")[1].split()[0]) * 1024
    rates["bandwidth"] = read_bandwidth()
    return rates


def read_bandwidth() -> float:
    """Return bytes per second."""
    import torch

    memory, best = torch.ones(1 << 26), float("inf")
    for _ in range(12):
        began = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - began)
    return memory.nbytes / best


if __name__ == "__main__":
    main()
