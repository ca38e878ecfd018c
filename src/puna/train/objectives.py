"""What a step makes small: the loss of each objective, as the share that a batch has in the mean of its step.

The shares of a step's batches add up to its loss, so that how it is cut into batches changes nothing. The
formulas and the names of their weights are those of TRL 1.10: sigmoid DPO (arXiv 2305.18290), ORPO
(2403.07691), KTO (2402.01306).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from puna.model.llama import Llama
from puna.peft_model import PeftModel
from puna.train.losses import answer_log_probs, batch_loss, token_log_probs
from puna.train.neftune import embedding_noise
from puna.train.packing import Batch
from puna.train.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """Hold the network that is trained, and what it is compared with where it is not its own base."""

    network: Llama
    peft_model: PeftModel | None = None
    reference: Llama | None = None  # of whole training: a frozen copy, for objectives that compare

    @contextmanager
    def as_reference(self) -> Iterator[Llama]:
        """Within the block, be what the training began with: the base without its adapter, or the copy."""
        if self.reference is not None:
            yield self.reference
            return
        assert self.peft_model is not None
        with self.peft_model.disable_adapter():
            yield self.network


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Hold what the mean of a step is over, and what all its batches share."""

    trained: int  # tokens
    examples: int
    chosen_tokens: int = 0  # of ORPO: what the chosen examples predict, prompts included
    kl: float | None = None  # of KTO

    @property
    def pairs(self) -> int:
        """Count pairs of answers."""
        return self.examples // 2


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """Hold what a batch gave; rewards are how much more likely answers have become, times beta."""

    loss: Tensor  # (): its share in the mean of the step, for `backward`
    chosen: Sequence[float] = ()  # rewards of chosen or desirable answers
    rejected: Sequence[float] = ()  # of the others
    are_pairs: bool = False  # whether they belong together in turn


def step_totals(
    model: TrainedModel, config: TrainConfig, batches: Sequence[Batch], mismatched: Iterable[Batch] = ()
) -> StepTotals:
    """Count what the batches of a step have together; for KTO, measure how far the model has moved.

    `mismatched`: prompts with the answers of other prompts, on which KTO measures.
    """
    return StepTotals(
        trained=sum(batch.num_trained for batch in batches),
        examples=sum(batch.num_examples for batch in batches),
        chosen_tokens=sum(len(_chosen_places(batch)) for batch in batches)
        if config.objective == "orpo"
        else 0,
        kl=moved(model, mismatched) if config.objective == "kto" else None,
    )


def batch_share(model: TrainedModel, config: TrainConfig, batch: Batch, totals: StepTotals) -> BatchShare:
    """Compute the share of a batch in the loss of its step."""
    match config.objective:
        case "dpo":
            return dpo_share(model, batch, totals, beta=config.beta)
        case "orpo":
            return orpo_share(model, batch, totals, beta=config.beta)
        case "kto":
            weights = config.desirable_weight, config.undesirable_weight
            return kto_share(model, batch, totals, beta=config.beta, weights=weights)
    is_training = model.network.training
    noise = (config.neftune_noise_alpha or 0.0) if is_training else 0.0
    smoothing = config.label_smoothing_factor if is_training else 0.0
    with embedding_noise(model.network, batch.cu_seqlens, noise):
        loss = batch_loss(model.network, batch, label_smoothing=smoothing)
    return BatchShare(loss=loss / totals.trained)


def dpo_share(model: TrainedModel, batch: Batch, totals: StepTotals, *, beta: float) -> BatchShare:
    """Prefer the chosen answer: -log sigmoid(beta * (its gain - the rejected one's)), mean over pairs."""
    rewards = beta * gains(model, batch)
    chosen, rejected = rewards[0::2], rewards[1::2]
    loss = -functional.logsigmoid(chosen - rejected).sum() / totals.pairs
    return BatchShare(loss=loss, chosen=chosen.tolist(), rejected=rejected.tolist(), are_pairs=True)


def orpo_share(model: TrainedModel, batch: Batch, totals: StepTotals, *, beta: float) -> BatchShare:
    """Learn the chosen answer, and raise its odds over the rejected one's; nothing is compared with.

    The mean cross entropy over all tokens of the chosen examples, prompts too, as in TRL, less beta times the
    mean over pairs of log sigmoid(log odds ratio), with the mean log-probability of an answer's tokens.
    """
    places = _chosen_places(batch).to(batch.input_ids.device)
    answers = len(batch.select)
    targets = torch.cat((batch.targets, batch.input_ids[places + 1]))
    found = token_log_probs(model.network, batch, torch.cat((batch.select, places)), targets)
    means = _per_example(batch, found[:answers]) / _per_example(batch, torch.ones_like(found[:answers]))
    chosen, rejected = means[0::2], means[1::2]
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    preference = functional.logsigmoid(log_odds).sum() / totals.pairs
    loss = -found[answers:].sum() / totals.chosen_tokens - beta * preference
    rewards = (beta * chosen).tolist(), (beta * rejected).tolist()
    return BatchShare(loss=loss, chosen=rewards[0], rejected=rewards[1], are_pairs=True)


def kto_share(
    model: TrainedModel, batch: Batch, totals: StepTotals, *, beta: float, weights: tuple[float, float]
) -> BatchShare:
    """Make desirable answers more likely than the model moves anyway, and others less; mean over examples."""
    gained = gains(model, batch)
    labels = torch.tensor(batch.labels, device=gained.device)
    sign = torch.where(labels, 1.0, -1.0)
    weight = torch.where(labels, weights[0], weights[1])
    assert totals.kl is not None
    losses = weight * (1 - torch.sigmoid(sign * beta * (gained - totals.kl)))
    rewards = (beta * gained).tolist()
    return BatchShare(
        loss=losses.sum() / totals.examples,
        chosen=[reward for reward, label in zip(rewards, batch.labels, strict=True) if label],
        rejected=[reward for reward, label in zip(rewards, batch.labels, strict=True) if not label],
    )


def gains(model: TrainedModel, batch: Batch) -> Tensor:
    """Return how much more likely each answer is than to the reference, in log-probability, (examples,)."""
    with torch.no_grad(), model.as_reference() as reference:
        before = answer_log_probs(reference, batch)
    return answer_log_probs(model.network, batch) - before


@torch.no_grad()
def moved(model: TrainedModel, batches: Iterable[Batch]) -> float:
    """Return KTO's reference point: the mean gain of answers that do not belong to their prompts, or 0."""
    device = next(model.network.parameters()).device
    found = [gains(model, batch.to(device)) for batch in batches]
    return max(0.0, torch.cat(found).mean().item())


def _chosen_places(batch: Batch) -> Tensor:
    """Return the places of the chosen examples that predict a next token."""
    borders = batch.cu_seqlens
    runs = zip(borders[0::2], borders[1::2], strict=False)
    return torch.cat([torch.arange(start, end - 1) for start, end in runs])


def _per_example(batch: Batch, values: Tensor) -> Tensor:
    return values.new_zeros(batch.num_examples).index_add(0, batch.owners, values)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x below 0, without cancellation on either side of log 1/2."""
    half = -0.6931471805599453
    return torch.where(x > half, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x.clamp(max=half))))
