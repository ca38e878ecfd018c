"""The generation loop: prompts are computed first, then all sequences take a step together.

One row of tokens holds the newest token of every running sequence. Prompts go through in pieces, so memory
does not grow with their length but for the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from puna.engine.kv_cache import CachedAttention, KVCache
from puna.engine.sampling import SamplingParams, sample
from puna.engine.sequence import Sequence
from puna.errors import ParameterError
from puna.model.llama import Llama

PREFILL_CHUNK = 2048


def start(
    model: Llama,
    prompt_ids: SequenceOf[int],
    params: SamplingParams,
    *,
    cache: KVCache | None = None,
) -> Sequence:
    """Make a sequence ready for `generate`, reusing what `cache` already holds of the same prefix.

    Raises ParameterError for an empty prompt, an id outside the vocabulary, or one that fills the context.
    """
    config = model.config
    if not prompt_ids:
        raise ParameterError("the prompt is empty: a model needs at least one token, such as BOS")
    outside = [i for i in prompt_ids if not 0 <= i < config.vocab_size]
    if outside:
        raise ParameterError(f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}")
    longest = config.max_position_embeddings
    if len(prompt_ids) >= longest:
        raise ParameterError(f"the prompt has {len(prompt_ids)} tokens; the model's context is {longest}")
    if cache is None:
        weight = model.model.norm.weight
        cache = KVCache(config, dtype=weight.dtype, device=weight.device, capacity=len(prompt_ids) + 64)
    sequence = Sequence(prompt_ids, params, cache, max_model_len=longest)
    cache.keep_prefix(sequence.prompt_ids)
    return sequence


@torch.inference_mode()
def generate(model: Llama, sequences: SequenceOf[Sequence]) -> Iterator[tuple[Sequence, int]]:
    """Run all sequences to their ends; yield (sequence, new token id) as tokens come.

    A caller may end a sequence itself by setting its `finish_reason`.
    """
    for sequence in sequences:
        yield from _accept(sequence, prefill(model, sequence))
    while running := [s for s in sequences if s.finish_reason is None]:
        logits = _step(model, running)
        for sequence, row in zip(running, logits, strict=True):
            yield from _accept(sequence, row)


def _accept(sequence: Sequence, logits: Tensor) -> Iterator[tuple[Sequence, int]]:
    token_id = sample(logits, sequence.params, sequence.generator, sequence.prompt_ids, sequence.output_ids)
    sequence.append(token_id)
    yield sequence, token_id


def prefill(model: Llama, sequence: Sequence) -> Tensor:
    """Compute what the cache does not hold of the prompt; return the last token's logits, (vocab,)."""
    ids, cache = sequence.token_ids, sequence.cache
    device = model.model.norm.weight.device
    while True:
        part = ids[cache.length : cache.length + PREFILL_CHUNK]
        first, is_last = cache.length, cache.length + len(part) == len(ids)
        attention = CachedAttention([cache], [len(part)])
        positions = torch.arange(first, first + len(part), device=device)
        select = torch.tensor([len(part) - 1] if is_last else [], dtype=torch.long, device=device)
        logits: Tensor = model(torch.tensor(part, device=device), positions, attention, select)
        attention.advance(part)
        if is_last:
            return logits[0]


def _step(model: Llama, sequences: SequenceOf[Sequence]) -> Tensor:
    """Compute the next logits of every sequence, (sequences, vocab)."""
    device = model.model.norm.weight.device
    newest = [sequence.output_ids[-1] for sequence in sequences]
    caches = [sequence.cache for sequence in sequences]
    positions = torch.tensor([cache.length for cache in caches], device=device)
    attention = CachedAttention(caches, [1] * len(caches))
    logits: Tensor = model(torch.tensor(newest, device=device), positions, attention)
    attention.advance(newest)
    return logits
