"""Estimate how long a training takes, from one layer and a small head measured on the device it will run on.

The layer has the model's sizes, the adapter's rank and the batch's real lengths, but no weight of the model:
nothing is read. What is estimated are the steps and evaluations; loading and writing are left out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW

from puna.model.llama import Llama
from puna.model.lora_config import LoraConfig
from puna.peft_model import get_peft_model
from puna.train.base_model import gradient_checkpointing, is_packed
from puna.train.encoding import Example
from puna.train.losses import CHUNK_ROWS, chunked_cross_entropy
from puna.train.methods import compares
from puna.train.packing import Batch
from puna.train.training_plan import TrainingPlan
from puna.weights.nf4 import swap_in_4bit

_MOST_BYTES = 2 * 10**9  # a layer above this is not made only to be measured
_MOST_TOKENS = 1024
_VOCABULARY = 2048  # of the head that is measured; the time grows with its size
_ENOUGH_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Hold seconds for a token: through all layers, and through the head; and for a step of the optimiser."""

    forward: float
    both_ways: float
    head: float
    optimizer_step: float


def estimate_seconds(plan: TrainingPlan) -> float | None:
    """Return the seconds of all steps and evaluations; None where it cannot be told without the weights.

    That is for weights that are stored quantised, mixtures of experts, and layers of more than 2 GB.
    """
    model = plan.checkpoint.config
    if is_packed(plan.checkpoint) or model.is_llama4:
        return None
    width = model.num_attention_heads * model.head_dim * 2 + model.num_key_value_heads * model.head_dim * 2
    if model.hidden_size * (width + 3 * model.intermediate_size) * plan.dtype.itemsize > _MOST_BYTES:
        return None
    pace = measure_pace(plan)
    share = plan.total_steps / plan.steps_per_epoch
    tokens, trained = share * plan.num_tokens, share * plan.num_trained
    seconds = tokens * pace.both_ways + trained * pace.head + plan.total_steps * pace.optimizer_step
    if compares(plan.config.objective):  # the reference is computed too, without gradients
        seconds += tokens * pace.forward + trained * pace.head / 3
    interval = plan.config.eval_interval
    evaluations = plan.total_steps // interval if interval else 1
    measured = sum(len(example.ids) for example in plan.eval_examples)
    return seconds + max(evaluations, 1) * measured * pace.forward


def measure_pace(plan: TrainingPlan) -> Pace:
    """Measure a layer, a head and a step of the optimiser."""
    model = plan.checkpoint.config
    network = _small_network(plan)
    batch = _some_batch(plan)
    hidden = torch.full(
        (batch.num_tokens, model.hidden_size), 0.01, dtype=plan.compute_dtype, device=plan.device
    )
    rope = network.model.rope(batch.positions, None)

    def through(x: Tensor) -> Tensor:
        out: Tensor = network.model.layers[0](x, batch.positions, rope, batch.attention)
        return out

    def both_ways() -> None:
        through(hidden.detach().requires_grad_()).sum().backward()  # type: ignore[no-untyped-call]

    def head() -> None:
        rows = hidden[:CHUNK_ROWS].detach().requires_grad_()
        targets = torch.zeros(len(rows), dtype=torch.long, device=plan.device)
        chunked_cross_entropy(network, rows, targets).backward()  # type: ignore[no-untyped-call]

    with gradient_checkpointing(network, enabled=plan.config.gradient_checkpointing):
        both = _seconds(both_ways, plan.device)
    with torch.no_grad():
        forward = _seconds(lambda: through(hidden), plan.device)
    trained = [parameter for parameter in network.parameters() if parameter.grad is not None]
    optimizer = AdamW(trained, fused=True)
    step = _seconds(lambda: optimizer.step() and None, plan.device)
    per_value = step / sum(parameter.numel() for parameter in trained)
    layers, scale = model.num_hidden_layers, model.vocab_size / network.config.vocab_size
    return Pace(
        forward=layers * forward / batch.num_tokens,
        both_ways=layers * both / batch.num_tokens,
        head=scale * _seconds(head, plan.device) / min(len(hidden), CHUNK_ROWS),
        optimizer_step=per_value * plan.trained_parameters,
    )


def _small_network(plan: TrainingPlan) -> Llama:
    """Make one layer and a small head, with weights of one value, trained as the plan says."""
    model = plan.checkpoint.config
    small = dataclasses.replace(model, num_hidden_layers=1, vocab_size=min(model.vocab_size, _VOCABULARY))
    with torch.device("meta"):
        network = Llama(small)
    network = network.to(plan.dtype).to_empty(device=plan.device).train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.01)
    if plan.config.method == "full":
        return network.requires_grad_()
    if plan.config.method == "qlora":
        swap_in_4bit(network)
    get_peft_model(network, _like(plan.config.lora))
    return network


def _like(lora: LoraConfig) -> LoraConfig:
    """Return an adapter that takes as long, for one layer: patterns by layer mean nothing there."""
    names = lora.target_modules
    if names is None or (isinstance(names, str) and names != "all-linear") or lora.layers_to_transform:
        names = "all-linear"
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        target_modules=names,
    )


def _some_batch(plan: TrainingPlan) -> Batch:
    """Return examples of the first step, as many as fit, in one row."""
    chosen: list[Example] = []
    total = 0
    for index in (index for pack in plan.packs for index in pack):
        example = plan.examples[index]
        if chosen and total + len(example.ids) > min(_MOST_TOKENS, plan.config.max_length):
            break
        chosen.append(example)
        total += len(example.ids)
    return Batch.of(chosen).to(plan.device)


def _seconds(work: Callable[[], None | Tensor], device: torch.device) -> float:
    """Return the shortest time of some runs, the first of which does not count."""
    work()
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 2 or (spent < _ENOUGH_SECONDS and runs < 20):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        seconds = time.perf_counter() - began
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
