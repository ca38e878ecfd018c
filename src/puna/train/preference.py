"""Direct preference optimisation: learn to prefer the chosen answer of each pair (arXiv 2305.18290).

The model that it is compared with is the base: the same network with its adapter disabled. As in TRL, the
loss of a pair is -log sigmoid(beta * ((chosen - rejected) - (chosen - rejected of the base))), in
log-probabilities of whole answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute

from puna.model.llama import Llama
from puna.peft_model import PeftModel
from puna.train.losses import CHUNK_ROWS
from puna.train.packing import Batch


@dataclass(frozen=True, kw_only=True)
class PairLosses:
    """Hold what a batch of pairs gave."""

    loss: Tensor  # (), summed over pairs, for `backward`
    margins: Tensor  # (pairs,): how much more the chosen answer gained than the rejected one, times beta


def pair_losses(peft_model: PeftModel, batch: Batch, beta: float) -> PairLosses:
    """Compute the losses of a batch whose examples are chosen, rejected, chosen, and so on."""
    with torch.no_grad(), peft_model.disable_adapter():
        base = answer_log_probs(peft_model.network, batch)
    gained = answer_log_probs(peft_model.network, batch) - base
    margins = beta * (gained[0::2] - gained[1::2])
    return PairLosses(loss=-functional.logsigmoid(margins).sum(), margins=margins.detach())


def answer_log_probs(network: Llama, batch: Batch, *, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Return the log-probability of each example's trained tokens, (examples,) in float32.

    Logits are computed `chunk_rows` rows at a time, and again for the gradients.
    """
    hidden = network.hidden_states(batch.input_ids, batch.positions, batch.attention, select=batch.select)

    def log_probs(rows: Tensor, targets: Tensor) -> Tensor:
        return -functional.cross_entropy(network.logits(rows).float(), targets, reduction="none")

    parts = [
        recompute(log_probs, rows, targets, use_reentrant=False)
        for rows, targets in zip(
            torch.split(hidden, chunk_rows), torch.split(batch.targets, chunk_rows), strict=True
        )
    ]
    total = torch.zeros(batch.num_examples, device=hidden.device)
    return total.index_add(0, batch.owners, torch.cat(parts))
