"""How close the logits of quantised models are to exact ones: Puna's kernels beside llama.cpp's, same files.

    python benchmarks/logits.py --source LLAMA_CPP --build BUILD [--models cria cria-wide PATH] [--types ...]

Each model is quantised here to each type. The reference computes in float32 with the dequantised weights;
Puna computes as after loading the file, llama.cpp with a float32 cache and plain attention (built from
`llama_logits.cpp` against its library). Relative RMS error of the logits and KL divergence, over the text of
`small_models.py`; a ratio below 1 says that Puna is closer.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from array import array
from pathlib import Path

import numpy as np
import torch
from small_models import Row, Subject, distance, float_twin, logits_of, prepare
from torch import Tensor

from puna.kernels import compiled
from puna.weights.loader import load_model
from puna.weights.quantize_mix import FILE_TYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="llama.cpp's source, for its headers")
    parser.add_argument("--build", type=Path, required=True, help="where it is built: bin/libllama.so")
    parser.add_argument("--models", nargs="+", default=["cria", "cria-wide"])
    parser.add_argument("--types", nargs="+", default=list(FILE_TYPES))
    args = parser.parse_args()
    kernels = compiled()
    print(f"kernels: {'reference' if kernels is None else kernels.chosen()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build_caller(args.source, args.build, folder)
        for model in args.models:
            compare(prepare(model, folder), args.types, program, folder)


def compare(subject: Subject, types: list[str], program: Path, folder: Path) -> None:
    tokens = sum(len(row.ids) - row.start for row in subject.rows)
    print(f"\n{subject.name}, {tokens:,} tokens; relative RMS error of the logits, KL divergence")
    print(f"{'type':8}{'llama.cpp':>11}{'Puna':>9}{'ratio':>7}{'llama.cpp':>13}{'Puna':>11}{'ratio':>7}")
    for kind in types:
        path = folder / "model.gguf"
        subject.quantize(path, kind)
        wanted = logits_of(float_twin(subject.model, path), subject.rows)
        ours = distance(logits_of(load_model(path), subject.rows), wanted, subject.rows)
        theirs = distance(logits_there(program, path, subject.rows), wanted, subject.rows)
        print(
            f"{kind:8}{theirs.rms:11.2%}{ours.rms:9.2%}{ours.rms / max(theirs.rms, 1e-12):7.2f}"
            f"{theirs.kl:13.2e}{ours.kl:11.2e}{ours.kl / max(theirs.kl, 1e-12):7.2f}",
            flush=True,
        )
        path.unlink()


def build_caller(source: Path, build: Path, folder: Path) -> Path:
    """Compile `llama_logits.cpp` against the library."""
    program, libraries = folder / "llama_logits", (build / "bin").resolve()
    command: list[str | Path] = ["c++", "-std=c++17", "-O1", Path(__file__).with_name("llama_logits.cpp")]
    command += ["-I", source / "include", "-I", source / "ggml/include", "-L", libraries]
    command += ["-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}", "-o", program]
    subprocess.run(command, check=True)
    return program


def logits_there(program: Path, model: Path, rows: list[Row]) -> list[Tensor]:
    """Return what llama.cpp computes for the rows, as `logits_of` does."""
    ids, out = model.with_suffix(".rows"), model.with_suffix(".logits")
    ids.write_bytes(b"".join(array("i", [len(r.ids), r.start - 1, *r.ids]).tobytes() for r in rows))
    subprocess.run([program, model, ids, out, str(torch.get_num_threads())], check=True)
    counts = [len(row.ids) - row.start for row in rows]
    flat = torch.from_numpy(np.fromfile(out, dtype=np.float32)).view(sum(counts), -1)
    return list(torch.split(flat, counts))


if __name__ == "__main__":
    main()
