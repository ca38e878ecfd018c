"""How to choose tokens and when to stop: `SamplingParams`, with vLLM's names, order, defaults and limits.

Checked when made and again when a request is added, since users change fields in between. Source: vLLM 0.33
`sampling_params.py`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from puna.errors import ParameterError

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5
_COLDEST = 1e-2  # a positive temperature below it would overflow the logits
_MOST_SEQUENCES = 16384
_MOST_BAD_WORDS = 128


@dataclass
class StructuredOutputsParams:
    """Constrain the output; exactly one of the kinds must be given."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar", "json_object")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ParameterError(f"give exactly one of {', '.join(kinds)}, got {', '.join(given) or 'none'}")
        value = getattr(self, given[0])
        if value in ("", [], False):
            raise ParameterError(f"{given[0]} must not be empty, got {value!r}")


@dataclass
class SamplingParams:
    """Say how to sample and when to stop. A wrong value raises ParameterError, which is a ValueError."""

    n: int = 1
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: all
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: until the context is full
    min_tokens: int = 0
    logprobs: int | None = None  # -1: the whole vocabulary
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    typical_p: float = 1.0  # not vLLM's: locally typical sampling, arXiv 2202.00666
    skip_reading_prefix_cache: bool | None = None
    # token ids of `bad_words`, filled in by whoever has a tokenizer
    bad_words_token_ids: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.bad_words, str):
            raise ParameterError(f"bad_words must be a list, got {self.bad_words!r}")
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or []))
        self.bad_words = list(self.bad_words or [])
        if self.seed == -1:
            self.seed = None
        if self.logprobs is True:
            self.logprobs = 1
        self.validate()
        if GREEDY_BELOW <= self.temperature < _COLDEST:
            logger.warning("temperature %g is raised to %g", self.temperature, _COLDEST)
            self.temperature = _COLDEST

    def validate(self) -> None:
        """Raise ParameterError naming the field that is out of range."""
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, above=True)
        _within("typical_p", self.typical_p, 0.0, 1.0, above=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("n", self.n, 1, _MOST_SEQUENCES)
        _integer("top_k", self.top_k, -1, 2**31)
        _integer("max_tokens", self.max_tokens, 1, 2**31)
        _integer("min_tokens", self.min_tokens, 0, 2**31)
        _integer("logprobs", self.logprobs, -1, 2**31)
        _integer("prompt_logprobs", self.prompt_logprobs, -1, 2**31)
        _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if self.prompt_logprobs is not None and self.skip_reading_prefix_cache is False:
            raise ParameterError("prompt_logprobs do not go with skip_reading_prefix_cache=False")
        if self.n > 1 and self.greedy:
            raise ParameterError(f"n must be 1 when using greedy sampling, got {self.n}")
        self._validate_lists()

    def _validate_lists(self) -> None:
        for name in ("stop", "bad_words"):
            words = getattr(self, name) or []
            if any(not isinstance(word, str) or not word for word in words):
                raise ParameterError(f"{name} cannot contain an empty string, got {words!r}")
        if self.stop and not self.detokenize:
            raise ParameterError("stop strings need detokenize=True")
        if len(self.bad_words or []) > _MOST_BAD_WORDS:
            raise ParameterError(
                f"bad_words may hold {_MOST_BAD_WORDS} words, got {len(self.bad_words or [])}"
            )
        for name in ("stop_token_ids", "allowed_token_ids"):
            ids = getattr(self, name)
            if any(isinstance(i, bool) or not isinstance(i, int) for i in ids or []):
                raise ParameterError(f"{name} must hold integers, got {ids!r}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ParameterError("allowed_token_ids must not be empty")
        for token_id, bias in (self.logit_bias or {}).items():
            is_number = isinstance(bias, int | float) and not math.isnan(bias) and bias != math.inf
            if not isinstance(token_id, int) or not is_number:
                raise ParameterError(f"logit_bias must map token ids to numbers, got {token_id!r}: {bias!r}")

    @property
    def greedy(self) -> bool:
        """Say whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def skip_prefix_cache(self) -> bool:
        """Say whether the whole prompt must be computed: asked for, or needed for its logprobs."""
        if self.skip_reading_prefix_cache is None:
            return self.prompt_logprobs is not None
        return self.skip_reading_prefix_cache

    def clone(self) -> SamplingParams:
        """Return an independent copy."""
        return copy.deepcopy(self)


@dataclass
class BeamSearchParams:
    """Say how to search with beams: score = log-probability / length ** length_penalty."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _integer("beam_width", self.beam_width, 1, 1024)
        _integer("max_tokens", self.max_tokens, 1, 2**31)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("length_penalty", self.length_penalty, -math.inf, math.inf)


def _within(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high or (above and value == low):
        raise ParameterError(f"{name} must be in {'(' if above else '['}{low:g}, {high:g}], got {value!r}")


def _integer(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParameterError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ParameterError(f"{name} must be at least {low}, got {value}")
    if value > high:
        raise ParameterError(f"{name} must be at most {high}, got {value}")
