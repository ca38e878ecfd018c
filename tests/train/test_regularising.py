"""Noise on embeddings, smoothed labels, and where activations are kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from puna.errors import ParameterError, UnsupportedError
from puna.model.llama import Llama
from puna.train.activation_offload import activation_offload
from puna.train.encoding import Example
from puna.train.losses import batch_loss, chunked_cross_entropy
from puna.train.neftune import embedding_noise
from puna.train.packing import Batch
from puna.train.train_config import TrainConfig
from puna.train.trainer import EvalMetrics, StepMetrics, Trainer
from puna.train.training_plan import make_plan
from training_data import tiny_config

from tiny import hf_llama, puna_twin


def run(folder: Path, name: str, **changes: Any) -> tuple[list[StepMetrics], list[EvalMetrics]]:
    steps: list[StepMetrics] = []
    evals: list[EvalMetrics] = []
    config = tiny_config(folder, output=str(folder / name), **changes)
    Trainer(config, on_step=steps.append, on_eval=evals.append).train()
    return steps, evals


def embedded(network: Llama, ids: Tensor, borders: list[int], alpha: float) -> Tensor:
    with embedding_noise(network, borders, alpha):
        out: Tensor = network.model.embed_tokens(ids)
    return out


def test_noise_is_that_of_the_formula() -> None:
    network, ids = puna_twin(hf_llama()), torch.arange(10)
    plain = network.model.embed_tokens(ids)
    torch.manual_seed(3)
    noise = embedded(network, ids, [0, 4, 10], 5.0) - plain
    torch.manual_seed(3)
    draws = torch.empty(10, 64).uniform_(-1, 1)
    expected = torch.cat((draws[:4] * 5 / math.sqrt(4 * 64), draws[4:] * 5 / math.sqrt(6 * 64)))
    torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-6)
    state = torch.get_rng_state()
    assert torch.equal(embedded(network, ids, [0, 4, 10], 0.0), plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network.model.embed_tokens(ids), plain)  # the hook is gone


def test_one_row_has_the_noise_of_transformers() -> None:
    integration = pytest.importorskip("transformers.integrations.neftune", reason="another Transformers")
    network, ids = puna_twin(hf_llama()), torch.arange(7)
    module = torch.nn.Embedding(96, 64)
    module.weight.data.copy_(network.model.embed_tokens.weight)
    module.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    module.train().register_forward_hook(integration.neftune_post_forward_hook)
    torch.manual_seed(1)
    theirs = module(ids[None])[0].detach()
    torch.manual_seed(1)
    base = network.model.embed_tokens(ids)
    draws = torch.empty(7, 64).uniform_(-1, 1)
    torch.manual_seed(1)
    ours = embedded(network, ids, [0, 7], 5.0)
    torch.testing.assert_close(ours - base, draws * 5 / math.sqrt(7 * 64), rtol=1e-4, atol=1e-6)
    largest = [(noisy - base).abs().max().item() for noisy in (theirs, ours)]
    assert largest[0] == pytest.approx(largest[1], rel=0.05)  # they draw in another way


def test_noise_is_for_training_not_for_measuring(tmp_path: Path) -> None:
    changes = {"max_steps": 1, "eval_split": 0.3, "learning_rate": 1e-9, "warmup_steps": 0}
    plain, noisy = (run(tmp_path, str(alpha), neftune_noise_alpha=alpha, **changes) for alpha in (None, 30.0))
    assert abs(noisy[0][0].loss - plain[0][0].loss) > 1e-3
    assert noisy[1][0].eval_loss == pytest.approx(plain[1][0].eval_loss, abs=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_smoothed_labels_are_those_of_torch(tied: bool) -> None:
    network = puna_twin(hf_llama(tie_word_embeddings=tied))
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(11, 64, generator=generator).requires_grad_()
    targets = torch.randint(96, (11,), generator=generator)
    logits = network.logits(hidden)
    whole = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.2)
    log_probs = logits.log_softmax(-1)
    mean = -log_probs.mean(-1).sum()  # as Transformers' LabelSmoother has it
    likely = -log_probs.gather(1, targets[:, None]).sum()
    torch.testing.assert_close(whole, 0.8 * likely + 0.2 * mean)
    (expected,) = torch.autograd.grad(whole, hidden)
    loss = chunked_cross_entropy(network, hidden, targets, chunk_rows=4, label_smoothing=0.2)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-6)


def test_measured_losses_are_not_smoothed(tmp_path: Path) -> None:
    changes = {"max_steps": 1, "eval_split": 0.3, "learning_rate": 1e-9, "warmup_steps": 0}
    plain, smooth = (run(tmp_path, str(s), label_smoothing_factor=s, **changes) for s in (0.0, 0.5))
    assert abs(smooth[0][0].loss - plain[0][0].loss) > 1e-4
    assert smooth[1][0].eval_loss == pytest.approx(plain[1][0].eval_loss, abs=1e-6)


def test_offloading_is_refused_where_there_is_nowhere_to(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="on the CPU it is there already"):
        make_plan(tiny_config(tmp_path, activation_offloading=True))
    with pytest.raises(ParameterError, match="needs gradient_checkpointing"):
        tiny_config(tmp_path, activation_offloading=True, gradient_checkpointing=False)


def test_offloading_keeps_the_tensors_of_the_cpu_as_they_are() -> None:
    network = puna_twin(hf_llama()).requires_grad_()
    batch = Batch.of([Example(place="", ids=list(range(9)), trained=[False] + [True] * 8)])
    with activation_offload(enabled=True):
        loss = batch_loss(network, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    batch_loss(network, batch).backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.equal(found[name], parameter.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_offloading_changes_no_bit_and_takes_less(tmp_path: Path) -> None:
    found = []
    for enabled in (False, True):
        torch.cuda.reset_peak_memory_stats()
        changes = {"activation_offloading": enabled, "device": "cuda", "max_steps": 2}
        steps, _ = run(tmp_path, str(enabled), **changes)
        found.append([m.loss for m in steps])
    assert found[0] == found[1]


def test_refusals() -> None:
    def config_with(**changes: Any) -> TrainConfig:
        return TrainConfig(**{"model": "m", "data": "d", "output": "o", **changes})

    with pytest.raises(ParameterError, match=r"label_smoothing_factor must be in \[0, 1\)"):
        config_with(label_smoothing_factor=1.0)
    with pytest.raises(ParameterError, match="neftune_noise_alpha must be a number of at least 0"):
        config_with(neftune_noise_alpha=-1.0)
    with pytest.raises(ParameterError, match="neftune_noise_alpha is for objective sft"):
        config_with(neftune_noise_alpha=5.0, objective="dpo")
