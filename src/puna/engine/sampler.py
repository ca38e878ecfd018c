"""One row of logits to one token id, by the rules of `SamplingParams`.

The order is vLLM's: masks and biases, penalties, temperature, min-p, top-k, typical-p, top-p, draw. Each
row is worked on alone, with one random number from its sequence's own generator, so that a seed gives the
same tokens whatever else is in the batch, and also under speculative decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from puna.engine.request import Logprobs, Sequence
from puna.engine.sampling import SamplingParams

_FEW = 1024  # so many of the likeliest tokens are tried before the whole vocabulary is sorted for top-p


def sample(logits: Tensor, sequence: Sequence) -> int | None:
    """Choose the next token of a sequence from logits (vocab,); ties go to the lowest id.

    None where lists, grammar and minimum length together allow no token.
    """
    params = sequence.params
    logits = masked(logits.float(), sequence)
    if not bool(logits.max() > -math.inf):
        return None
    logits = _penalized(logits, sequence)
    if params.greedy:
        return int(logits.argmax())
    return _draw(logits / params.temperature, params, sequence.generator)


def logprobs_of(
    logits: Tensor, token_id: int, count: int, wanted_ids: SequenceOf[int] | None = None
) -> Logprobs:
    """Return the chosen token's log-probability and the `count` best ones (-1: all), before any rule.

    With `wanted_ids` those of these ids are returned instead of the best.
    """
    values = logits.float().log_softmax(dim=-1)
    chosen = values[token_id]
    rank = int((values > chosen).sum()) + 1
    if wanted_ids is not None:
        listed = [token_id, *dict.fromkeys(i for i in wanted_ids if i != token_id)]
        found = values[torch.tensor(listed, device=values.device)]
        return Logprobs(listed, found.tolist(), [int((values > value).sum()) + 1 for value in found])
    count = len(values) if count < 0 else min(count, len(values))
    best = values.topk(count)
    ids, top = best.indices.tolist(), best.values.tolist()
    ranked = enumerate(zip(ids, top, strict=True), start=1)
    others = [(i, value, place) for place, (i, value) in ranked if i != token_id]
    return Logprobs(
        [token_id, *(i for i, _, _ in others)],
        [float(chosen), *(value for _, value, _ in others)],
        [rank, *(place for _, _, place in others)],
    )


def masked(logits: Tensor, sequence: Sequence) -> Tensor:
    """Return logits with what forbids tokens or shifts them: lists, words, minimum length, grammar, bias.

    They are a copy, or, where nothing does, the logits themselves.
    """
    params = sequence.params
    forbidden = _forbidden_ids(sequence)
    is_free = sequence.grammar is None and params.allowed_token_ids is None
    if is_free and not forbidden and not params.logit_bias:
        return logits
    logits = logits.clone()
    if sequence.grammar is not None:
        logits.masked_fill_(~_unpacked(sequence.grammar.allowed_bits(), logits), -math.inf)
    if params.allowed_token_ids is not None:
        allowed = torch.tensor(list(params.allowed_token_ids), device=logits.device)
        kept = logits[allowed]
        logits.fill_(-math.inf)
        logits[allowed] = kept
    if forbidden:
        logits[torch.tensor(forbidden, device=logits.device)] = -math.inf
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    return logits


def _unpacked(bits: bytes, logits: Tensor) -> Tensor:
    """Return a bit field as booleans (vocab,)."""
    flags = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=len(logits), bitorder="little")
    return torch.from_numpy(flags).bool().to(logits.device)


def _forbidden_ids(sequence: Sequence) -> list[int]:
    params, output = sequence.params, sequence.output_ids
    forbidden = []
    complete = sequence.grammar is not None and sequence.grammar.is_complete
    if len(output) < params.min_tokens and not complete:
        forbidden += [*sequence.end_ids, *(params.stop_token_ids or [])]
    for word in params.bad_words_token_ids:
        start = word[:-1]
        if not start or output[-len(start) :] == start:
            forbidden.append(word[-1])
    return forbidden


def _penalized(logits: Tensor, sequence: Sequence) -> Tensor:
    """Apply the three penalties; formulas of vLLM, the first from arXiv 1909.05858."""
    penalty, presence = sequence.params.repetition_penalty, sequence.params.presence_penalty
    frequency = sequence.params.frequency_penalty
    if penalty == 1.0 and not presence and not frequency:
        return logits
    counts = sequence.counts(len(logits), logits.device)
    if penalty != 1.0:
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where((counts.prompt > 0) | (counts.output > 0), penalized, logits)
    if presence or frequency:
        logits = logits - frequency * counts.output - presence * (counts.output > 0)
    return logits


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw one token of what the truncations leave, by one uniform number over the ordered rest."""
    if params.min_p > 0:
        logits = logits.masked_fill(logits < logits.max() + math.log(params.min_p), -math.inf)
    logs, ids = _likeliest(logits, params)
    if params.typical_p < 1:
        logs, ids = _typical(logs, ids, params.typical_p)
    chances = logs.double().exp()
    if params.top_p < 1:
        before = chances.cumsum(dim=-1) - chances  # of the likelier ones
        chances = chances.masked_fill(before >= params.top_p, 0.0)  # the first one always stays
    heights = chances.cumsum(dim=-1)
    point = torch.rand(1, generator=generator, dtype=torch.float64).to(heights.device) * heights[-1]
    place = int(torch.searchsorted(heights, point, right=True))
    return int(ids[min(place, len(heights) - 1)])


def _likeliest(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and ids of what top-k leaves, likeliest first where the order matters.

    For top-p alone the likeliest 1,024 usually do; their log-probabilities are still of the whole vocabulary.
    """
    vocab = len(logits)
    if 0 < params.top_k < vocab:
        smallest = logits.topk(params.top_k).values[-1]
        ids = (logits >= smallest).nonzero().squeeze(1)  # ties of the last one stay
        values, order = logits[ids].sort(descending=True, stable=True)
        return values.log_softmax(dim=-1), ids[order]
    logs = logits.log_softmax(dim=-1)
    if params.top_p == 1 and params.typical_p == 1:
        return logs, torch.arange(vocab, device=logits.device)
    if params.typical_p == 1 and vocab > _FEW:
        few = logs.topk(_FEW)
        if few.values.exp().sum() >= params.top_p:
            return few.values, few.indices
    values, ids = logs.sort(descending=True, stable=True)
    return values, ids


def _typical(logs: Tensor, ids: Tensor, typical_p: float) -> tuple[Tensor, Tensor]:
    """Keep the tokens whose surprise is nearest to the mean surprise, up to that total probability."""
    chances = logs.exp()
    entropy = -(chances * logs.nan_to_num(neginf=0.0)).sum()
    order = (-logs - entropy).abs().argsort(stable=True)
    before = chances[order].cumsum(dim=-1) - chances[order]
    kept = order[before < typical_p]
    values, order = logs[kept].sort(descending=True, stable=True)
    return values.log_softmax(dim=-1), ids[kept][order]
