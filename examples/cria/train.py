"""Train cria from scratch on the corpus, for a given number of minutes.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m examples.cria.train OUT --minutes 70

Each process takes its share of the documents on one core, and the gradients are averaged (gloo).
OUT gets the tokenizer, checkpoint.pt (every few minutes: a cut run goes on from it), metrics.jsonl and, at
the end, the model as standard files. The learning rate follows the clock: it warms up, then falls on a cosine
to a fiftieth, so that the run ends in time whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from examples.cria.corpus import make_document
from examples.cria.muon import Muon
from examples.cria.network import new_model, write_model
from examples.cria.tokens import SEED, encode, learn_tokenizer, write_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from puna.model.attention import PackedAttention, causal_attention
from puna.model.llama import Llama

log = logging.getLogger("cria")

TOKENS_PER_ROW = 4096
WARMUP_STEPS = 60
ADAMW_SHARE = 0.25  # of Muon's learning rate
CHECKPOINT_SECONDS = 180.0


@dataclass(kw_only=True)
class Progress:
    """Hold how far a run is: all that a cut run needs besides the weights."""

    step: int = 0
    documents: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold several documents as one row: what goes in, where it predicts, and what should come out."""

    ids: Tensor  # (tokens,)
    positions: Tensor  # (tokens,)
    borders: list[int]
    select: Tensor  # (predictions,) indices into ids
    targets: Tensor  # (predictions,)


@dataclass
class RowBuilder:
    """Put documents into a row until it is full."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    borders: list[int] = field(default_factory=lambda: [0])
    select: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def add(self, ids: list[int], learned: list[bool]) -> None:
        """Append one document; its last token only is a target."""
        start = len(self.ids)
        for at in range(1, len(ids)):
            if learned[at]:
                self.select.append(start + at - 1)
                self.targets.append(ids[at])
        self.ids += ids[:-1]
        self.positions += range(len(ids) - 1)
        self.borders.append(len(self.ids))

    def build(self) -> Row:
        """Return the row as tensors."""
        return Row(
            ids=torch.tensor(self.ids),
            positions=torch.tensor(self.positions),
            borders=self.borders,
            select=torch.tensor(self.select),
            targets=torch.tensor(self.targets),
        )


def next_row(progress: Progress, tokenizer: Tokenizer, seed: int) -> Row:
    """Make the next documents of this process and pack them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    builder = RowBuilder()
    while len(builder.ids) < TOKENS_PER_ROW:
        builder.add(*encode(make_document(progress.documents * world + rank, seed), tokenizer))
        progress.documents += 1
    progress.tokens += len(builder.ids)
    progress.learned_tokens += len(builder.targets)
    return builder.build()


def learning_rate(step: int, done: float, peak: float) -> float:
    """Warm up by steps, then fall on a cosine over `done` (0 to 1) to a fiftieth of the peak."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))


def make_optimizers(model: Llama, peak: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in named if p.ndim == 1 or "embed_tokens" in name]
    adamw = torch.optim.AdamW(others, lr=peak * ADAMW_SHARE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=peak), adamw]


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Give Muon its learning rate, and AdamW its share of it."""
    for optimizer, share in zip(optimizers, (1.0, ADAMW_SHARE), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * share


def train_step(model: Llama, optimizers: list[torch.optim.Optimizer], row: Row) -> tuple[float, float]:
    """Learn from one row of each process; return the loss here and the gradient's norm before clipping."""
    logits = model(row.ids, row.positions, DocumentAttention(row.borders), select=row.select)
    loss = functional.cross_entropy(logits, row.targets)
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    _average_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item(), float(norm)


def _average_gradients(model: Llama) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class DocumentAttention(PackedAttention):
    """Attend as PackedAttention does, with one split in place of many slices: their gradients cost less."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, chunk_size: int | None
    ) -> Tensor:
        """See `puna.model.attention.Attention`; there is no chunking in cria."""
        sizes = [end - start for start, end in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)]
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)  # type: ignore[no-untyped-call]
        return torch.cat([causal_attention(*part, scale) for part in parts])


def save_checkpoint(
    path: Path, model: Llama, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Write all that the run needs to go on; the old file stays whole until the new one is."""
    partial = path.with_suffix(".partial")
    state: dict[str, Any] = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state | {"progress": asdict(progress)}, partial)
    partial.rename(path)


def load_checkpoint(path: Path, model: Llama, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Restore model and optimizer, and return how far the run was."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])


def train(out: Path, *, minutes: float, peak: float, seed: int, weights: Path | None = None) -> None:
    """Run until `minutes` of training are over, from the checkpoint in `out` if there is one."""
    tokenizer = _tokenizer(out)
    model = new_model(seed)
    optimizers = make_optimizers(model, peak)
    checkpoint, leads = out / "checkpoint.pt", dist.get_rank() == 0
    progress = Progress()
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizers)
    elif weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    budget, last_saved = minutes * 60.0, time.monotonic()
    dist.barrier()
    while progress.seconds < budget:
        began = time.monotonic()
        row = next_row(progress, tokenizer, seed)
        rate = learning_rate(progress.step, progress.seconds / budget, peak)
        set_rate(optimizers, rate)
        loss, norm = train_step(model, optimizers, row)
        progress.step += 1
        progress.seconds = _agree(progress.seconds + time.monotonic() - began)
        if leads and progress.step % 10 == 0:
            _write_metrics(out / "metrics.jsonl", progress, loss=loss, norm=norm, rate=rate)
        if leads and time.monotonic() - last_saved > CHECKPOINT_SECONDS:
            save_checkpoint(checkpoint, model, optimizers, progress)
            last_saved = time.monotonic()
    if leads:
        save_checkpoint(checkpoint, model, optimizers, progress)
        write_model(model, out)
        log.info("done: %s", progress)


def _agree(seconds: float) -> float:
    """Return the clock of the first process, so that all end at the same step."""
    shared = torch.tensor(seconds, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.item()


def _tokenizer(out: Path) -> Tokenizer:
    if dist.get_rank() == 0 and not (out / "tokenizer.json").exists():
        write_tokenizer(learn_tokenizer(40_000), out)
    dist.barrier()
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def _write_metrics(path: Path, progress: Progress, **values: float) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(progress) | values) + "\n")
    log.info("step %d loss %.4f tokens %d", progress.step, values["loss"], progress.tokens)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train cria.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--peak", type=float, default=0.02, help="highest learning rate of Muon")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--weights", type=Path, help="a checkpoint.pt to start from with a new schedule")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo")
    train(
        arguments.out,
        minutes=arguments.minutes,
        peak=arguments.peak,
        seed=arguments.seed,
        weights=arguments.weights,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
