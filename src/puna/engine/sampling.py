"""How to choose tokens and when to stop: `SamplingParams`, with vLLM's names, order, defaults and limits.

Checked when made and again when a request is added, since users change fields in between. A field of vLLM's
that Puna does not have is refused by name as soon as it is set; `docs/engine.md` lists what differs. Source:
vLLM 0.33 `sampling_params.py`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import Any

from puna.errors import ParameterError, UnsupportedError

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5
_COLDEST = 1e-2  # a positive temperature below it would overflow the logits
_MOST_SEQUENCES = 16384
_MOST_BAD_WORDS = 128
_MOST_LOGPROB_IDS = 128
_MOST_BIAS = 100.0  # what `from_optional` cuts a bias to, as OpenAI's interface does

# Fields of vLLM's that Puna lacks, why, and the values that ask for nothing.
_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "watermarking": ("output is not watermarked", (None, False)),
    "prompt_logprob_token_ids": ("prompt_logprobs=-1 has all ids", (None,)),
    "prompt_logprob_start": ("prompt_logprobs begin with the prompt", (None, 0)),
    "extra_args": ("there are no custom samplers that would read them", (None, {})),
    "thinking_token_budget": ("the engine does not know where thinking begins and ends", (None, -1)),
    "routed_experts_prompt_start": ("the experts that were chosen are not reported", (0,)),
    "trace_decode_token_ids": ("tokens are always sampled", (None,)),
}


class SamplingType(IntEnum):
    """Say how tokens are drawn."""

    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2


class RequestOutputKind(Enum):
    """Say what each output of a stream holds: all so far, what is new, or all and only at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    """Constrain the output; exactly one of the kinds must be given."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # Lark, or GBNF (`root ::= ...`)
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None  # JSON: {"structures": [{"begin", "schema", "end"}], "triggers": [...]}

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ParameterError(f"give exactly one of {', '.join(kinds)}, got {', '.join(given) or 'none'}")
        kind = given[0]
        value = getattr(self, kind)
        if value in ("", [], False):
            raise ParameterError(f"{kind} must not be empty, got {value!r}")
        kinds_of_value: dict[str, tuple[type, ...]] = {
            "json": (str, dict),
            "choice": (list, tuple),
            "json_object": (bool,),
        }
        types = kinds_of_value.get(kind, (str,))
        if not isinstance(value, types):
            names = " or ".join(wanted.__name__ for wanted in types)
            raise ParameterError(f"{kind} must be of type {names}, got {value!r}")
        if kind == "choice" and not all(isinstance(item, str) for item in self.choice or ()):
            raise ParameterError(f"choice must hold texts, got {value!r}")
        self._refuse_what_would_be_ignored(kind)

    def _refuse_what_would_be_ignored(self, kind: str) -> None:
        of_json = ("json", "json_object")
        for name, kinds in {
            "disable_any_whitespace": of_json,
            "whitespace_pattern": of_json,
            "disable_additional_properties": (*of_json, "structural_tag"),
        }.items():
            if getattr(self, name) and kind not in kinds:
                raise ParameterError(f"{name} goes with {' or '.join(kinds)}, not with {kind}")


@dataclass
class RepetitionDetectionParams:
    """End an answer with "repetition" when its last tokens are one pattern, `min_count` times in a row."""

    max_pattern_size: int = 0  # 0: do not look
    min_pattern_size: int = 0  # 0: 1
    min_count: int = 0  # at least 2 where it looks

    def __post_init__(self) -> None:
        check_integer("max_pattern_size", self.max_pattern_size, 0, 2**31)
        check_integer("min_pattern_size", self.min_pattern_size, 0, self.max_pattern_size)
        check_integer("min_count", self.min_count, 2 if self.max_pattern_size else 0, 2**31)

    def repeats(self, token_ids: Sequence[int]) -> bool:
        """Say whether the end of the ids is such a repetition."""
        for size in range(max(self.min_pattern_size, 1), self.max_pattern_size + 1):
            length = size * self.min_count
            if length > len(token_ids):
                return False
            tail = token_ids[len(token_ids) - length :]
            if tail[size:] == tail[:-size]:
                return True
        return False


@dataclass
class SamplingParams:
    """Say how to sample and when to stop. A wrong value raises ParameterError, which is a ValueError.

    Fields that Puna lacks are there so that setting them raises UnsupportedError, and positions fit vLLM's.
    """

    n: int = 1
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    temperature: float = 1.0
    watermarking: bool | None = None  # refused
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: all
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: until the context is full
    min_tokens: int = 0  # before it no end, no stop id and no stop string counts
    logprobs: int | None = None  # -1: the whole vocabulary
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: Sequence[int] | None = None  # refused
    prompt_logprob_start: int | None = None  # refused
    logprob_token_ids: Sequence[int] | None = None  # logprobs of these ids instead of the best
    flat_logprobs: bool = False  # FlatLogprobs instead of a list of dicts
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # no tokenizer of a Llama puts any: both values mean the same
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None  # tokens from one output of a stream to the next
    skip_clone: bool = False  # `clone` returns the params themselves
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    extra_args: dict[str, Any] | None = None  # refused
    bad_words: Sequence[str] | None = None
    skip_reading_prefix_cache: bool | None = None  # None: only where prompt_logprobs need the whole prompt
    thinking_token_budget: int | None = None  # refused
    repetition_detection: RepetitionDetectionParams | None = None
    routed_experts_prompt_start: int = 0  # refused
    trace_decode_token_ids: Sequence[int] | None = None  # refused
    typical_p: float = 1.0  # not vLLM's: locally typical sampling, arXiv 2202.00666
    # token ids of `bad_words`, filled in by whoever has a tokenizer
    bad_words_token_ids: list[list[int]] = field(default_factory=list)

    @classmethod
    def from_optional(cls, **values: Any) -> SamplingParams:
        """Make params from fields of which None means the default.

        `logit_bias` may have ids written as strings; its values are cut to [-100, 100].
        """
        given = {name: value for name, value in values.items() if value is not None}
        if "logit_bias" in given:
            given["logit_bias"] = _read_bias(given["logit_bias"])
        return cls(**given)

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else _listed("stop", self.stop) or []
        self.stop_token_ids = _listed("stop_token_ids", self.stop_token_ids) or []
        self.bad_words = _listed("bad_words", self.bad_words) or []
        self.allowed_token_ids = _listed("allowed_token_ids", self.allowed_token_ids)
        self.logprob_token_ids = _listed("logprob_token_ids", self.logprob_token_ids)
        if self.seed == -1:
            self.seed = None
        if self.logprobs is True:
            self.logprobs = 1
        if self.prompt_logprobs is True:
            self.prompt_logprobs = 1
        self.validate()
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids))
        if GREEDY_BELOW <= self.temperature < _COLDEST:
            logger.warning("temperature %g is raised to %g", self.temperature, _COLDEST)
            self.temperature = _COLDEST

    def validate(self) -> None:
        """Raise ParameterError naming the field that is out of range, UnsupportedError for one Puna lacks."""
        for name, (why, nothing) in _REFUSED.items():
            if getattr(self, name) not in nothing:
                raise UnsupportedError(f"{name}={getattr(self, name)!r} is not supported: {why}")
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, above=True)
        _within("typical_p", self.typical_p, 0.0, 1.0, above=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_integer("n", self.n, 1, _MOST_SEQUENCES)
        check_integer("top_k", self.top_k, -1, 2**31)
        check_integer("max_tokens", self.max_tokens, 1, 2**31, optional=True)
        check_integer("min_tokens", self.min_tokens, 0, 2**31)
        check_integer("logprobs", self.logprobs, -1, 2**31, optional=True)
        check_integer("prompt_logprobs", self.prompt_logprobs, -1, 2**31, optional=True)
        check_integer("seed", self.seed, -(2**63), 2**64 - 1, optional=True)
        check_integer("stream_interval", self.stream_interval, 1, 2**31, optional=True)
        _of_type("output_kind", self.output_kind, RequestOutputKind)
        _of_type("structured_outputs", self.structured_outputs, StructuredOutputsParams, optional=True)
        _of_type("repetition_detection", self.repetition_detection, RepetitionDetectionParams, optional=True)
        _of_type("logit_bias", self.logit_bias, dict, optional=True)
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
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            ids = getattr(self, name)
            if any(isinstance(i, bool) or not isinstance(i, int) for i in ids or []):
                raise ParameterError(f"{name} must hold integers, got {ids!r}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ParameterError("allowed_token_ids must not be empty")
        self._validate_logprob_ids()
        for token_id, bias in (self.logit_bias or {}).items():
            is_number = isinstance(bias, int | float) and not math.isnan(bias) and bias != math.inf
            if not isinstance(token_id, int) or not is_number:
                raise ParameterError(f"logit_bias must map token ids to numbers, got {token_id!r}: {bias!r}")

    def _validate_logprob_ids(self) -> None:
        if self.logprob_token_ids is None:
            return
        count = len(self.logprob_token_ids)
        if count > _MOST_LOGPROB_IDS:
            raise ParameterError(f"logprob_token_ids may hold {_MOST_LOGPROB_IDS} ids, got {count}")
        if self.logprobs is not None and self.logprobs != count:
            raise ParameterError(
                f"logprobs must be {count} with so many logprob_token_ids, got {self.logprobs}"
            )

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

    @property
    def sampling_type(self) -> SamplingType:
        """Return how tokens are drawn."""
        if self.greedy:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED

    @property
    def all_stop_token_ids(self) -> set[int]:
        """Return the ids asked for; the model's own ends are added where it runs."""
        return set(self.stop_token_ids or ())

    @property
    def wants_logprobs(self) -> bool:
        """Say whether log-probabilities of the output are to be returned."""
        return self.logprobs is not None or self.logprob_token_ids is not None

    def clone(self) -> SamplingParams:
        """Return an independent copy, or with `skip_clone` the params themselves."""
        return self if self.skip_clone else copy.deepcopy(self)


@dataclass
class BeamSearchParams:
    """Say how to search with beams: score = log-probability / length ** length_penalty."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False  # whether `tokens` keeps the id that ended a beam
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True
    watermarking: bool | None = None  # refused
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_integer("beam_width", self.beam_width, 1, 1024)
        check_integer("max_tokens", self.max_tokens, 1, 2**31)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("length_penalty", self.length_penalty, -math.inf, math.inf)
        self.step_params()

    def step_params(self) -> SamplingParams:
        """Return what the two kinds of params have in common; raises where `SamplingParams` does."""
        names = {f.name for f in fields(SamplingParams)} & {f.name for f in fields(self)}
        common = {name: getattr(self, name) for name in names - {"temperature"}}
        return SamplingParams(temperature=0.0, **common)


def _read_bias(bias: dict[Any, float]) -> dict[int, float]:
    try:
        read = {int(token_id): float(value) for token_id, value in bias.items()}
    except (TypeError, ValueError) as error:
        raise ParameterError(f"logit_bias must map token ids to numbers: {error}") from error
    return {i: min(max(value, -_MOST_BIAS), _MOST_BIAS) for i, value in read.items()}


def _within(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high or (above and value == low):
        raise ParameterError(f"{name} must be in {'(' if above else '['}{low:g}, {high:g}], got {value!r}")


def _listed(name: str, values: Iterable[Any] | None) -> list[Any] | None:
    if values is not None and (isinstance(values, str) or not isinstance(values, Iterable)):
        raise ParameterError(f"{name} must be a list, got {values!r}")
    return None if values is None else list(values)


def _of_type(name: str, value: Any, wanted: type, *, optional: bool = False) -> None:
    if not isinstance(value, wanted) and not (optional and value is None):
        raise ParameterError(f"{name} must be of type {wanted.__name__}, got {value!r}")


def check_integer(
    name: str, value: Any, low: int, high: int | None = None, *, optional: bool = False
) -> None:
    """Raise ParameterError that names the value unless it is an integer from `low` to `high`."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParameterError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ParameterError(f"{name} must be at least {low}, got {value}")
    if high is not None and value > high:
        raise ParameterError(f"{name} must be at most {high}, got {value}")
