"""How the next token is chosen from the logits.

`SamplingParams` has vLLM's names, defaults and limits. The order is vLLM's too: penalties, temperature,
min-p, top-k, top-p, draw. The draw is argmax(probability / exponential noise), which equals sampling and
needs no cumulative sum; noise comes from the sequence's own generator: a seed gives the same text in any
company.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.errors import ParameterError

GREEDY_BELOW = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Say how to sample and when to stop. A wrong value raises ParameterError, which is a ValueError."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output only
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: until the context is full
    min_tokens: int = 0  # until then no stop token id is chosen

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, above=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < -1:
            raise ParameterError(f"top_k must be 0 or -1 (all) or at least 1, got {self.top_k!r}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ParameterError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise ParameterError(f"min_tokens must be from 0 to max_tokens, got {self.min_tokens}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ParameterError(f"seed must fit in 64 bits, got {self.seed}")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if any(not text for text in self.stop):
            raise ParameterError("stop cannot contain an empty string")

    @property
    def greedy(self) -> bool:
        """Say whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW


def _within(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high or (above and value == low):
        raise ParameterError(f"{name} must be in {'(' if above else '['}{low:g}, {high:g}], got {value!r}")


def make_generator(seed: int | None) -> torch.Generator:
    """Return a generator on the CPU, seeded from the system where no seed is given."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def sample(
    logits: Tensor,
    params: SamplingParams,
    generator: torch.Generator,
    prompt_ids: SequenceOf[int] = (),
    output_ids: SequenceOf[int] = (),
) -> int:
    """Choose one token id from logits (vocab,); ties go to the lowest id."""
    logits = _penalized(logits.float(), params, prompt_ids, output_ids)
    if len(output_ids) < params.min_tokens and params.stop_token_ids:
        stops = torch.tensor(params.stop_token_ids, device=logits.device)
        logits = logits.index_fill(0, stops, -math.inf)
    if params.greedy:
        return int(logits.argmax())
    logits = _truncated(logits / max(params.temperature, 1e-2), params)
    probabilities = logits.softmax(dim=-1)
    noise = torch.empty(len(probabilities)).exponential_(generator=generator).to(probabilities.device)
    return int((probabilities / noise).argmax())


def _penalized(
    logits: Tensor, params: SamplingParams, prompt_ids: SequenceOf[int], output_ids: SequenceOf[int]
) -> Tensor:
    """Apply the three penalties; formulas of vLLM, the first from arXiv 1909.05858."""
    if params.repetition_penalty != 1.0 and (prompt_ids or output_ids):
        seen = torch.tensor(sorted({*prompt_ids, *output_ids}), device=logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits = logits.clone()
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.frequency_penalty or params.presence_penalty) and output_ids:
        counts = torch.bincount(torch.tensor(output_ids), minlength=len(logits)).to(logits.device)
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return logits


def _truncated(logits: Tensor, params: SamplingParams) -> Tensor:
    """Set to -inf what min-p, top-k and top-p leave out; the likeliest token always stays."""
    if params.min_p > 0:
        floor = logits.max() + math.log(params.min_p)
        logits = logits.masked_fill(logits < floor, -math.inf)
    if 0 < params.top_k < len(logits):
        smallest = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if params.top_p < 1:
        ordered, ids = logits.sort()
        tail = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - params.top_p
        tail[-1] = False
        logits = logits.masked_fill(torch.zeros_like(tail).scatter(0, ids, tail), -math.inf)
    return logits
