"""The loss of a batch, without ever holding the logits of all its tokens.

Cross entropy in float32, summed over the trained tokens. Hidden states go through the output head a few rows
at a time, and gradients are computed on the way, for the hidden states and for whatever is trained of the
head: its weight, the embedding it is tied to, an adapter on it. The idea is that of Liger's fused linear
cross entropy (arXiv 2410.10989), in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute

from puna.model.llama import Llama
from puna.train.packing import Batch

CHUNK_ROWS = 256
_ROWS_AT_ONCE = 32


def batch_loss(
    network: Llama, batch: Batch, *, chunk_rows: int = CHUNK_ROWS, label_smoothing: float = 0.0
) -> Tensor:
    """Return the sum of the losses of a batch's trained tokens, () in float32, for `backward`."""
    hidden = network.hidden_states(batch.input_ids, batch.positions, batch.attention, select=batch.select)
    return chunked_cross_entropy(
        network, hidden, batch.targets, chunk_rows=chunk_rows, label_smoothing=label_smoothing
    )


def answer_log_probs(network: Llama, batch: Batch, *, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Return the log-probability of each example's trained tokens, (examples,) in float32."""
    found = token_log_probs(network, batch, batch.select, batch.targets, chunk_rows=chunk_rows)
    return found.new_zeros(batch.num_examples).index_add(0, batch.owners, found)


def token_log_probs(
    network: Llama, batch: Batch, select: Tensor, targets: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Return the log-probability of a target at each place of `select`, (len(select),) in float32.

    Logits are computed `chunk_rows` rows at a time, and again for the gradients.
    """
    hidden = network.hidden_states(batch.input_ids, batch.positions, batch.attention, select=select)

    def log_probs(rows: Tensor, wanted: Tensor) -> Tensor:
        return -functional.cross_entropy(network.logits(rows).float(), wanted, reduction="none")

    chunks = zip(torch.split(hidden, chunk_rows), torch.split(targets, chunk_rows), strict=True)
    return torch.cat([recompute(log_probs, rows, wanted, use_reentrant=False) for rows, wanted in chunks])


def chunked_cross_entropy(
    network: Llama,
    hidden: Tensor,
    targets: Tensor,
    *,
    chunk_rows: int = CHUNK_ROWS,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the summed cross entropy of `targets`, (rows,), under the logits of `hidden`, (rows, hidden).

    With smoothing, a share of each target is spread over all tokens alike. Takes the memory of `chunk_rows`
    rows of logits, some times over.
    """
    parameters = [parameter for parameter in _head_parameters(network) if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or parameters):
        starts = range(0, len(hidden), chunk_rows)
        slices = [slice(start, start + chunk_rows) for start in starts]
        parts = [
            _cross_entropy(network, hidden[rows], targets[rows], label_smoothing).detach() for rows in slices
        ]
        return torch.stack(parts).sum() if parts else hidden.new_zeros((), dtype=torch.float32)
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, targets, network, chunk_rows, label_smoothing, *parameters
    )
    return loss


@torch.no_grad()
def loss_and_gradient(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy, and its gradient in the memory of `logits`, (rows, vocab) float32."""
    loss = logits.new_zeros(())
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        part, wanted = logits[start : start + _ROWS_AT_ONCE], targets[start : start + _ROWS_AT_ONCE, None]
        log_probs = part.log_softmax(dim=-1)
        loss -= (1 - label_smoothing) * log_probs.gather(1, wanted).sum()
        if label_smoothing:
            loss -= label_smoothing * log_probs.mean(dim=-1).sum()
        torch.exp(log_probs, out=part)
        if label_smoothing:
            part -= label_smoothing / part.shape[1]
        part.scatter_add_(1, wanted, part.new_full(wanted.shape, label_smoothing - 1))
    return loss, logits


def _cross_entropy(network: Llama, hidden: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    logits = network.logits(hidden).float()
    return functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


def _head_parameters(network: Llama) -> list[nn.Parameter]:
    """Return what logits may depend on: the head's parameters, and the embedding's where they are tied."""
    found = [] if network.lm_head is None else list(network.lm_head.parameters())
    if network.config.tie_word_embeddings:
        found += list(network.model.embed_tokens.parameters())
    return list(dict.fromkeys(found))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Compute loss and gradients chunk by chunk in the forward pass; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        network: Llama,
        chunk_rows: int,
        label_smoothing: float,
        *parameters: nn.Parameter,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden)
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        losses = []
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            with torch.enable_grad():
                chunk = hidden[rows].detach().requires_grad_()
                logits = network.logits(chunk)
            loss, grad = loss_and_gradient(logits.detach().float(), targets[rows], label_smoothing)
            found = torch.autograd.grad(
                logits, [chunk, *parameters], grad.to(logits.dtype), allow_unused=True
            )
            del logits, grad
            grad_hidden[rows] = found[0]
            for total, grad in zip(grads, found[1:], strict=True):
                if grad is not None:
                    total += grad
            losses.append(loss)
        ctx.save_for_backward(grad_hidden, *grads)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        hidden, *parameters = (grad * scale.to(grad.dtype) for grad in ctx.saved_tensors)
        return (hidden, None, None, None, None, *parameters)
