"""Measure the time and the peak memory of loading a random bf16 checkpoint with the shape of Llama 3.1 8B.

    python benchmarks/load.py --dir /tmp/llama-8b                  # 16 GB of disk; reused if it is there
    python benchmarks/load.py --dir /tmp/llama-1b --layers 2       # smaller
    python benchmarks/load.py --dir /tmp/llama-8b --reference      # Transformers on the same files as well

Each load is a process of its own. The peak is VmHWM, the most that was ever resident; the rule is that it
stays under the size of the checkpoint + 1 GB. "cold" drops the files from the page cache first, "warm" does
not. On a virtual machine whose memory the host hands out on first touch, the first run measures that too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

GB = 1_000_000_000
SHARD_BYTES = 5 * GB
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}


def main() -> None:
    """Make the checkpoint where it is missing, and print one line for each load."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="folder of the checkpoint, made if absent")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=1, help="how often to load cold and warm")
    parser.add_argument("--reference", action="store_true", help="load with Transformers too")
    parser.add_argument("--measure", choices=["puna", "transformers"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.dir)
        return
    make_checkpoint(arguments.dir, arguments.layers)
    files = sorted(arguments.dir.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{arguments.dir}: {size / GB:.2f} GB in {len(files)} shards, {arguments.layers} layers")
    for _ in range(arguments.runs):
        for library in ["puna", "transformers"] if arguments.reference else ["puna"]:
            for state in ("cold", "warm"):
                if state == "cold":
                    drop_from_page_cache(files)
                report(library, state, size, run(library, arguments.dir))


def report(library: str, state: str, size: int, result: dict[str, float]) -> None:
    """Print the numbers of one load; the margin is to the checkpoint's size + 1 GB."""
    seconds, peak = result["seconds"], result["peak"]
    margin = size + GB - peak
    print(
        f"{library:12} {state}: {seconds:6.2f} s, {size / GB / seconds:5.2f} GB/s, VmHWM {peak / GB:.3f} GB "
        f"({result['imports'] / GB:.3f} before loading), margin {margin / GB:+.3f} GB",
        flush=True,
    )


def run(library: str, folder: Path) -> dict[str, float]:
    """Load in a fresh process and return what it measured."""
    command = [sys.executable, __file__, "--dir", str(folder), "--measure", library]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(library: str, folder: Path) -> None:
    """Load once, touch every page of the weights, and print seconds and bytes as JSON."""
    import torch

    if library == "puna":
        from puna.weights.loader import load_model as load
    else:
        from transformers import AutoModelForCausalLM

        load = AutoModelForCausalLM.from_pretrained
    imports = peak_resident_bytes()
    start = time.perf_counter()
    model = load(folder)
    # A library may have mapped the file and read nothing yet: touch every page, as the first token does.
    total = sum(int(p.detach().flatten().view(torch.uint8)[::4096].sum()) for p in model.parameters())
    seconds = time.perf_counter() - start
    peak = peak_resident_bytes()
    assert total > 0
    print(json.dumps({"seconds": seconds, "peak": peak, "imports": imports}))


def peak_resident_bytes() -> int:
    """Return VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def drop_from_page_cache(files: list[Path]) -> None:
    """Make the next read come from the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ------------------------------------------------------------------------------------------- the checkpoint


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of an 8B's tensors, in the order of the hub's files."""
    hidden, ffn, kv, vocab = 4096, 14336, 1024, 128256
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        prefix = f"model.layers.{i}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)
        yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name, rows in (("k", kv), ("o", hidden), ("q", hidden), ("v", kv)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def num_bytes(shape: tuple[int, ...]) -> int:
    """Return the size of a bf16 tensor."""
    return 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write config, shards and index; nothing if the folder has a checkpoint with so many layers."""
    config = folder / "config.json"
    if config.exists() and json.loads(config.read_text())["num_hidden_layers"] == layers:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} holds something else: give an empty folder")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(layers):
        if sum(map(num_bytes, shards[-1].values())) + num_bytes(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(path, shard)
        weight_map |= dict.fromkeys(shard, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.write_text(
        json.dumps({**CONFIG, "num_hidden_layers": layers})
    )  # last: it marks a whole checkpoint


def write_shard(path: Path, shard: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of random numbers: the same 64 MB over and over, from a new place."""
    import torch

    block = (torch.randn(1 << 25) * 0.02).bfloat16().view(torch.uint8).numpy().data
    header, end = {}, 0
    for name, shape in shard.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + num_bytes(shape))}
        end += num_bytes(shape)
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        place = 0
        for shape in shard.values():
            rest = num_bytes(shape)
            while rest:
                place = (place + 2 * 7919) % (len(block) // 2)
                rest -= file.write(block[place : place + rest])


if __name__ == "__main__":
    main()
