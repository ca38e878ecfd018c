"""Small trained models as float32 GGUF files, and text that they write: what quantising is measured on.

`cria` is the embedded model; a path is any other. "cria-wide" is cria turned into 256 dimensions by an
orthogonal matrix: it computes the same, and its rows are whole blocks of the K-quants, which those of cria,
with 192 columns, are not. They read some of cria's training text as it lies in its files, which is not quite
what they were trained on, so that they are not too sure of it; other models read what they write themselves
at temperature 1.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from puna.cria import FOLDER as CRIA
from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import SamplingParams
from puna.locate import find_model
from puna.model import Llama, PackedAttention
from puna.text.gguf_vocab_export import gguf_vocabulary
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.weights.gguf import open_gguf
from puna.weights.gguf_export import gguf_metadata
from puna.weights.gguf_writer import Value
from puna.weights.imatrix import read_imatrix, write_imatrix
from puna.weights.imatrix_collect import ActivationSums, cut_rows
from puna.weights.loader import load_model, open_checkpoint
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quantize_file import write_quantized
from puna.weights.quantize_mix import file_type

WIDE = 256
_TEXTS = Path(__file__).parents[1] / "examples/cria/text"
_ROWS, _ROW_TOKENS, _TOGETHER = 16, 256, 16


@dataclass(frozen=True)
class Row:
    """Hold ids, and where the text in them begins whose tokens are predicted."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Subject:
    """Hold a model in float32, its GGUF file, and text: to measure on, and to find an importance with."""

    name: str
    model: Llama
    metadata: dict[str, Value]
    source: Path
    rows: list[Row]
    calibration: list[Row]

    def quantize(self, out: Path, kind: str, imatrix: Path | None = None) -> None:
        """Write the model as a GGUF file of a type, quantised here."""
        importance = None if imatrix is None else read_imatrix(imatrix).means
        checkpoint = open_checkpoint(self.source)
        write_quantized(checkpoint, out, self.metadata, file_type(kind), importance=importance)

    def write_imatrix(self, out: Path) -> None:
        """Write the importance matrix of the calibration text."""
        with ActivationSums(self.model) as sums:
            for row in self.calibration:
                sums.read(row.ids)
        write_imatrix(out, sums.found(), datasets=[self.name], chunk_size=512, chunks=len(self.calibration))


def prepare(name: str, folder: Path) -> Subject:
    """Write a model's float32 GGUF file into a folder, and find text for it."""
    path = widened(folder / "cria-wide") if name == "cria-wide" else find_model(name)
    model, tokenizer = load_model(path, dtype=torch.float32), load_tokenizer(path)
    stem = path.parent.name if path.name in ("hf", "meta") else name
    vocabulary = gguf_vocabulary(path, vocab_size=model.config.vocab_size)
    metadata: dict[str, Value] = {**gguf_metadata(model.config, stem), **vocabulary}
    source = folder / f"{stem}-f32.gguf"
    write_quantized(open_checkpoint(path), source, metadata, file_type("f32"))
    if path == CRIA or name == "cria-wide":
        rows = _pieces(tokenizer)
    else:
        rows = written(model, tokenizer, [tokenizer.encode("")] * (2 * _ROWS))
    return Subject(stem, model, metadata, source, rows[:_ROWS], rows[_ROWS:])


def _pieces(tokenizer: Tokenizer) -> list[Row]:
    """Return pieces of the text that cria's training text is made from, without the questions."""
    lines = [
        line
        for file in ("concepts.txt", "animals.txt", "stories.txt")
        for line in (_TEXTS / file).read_text(encoding="utf-8").splitlines()
        if not line.startswith(("#", "?"))
    ]
    ids = tokenizer.encode("\n".join(lines), add_special_tokens=False)
    rows = cut_rows(ids, _ROW_TOKENS, tokenizer.bos_token_id)[: 2 * _ROWS]
    assert len(rows) == 2 * _ROWS
    return [Row(row, 1) for row in rows[::2] + rows[1::2]]


def written(model: Llama, tokenizer: Tokenizer, prompts: Sequence[list[int]]) -> list[Row]:
    """Return the prompts, each with what the model writes after it, at temperature 1."""
    limits = EngineConfig(max_num_seqs=_TOGETHER, kv_cache_memory_bytes=1 << 27)
    engine = LLMEngine(model, limits, end_ids=tokenizer.eos_token_ids)
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=1.0, max_tokens=_ROW_TOKENS, seed=number)
        engine.add(str(number), prompt, params)
    rows: dict[int, Row] = {}
    while engine.has_unfinished:
        for output in engine.step():
            sequence = output.sequence
            if sequence.finish_reason is not None:
                number = int(sequence.request_id)
                rows[number] = Row([*prompts[number], *sequence.output_ids], len(prompts[number]))
    return [rows[number] for number in range(len(prompts))]


def widened(folder: Path) -> Path:
    """Write cria with a hidden size of 256 as a Hugging Face folder; it computes what cria does.

    Hidden states are turned by a matrix with orthonormal columns, which no RMSNorm notices once its weight is
    in the matrices behind it.
    """
    model = load_model(CRIA, dtype=torch.float32)
    narrow = model.config.hidden_size
    square = torch.randn(WIDE, WIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = torch.linalg.qr(square)[0][:, :narrow]  # (256, 192)
    tensors: dict[str, Tensor] = {}

    def put(name: str, value: Tensor) -> None:
        tensors[name] = value.float().contiguous()

    state = {name: value.double() for name, value in model.state_dict().items()}
    put("model.embed_tokens.weight", state["model.embed_tokens.weight"] @ turn.T)
    norm = "model.norm.weight"
    put("lm_head.weight", state["model.embed_tokens.weight"] * state[norm] @ turn.T)
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for block, normed, last in (
            ("self_attn", "input_layernorm", "o_proj"),
            ("mlp", "post_attention_layernorm", "down_proj"),
        ):
            for name in (name for name in state if name.startswith(f"{prefix}{block}.")):
                weight = state[f"{prefix}{normed}.weight"]
                put(name, turn @ state[name] if last in name else state[name] * weight @ turn.T)
    for name, value in state.items():
        if "norm" in name:
            put(name, torch.full((WIDE,), (narrow / WIDE) ** 0.5, dtype=value.dtype))
    config = json.loads((CRIA / "config.json").read_text())
    config |= {
        "hidden_size": WIDE,
        "rms_norm_eps": config["rms_norm_eps"] * narrow / WIDE,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CRIA / file, folder / file)
    return folder


def float_twin(model: Llama, path: Path) -> Llama:
    """Return the float32 model with the dequantised weights of a GGUF file."""
    twin = copy.deepcopy(model)
    places = twin.state_dict()
    for name, value in open_gguf(path).tensors():
        places[name].copy_(value.dequantize() if isinstance(value, QuantTensor) else value)
    return twin


@torch.inference_mode()
def logits_of(model: Llama, rows: Sequence[Row]) -> list[Tensor]:
    """Return for each row the logits from the place on that predicts the first written token."""
    out = []
    for row in rows:
        ids = torch.tensor(row.ids)
        select = torch.arange(row.start - 1, len(row.ids) - 1)
        attention = PackedAttention([0, len(ids)])
        out.append(model(ids, torch.arange(len(ids)), attention, select).float())
    return out


@dataclass(frozen=True)
class Distance:
    """Say how far logits are from others: relative RMS, KL divergence; and the perplexity of the text."""

    rms: float
    kl: float
    perplexity: float


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor], rows: Sequence[Row]) -> Distance:
    """Compare logits with those wanted, over all tokens that are predicted."""
    sums = torch.zeros(4, dtype=torch.float64)
    for mine, theirs, row in zip(found, wanted, rows, strict=True):
        log_p, log_q = (functional.log_softmax(logits.double(), -1) for logits in (theirs, mine))
        kl = (log_p.exp() * (log_p - log_q)).sum()
        lost = functional.nll_loss(log_q, torch.tensor(row.ids[row.start :]), reduction="sum")
        sums += torch.stack(
            [(mine - theirs).double().square().sum(), theirs.double().square().sum(), kl, lost]
        )
    tokens = sum(len(row.ids) - row.start for row in rows)
    far, size, kl_sum, lost_sum = sums.tolist()
    return Distance((far / size) ** 0.5, kl_sum / tokens, math.exp(lost_sum / tokens))
