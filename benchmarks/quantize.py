"""Compare the error of our quantised weights with llama.cpp's, type by type, and say how long it takes.

    python benchmarks/quantize.py path/to/llama-quantize [--model cria] [--types q4_k q6_k ...] [--imatrix]

The weights of a model, its matrices laid end to end in rows of 2,048, go through llama-quantize and through
`puna.weights.quantize_blocks` as one tensor each; both results are dequantised by our reference. Relative
RMS error; a ratio below 1 says that ours is smaller. With --imatrix a made-up importance is given to both,
and the error is weighted by it. Seconds are those of the library call here and of the whole program there.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from puna.gguf_header import GGMLType
from puna.locate import find_model
from puna.weights.gguf import GgufFile
from puna.weights.gguf_writer import Value, write_gguf
from puna.weights.imatrix import Activations, write_imatrix
from puna.weights.loader import open_checkpoint
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quantize_blocks import quantize

COLUMNS = 2048
NAME = "blk.0.ffn_up.weight"
TYPES = "Q8_0 Q6_K Q5_K Q5_1 Q5_0 Q4_K Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K Q2_K".split()  # noqa: SIM905
THEIRS = {"Q6_K": "Q6_K", "Q5_K": "Q5_K_S", "Q4_K": "Q4_K_S", "Q3_K": "Q3_K_S", "Q2_K": "Q2_K"}
METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": COLUMNS,
    "llama.feed_forward_length": COLUMNS,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("llama_quantize", type=Path)
    parser.add_argument(
        "--model", default="cria", help="a checkpoint of floats, or 'random' for normal weights"
    )
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--imatrix", action="store_true")
    args = parser.parse_args()
    weights = random_rows() if args.model == "random" else rows_of(args.model)
    importance = None
    if args.imatrix:
        importance = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(1)).exp()
    print(f"{weights.numel():,} weights of {args.model}, {torch.get_num_threads()} threads")
    print(f"{'type':8}{'llama.cpp':>11}{'ours':>11}{'ratio':>8}{'s there':>9}{'s here':>9}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source.gguf")
        write_gguf(source, METADATA, {NAME: weights})
        for name in args.types:
            began = time.monotonic()
            theirs = quantize_there(args.llama_quantize, source, name.upper(), importance)
            between = time.monotonic()
            ours = quantize(weights, GGMLType[name.upper()], importance)
            ended = time.monotonic()
            there, here = (error(weights, packed, importance) for packed in (theirs, ours))
            times = f"{between - began:9.1f}{ended - between:9.1f}"
            print(f"{name:8}{there:11.6f}{here:11.6f}{here / there:8.4f}{times}", flush=True)


def rows_of(model: str) -> Tensor:
    """Return the matrices of a checkpoint, end to end in rows of COLUMNS."""
    matrices = [
        value.float().flatten()
        for _, value in open_checkpoint(find_model(model)).tensors()
        if isinstance(value, Tensor) and value.ndim == 2
    ]
    flat = torch.cat(matrices)
    return flat[: flat.numel() // COLUMNS * COLUMNS].view(-1, COLUMNS)


def random_rows() -> Tensor:
    return torch.randn(2048, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02


def quantize_there(program: Path, source: Path, name: str, importance: Tensor | None) -> QuantTensor:
    """Run llama-quantize on the file, without a mix, and return the tensor."""
    out = source.with_name("out.gguf")
    command = [str(program), "--pure"]
    if importance is not None:
        seen = Activations(sums=importance[None], counts=torch.ones(1))
        matrix = source.with_name("imatrix.gguf")
        write_imatrix(matrix, {NAME: seen}, datasets=["made up"], chunk_size=1, chunks=1)
        command += ["--imatrix", str(matrix)]
    command += [str(source), str(out), THEIRS.get(name, name), str(torch.get_num_threads())]
    subprocess.run(command, check=True, capture_output=True)
    value = GgufFile(out).read(NAME)
    assert isinstance(value, QuantTensor) and value.type.name == name
    return value


def error(weights: Tensor, packed: QuantTensor, importance: Tensor | None) -> float:
    """Return the RMS error over the RMS of the weights, each weighted by the importance."""
    counted = 1.0 if importance is None else importance
    lost = ((packed.dequantize() - weights).double().square() * counted).sum()
    return float((lost / (weights.double().square() * counted).sum()).sqrt())


if __name__ == "__main__":
    main()
