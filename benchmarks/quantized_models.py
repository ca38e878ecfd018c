"""Whole models quantised here and by llama.cpp, to the same types and sizes: error and KL divergence.

    python benchmarks/quantized_models.py path/to/llama-quantize [--models cria cria-wide PATH] [--types ...]
        [--imatrix]

Both quantise the same float32 file (`small_models.py`), with --imatrix by the same importance matrix, found
with `puna imatrix`'s code on other text than that which is measured. The relative RMS error is over all
weights that are quantised. KL divergence and perplexity are those of the dequantised weights in float32: what
is measured is the weights, not how a program computes with them. Ratios below 1 say that ours is better.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import tempfile
from pathlib import Path

from small_models import Distance, Subject, distance, float_twin, logits_of, prepare
from torch import Tensor

from puna.weights.gguf import GgufFile, open_gguf
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quantize_mix import FILE_TYPES

TYPES = [name for name in FILE_TYPES if name not in ("f32", "f16", "bf16")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("llama_quantize", type=Path)
    parser.add_argument("--models", nargs="+", default=["cria", "cria-wide"])
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--imatrix", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in args.models:
            compare(prepare(model, folder), args.types, args.llama_quantize, folder, weighted=args.imatrix)


def compare(subject: Subject, types: list[str], program: Path, folder: Path, *, weighted: bool) -> None:
    imatrix = None
    if weighted:
        imatrix = folder / f"{subject.name}-imatrix.gguf"
        subject.write_imatrix(imatrix)
    wanted = logits_of(subject.model, subject.rows)
    tokens = sum(len(row.ids) - row.start for row in subject.rows)
    best = distance(wanted, wanted, subject.rows).perplexity
    print(
        f"\n{subject.name}, {tokens:,} tokens, {'with' if weighted else 'without'} an importance matrix; "
        f"perplexity unquantised {best:.4f}"
    )
    print(
        f"{'type':8}{'bits':>6}{'RMS there':>11}{'here':>9}{'ratio':>7}{'KL there':>12}{'here':>10}"
        f"{'ratio':>7}{'ppl there':>11}{'here':>9}"
    )
    for kind in types:
        there, here = folder / "theirs.gguf", folder / "ours.gguf"
        quantize_there(program, subject.source, there, kind, imatrix)
        subject.quantize(here, kind, imatrix)
        bits = same_size(there, here)
        lost = [relative_error(subject, path) for path in (there, here)]
        far: list[Distance] = []
        for path in (there, here):
            found = logits_of(float_twin(subject.model, path), subject.rows)
            far.append(distance(found, wanted, subject.rows))
        print(
            f"{kind:8}{bits:6.2f}{lost[0]:11.3%}{lost[1]:9.3%}{lost[1] / lost[0]:7.3f}"
            f"{far[0].kl:12.2e}{far[1].kl:10.2e}{far[1].kl / far[0].kl:7.3f}"
            f"{far[0].perplexity:11.4f}{far[1].perplexity:9.4f}",
            flush=True,
        )
        there.unlink()
        here.unlink()


def quantize_there(program: Path, source: Path, out: Path, kind: str, imatrix: Path | None) -> None:
    command: list[str | Path] = [program]
    if imatrix is not None:
        command += ["--imatrix", imatrix]
    subprocess.run([*command, source, out, kind.upper(), "1"], check=True, capture_output=True)


def same_size(one: Path, other: Path) -> float:
    """Return the bits per weight of both files; their tensors must have the same types."""
    files = [GgufFile(path).tensors for path in (one, other)]
    types = [{name: info.type.name for name, info in tensors.items()} for tensors in files]
    assert types[0] == types[1], {
        n: (k, types[1].get(n)) for n, k in types[0].items() if k != types[1].get(n)
    }
    infos = files[1].values()
    return sum(info.num_bytes for info in infos) * 8 / sum(math.prod(info.shape) for info in infos)


def relative_error(subject: Subject, path: Path) -> float:
    """Return the RMS error of the quantised weights over their RMS."""
    original = subject.model.state_dict()
    lost = size = 0.0
    for name, value in open_gguf(path).tensors():
        if isinstance(value, QuantTensor):
            weight: Tensor = original[name].double()
            lost += float((value.dequantize() - weight).square().sum())
            size += float(weight.square().sum())
    return math.sqrt(lost / size)


if __name__ == "__main__":
    main()
