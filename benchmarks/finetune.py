"""Train adapters beside Transformers and PEFT on one model: tokens a second, peak memory, and ratios.

    python benchmarks/finetune.py path/to/llama [--tokens 512] [--targets qv all] [--rounds 2] [--steps 2]
    python benchmarks/finetune.py --made FOLDER      # random weights in the shape of Llama 3.2 1B

A step is forward, backward and AdamW over one row of tokens, r = 16, every token trained. Each run is a
process of its own; the runs take turns, so that a machine that slows down slows down all. The first step of a
process is not counted, but where it takes a minute it is the only one; memory is the peak of the whole
process, loading included. More than 512 tokens are a row of several examples of 512, which Puna keeps apart;
Transformers is given them as the rows of a batch.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

RANK = 16
LONG = 60  # seconds of a step that make it the only one
PIECE = 512  # tokens of an example in a packed row
TARGETS = {"qv": ["q_proj", "v_proj"], "all": "all-linear"}
KINDS = {
    "peft-bf16": "Transformers + PEFT, bfloat16",
    "peft-f32": "Transformers + PEFT, float32",
    "puna": "Puna, lora",
    "puna-qlora": "Puna, qlora",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a Hugging Face folder")
    parser.add_argument("--made", type=Path, help="or a folder to make one in, in the shape of Llama 3.2 1B")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=1, help="processes of each kind")
    parser.add_argument("--steps", type=int, default=2, help="steps of each process that are counted")
    parser.add_argument(
        "--checkpointing", action="store_true", help="with gradient checkpointing, in all runs"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    model = args.model
    if args.made is not None:
        from shapes import make_checkpoint

        model = make_checkpoint(args.made, "Llama 3.2 1B")
    if model is None:
        parser.error("a model is needed")
    if any(tokens > PIECE and tokens % PIECE for tokens in args.tokens):
        parser.error(f"--tokens is at most {PIECE}, or a multiple of it")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, r = {RANK}")
    for tokens in args.tokens:
        for targets in args.targets:
            compare(model, args, tokens=tokens, targets=targets)


def compare(model: Path, args: argparse.Namespace, *, tokens: int, targets: str) -> None:
    """Run all kinds in turns, and print a line for each."""
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in args.kinds}
    for _ in range(args.rounds):
        for kind, found in results.items():
            job = {"model": str(model), "kind": kind, "tokens": tokens, "targets": targets}
            job |= {"steps": args.steps, "checkpointing": args.checkpointing}
            command = [sys.executable, __file__, "--child", json.dumps(job)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n{tokens} tokens, targets {targets}" + (", checkpointed" if args.checkpointing else ""))
    print(f"{'':32}{'tokens/s':>10}{'spread':>8}{'GB':>7}   ratios to the first: speed, memory")
    first = summary(results[args.kinds[0]])
    for kind, found in results.items():
        speed, spread, memory = summary(found)
        ratios = f"{speed / first[0]:8.2f}{memory / first[2]:8.2f}"
        print(f"{KINDS[kind]:32}{speed:10.1f}{spread:8.0%}{memory:7.2f}{ratios}", flush=True)


def summary(found: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Return the median speed, its spread, and the largest memory in GB."""
    speeds = [speed for result in found for speed in result["speeds"]]
    middle = statistics.median(speeds)
    return middle, (max(speeds) - min(speeds)) / middle, max(result["memory"] for result in found)


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Train in this process."""
    vocab_size = json.loads(Path(job["model"], "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocab_size, (job["tokens"],), generator=torch.Generator().manual_seed(1))
    step = puna_step(job, ids) if job["kind"].startswith("puna") else peft_step(job, ids)
    began = time.perf_counter()
    loss = step()
    seconds = [time.perf_counter() - began]
    if seconds[0] < LONG:
        seconds.clear()
    for _ in range(job["steps"] if not seconds else 0):
        began = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"speeds": [job["tokens"] / s for s in seconds], "memory": peak, "loss": loss}


def puna_step(job: dict[str, Any], ids: torch.Tensor) -> Any:
    """Return what does a step as `puna train` does it."""
    from contextlib import ExitStack

    from puna import LoraConfig, TrainConfig, get_peft_model
    from puna.train.base_model import (
        choose_compute_dtype,
        choose_dtype,
        computing_in,
        gradient_checkpointing,
        load_base,
    )
    from puna.train.encoding import Example
    from puna.train.losses import batch_loss
    from puna.train.optimizers import make_optimizer
    from puna.train.packing import Batch
    from puna.weights.loader import open_checkpoint

    method: Literal["lora", "qlora"] = "qlora" if job["kind"] == "puna-qlora" else "lora"
    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS[job["targets"]], task_type="CAUSAL_LM")
    config = TrainConfig(
        model=job["model"], data="none", output="none", method=method, lora=lora, device="cpu"
    )
    checkpoint, cpu = open_checkpoint(job["model"]), torch.device("cpu")
    dtype = choose_dtype(config, checkpoint)
    network = load_base(config, checkpoint, dtype=dtype, device=cpu).train()
    get_peft_model(network, lora)
    optimizer = make_optimizer(network, config)
    pieces = [piece.tolist() for piece in torch.split(ids, PIECE)]
    batch = Batch.of([Example(place="", ids=p, trained=[False] + [True] * (len(p) - 1)) for p in pieces])
    contexts = ExitStack()
    contexts.enter_context(computing_in(network, choose_compute_dtype(config, checkpoint, dtype, cpu)))
    contexts.enter_context(gradient_checkpointing(network, enabled=job["checkpointing"]))

    def step() -> float:
        assert isinstance(optimizer, torch.optim.Optimizer)
        loss = batch_loss(network, batch) / batch.num_trained
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peft_step(job: dict[str, Any], ids: torch.Tensor) -> Any:
    """Return what does a step of Transformers and PEFT."""
    import peft
    import transformers

    dtype = torch.bfloat16 if job["kind"] == "peft-bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).train()
    targets = TARGETS[job["targets"]]
    settings = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings)
    if job["checkpointing"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4, fused=True)
    rows = torch.stack(torch.split(ids, PIECE)) if len(ids) > PIECE else ids[None]

    def step() -> float:
        loss: torch.Tensor = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


if __name__ == "__main__":
    main()
