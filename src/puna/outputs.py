"""What a request gives back, in vLLM's shapes: text, ids, log-probabilities, and why it ended.

Here ids become text: each sequence has its own decoder, and its stop strings are looked for in what it adds.
Attributes of vLLM's that nothing in Puna fills are there and None.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

from torch import Tensor

from puna.engine.request import Logprobs, Sequence
from puna.engine.sampling import RequestOutputKind, SamplingParams
from puna.text.stop_strings import StopStrings
from puna.text.tokenizer import Tokenizer


@dataclass
class Logprob:
    """The log-probability of a token, its rank in the vocabulary (from 1), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]


class FlatLogprobs(SequenceOf[PositionLogprobs]):
    """Log-probabilities of many positions in six long lists, read like a list of dicts."""

    def __init__(self, positions: Iterable[PositionLogprobs | None] = ()) -> None:
        self.start_indices: list[int] = []
        self.end_indices: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ranks: list[int | None] = []
        self.decoded_tokens: list[str | None] = []
        self.extend(positions)

    def append(self, position: PositionLogprobs | None) -> None:
        """Add one position; None, as at the prompt's first token, reads as an empty dict."""
        self.start_indices.append(len(self.token_ids))
        for token_id, found in (position or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(found.logprob)
            self.ranks.append(found.rank)
            self.decoded_tokens.append(found.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def extend(self, positions: Iterable[PositionLogprobs | None]) -> None:
        """Add several positions."""
        for position in positions:
            self.append(position)

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> PositionLogprobs: ...

    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...

    def __getitem__(self, index: int | slice) -> PositionLogprobs | FlatLogprobs:
        if isinstance(index, slice):
            return self._cut(range(*index.indices(len(self))))
        return {
            self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i])
            for i in range(self.start_indices[index], self.end_indices[index])
        }

    def __iter__(self) -> Iterator[PositionLogprobs]:
        return (self[place] for place in range(len(self)))

    def _cut(self, places: range) -> FlatLogprobs:
        cut = FlatLogprobs()
        for place in places:
            entries = slice(self.start_indices[place], self.end_indices[place])
            cut.start_indices.append(len(cut.token_ids))
            cut.token_ids += self.token_ids[entries]
            cut.logprobs += self.logprobs[entries]
            cut.ranks += self.ranks[entries]
            cut.decoded_tokens += self.decoded_tokens[entries]
            cut.end_indices.append(len(cut.token_ids))
        return cut


SampleLogprobs = list[PositionLogprobs] | FlatLogprobs
PromptLogprobs = list[PositionLogprobs | None] | FlatLogprobs


@dataclass
class CompletionOutput:
    """One answer. `stop_reason` is the stop string or id that ended it, None for an end of turn.

    `finish_reason` is "stop", "length", "abort", "error", "repetition", or None while it runs.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    routed_experts: None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None
    sampling_mask: None = None
    spec_decode_metrics: None = None
    weight_versions: None = None

    def finished(self) -> bool:
        """Say whether the answer has ended."""
        return self.finish_reason is not None


@dataclass
class RequestStateStats:
    """Counts and times of one request; 0.0 for what has not happened yet.

    `arrival_time` is seconds since 1970, the others are of a monotonic clock, of the first answer save
    `last_token_ts`.
    """

    num_generation_tokens: int = 0
    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    num_preemptions: int = 0

    @property
    def queue_seconds(self) -> float:
        """Return how long the request waited before its first step."""
        return max(self.scheduled_ts - self.queued_ts, 0.0)

    @property
    def prefill_seconds(self) -> float:
        """Return how long it took from the first step to the first token."""
        return max(self.first_token_ts - self.scheduled_ts, 0.0)

    @property
    def decode_seconds(self) -> float:
        """Return how long it took from the first token to the last."""
        return max(self.last_token_ts - self.first_token_ts, 0.0)


@dataclass
class RequestOutput:
    """All answers to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestStateStats | None = None
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None
    num_cache_creation_tokens: int | None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None

    def add(self, next_output: RequestOutput, aggregate: bool) -> None:
        """Take in a later output of the request: by joining deltas if `aggregate`, else by replacing."""
        self.finished |= next_output.finished
        self.metrics = next_output.metrics
        for later in next_output.outputs:
            earlier = next((o for o in self.outputs if o.index == later.index), None)
            if earlier is None:
                self.outputs.append(later)
            elif aggregate:
                _join(earlier, later)
            else:
                self.outputs[self.outputs.index(earlier)] = later


def _join(earlier: CompletionOutput, later: CompletionOutput) -> None:
    earlier.text += later.text
    earlier.token_ids = [*earlier.token_ids, *later.token_ids]
    if later.logprobs is not None and earlier.logprobs is not None:
        earlier.logprobs.extend(later.logprobs)
    earlier.cumulative_logprob = later.cumulative_logprob
    earlier.finish_reason, earlier.stop_reason = later.finish_reason, later.stop_reason


@dataclass
class BeamSearchSequence:
    """One beam: ids and text with the prompt, log-probability and logprobs of what was generated."""

    tokens: list[int]
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    lora_request: Any = None
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class BeamSearchOutput:
    """The best beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass
class PoolingOutput:
    """Hidden states of a text: (hidden,), or (tokens, hidden) of the task "token_embed"."""

    data: Tensor


@dataclass
class EmbeddingOutput:
    """A vector for a text."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Return the length of the vector."""
        return len(self.embedding)


@dataclass
class ScoringOutput:
    """How alike two texts are, from -1 to 1."""

    score: float


Pooled = TypeVar("Pooled")


@dataclass
class PoolingRequestOutput(Generic[Pooled]):
    """What was pooled from one prompt, or from the two of a pair."""

    request_id: str
    outputs: Pooled
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0  # pooling computes the whole prompt
    finished: bool = True
    error: str | None = None


@dataclass
class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """The vector of one prompt."""


@dataclass
class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """The score of one pair."""


class TextSequence:
    """Turn the ids of one sequence into text as they come."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, *, continues: bool) -> None:
        params = sequence.params
        self.sequence = sequence
        self.text = ""
        self.num_sent_tokens = 0  # in outputs so far
        self.num_sent_chars = 0
        self.end_sent = False
        self.cumulative_logprob = 0.0  # of what `logprobs_from` has named
        self._named: SampleLogprobs = FlatLogprobs() if params.flat_logprobs else []
        self._tokenizer = tokenizer
        self._seen = 0
        skip = params.skip_special_tokens
        self._decoder = tokenizer.stream(skip_special_tokens=skip, continues=continues)
        self._stop = StopStrings(params.stop or (), include=params.include_stop_str_in_output)

    @property
    def is_due(self) -> bool:
        """Say whether there is news enough for an output: a first token, an interval's worth, the end."""
        if self.sequence.finish_reason is not None:
            return not self.end_sent
        new = self.sequence.num_output - self.num_sent_tokens
        interval = self.sequence.params.stream_interval or 1
        return new >= (interval if self.num_sent_tokens else 1)

    def mark_sent(self) -> None:
        """Note that an output holds all that there is."""
        self.num_sent_tokens, self.num_sent_chars = self.sequence.num_output, len(self.text)
        self.end_sent = self.sequence.finish_reason is not None

    def logprobs_from(self, first: int) -> SampleLogprobs:
        """Return a copy of the named log-probabilities from place `first` on; each is named but once."""
        tokenizer = self._tokenizer if self.sequence.params.detokenize else None
        for found in self.sequence.logprobs[len(self._named) : self.sequence.num_output]:
            self._named.append(name_logprobs(found, tokenizer))
            self.cumulative_logprob += found.values[0]
        return self._named[first:]

    def update(self) -> str | None:
        """Take in the new ids; return the stop string that was found, after which the text ends."""
        sequence, params = self.sequence, self.sequence.params
        if not params.detokenize:
            return None
        output = sequence.output_ids
        for place in range(self._seen, len(output)):
            ends = output[place] in sequence.end_ids or output[place] in (params.stop_token_ids or ())
            is_end = place == len(output) - 1 and sequence.finish_reason == "stop" and ends
            if is_end and not params.include_stop_str_in_output:
                break
            piece = self._decoder.push(output[place])
            self.text += self._stop.push(piece, counts=place + 1 > params.min_tokens)
            if self._stop.found is not None:
                del sequence.token_ids[len(sequence.prompt_ids) + place + 1 :]
                return self._stop.found
        self._seen = len(output)
        if sequence.finish_reason is not None:
            rest = self._decoder.flush()
            self.text += self._stop.push(rest, counts=len(output) > params.min_tokens) + self._stop.flush()
            return self._stop.found
        return None


class RequestOutputs:
    """Gather the answers of one request.

    With `continues` the text goes on from the prompt, so a space that it begins with is kept.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        continues: bool,
        lora_request: Any = None,
    ) -> None:
        self.request_id = request_id
        self.lora_request = lora_request
        self._continues = continues
        self.prompt = prompt
        self.params = params
        self._tokenizer = tokenizer
        self._arrival_time = time.time()
        self._named_prompt: PromptLogprobs | None = None
        self.sequences: dict[int, TextSequence] = {}

    def text_of(self, sequence: Sequence) -> TextSequence:
        """Return the text side of a sequence, made when it is first seen."""
        if sequence.index not in self.sequences:
            text = TextSequence(sequence, self._tokenizer, continues=self._continues)
            self.sequences[sequence.index] = text
        return self.sequences[sequence.index]

    @property
    def finished(self) -> bool:
        """Say whether all answers have ended."""
        ended = [t.sequence.finish_reason is not None for t in self.sequences.values()]
        return len(ended) == self.params.n and all(ended)

    @property
    def is_due(self) -> bool:
        """Say whether a stream should get an output now, by `output_kind` and `stream_interval`."""
        if self.finished or self.params.output_kind is RequestOutputKind.FINAL_ONLY:
            return self.finished
        return any(text.is_due for text in self.sequences.values())

    def snapshot(self, kind: RequestOutputKind | None = None) -> RequestOutput:
        """Return the request as it stands now; of kind DELTA what is new since the last snapshot.

        Without `kind` the request's own `output_kind` is taken.
        """
        is_delta = (kind or self.params.output_kind) is RequestOutputKind.DELTA
        texts = [self.sequences[index] for index in sorted(self.sequences)]
        first = texts[0].sequence
        chosen = [text for text in texts if text.is_due] if is_delta else texts
        outputs = [self._completion(text, is_delta=is_delta) for text in chosen]
        for text in chosen:
            text.mark_sent()
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_ids,
            prompt_logprobs=self._prompt_logprobs(first),
            outputs=outputs,
            finished=self.finished,
            metrics=self._stats([text.sequence for text in texts]),
            lora_request=self.lora_request,
            num_cached_tokens=first.num_cached,
        )

    def _prompt_logprobs(self, first: Sequence) -> PromptLogprobs | None:
        if first.params.prompt_logprobs is None:
            return None
        if self._named_prompt is None:  # all are there before the first token is drawn
            tokenizer = self._tokenizer if self.params.detokenize else None
            named = [None, *(name_logprobs(found, tokenizer) for found in first.prompt_logprobs)]
            self._named_prompt = FlatLogprobs(named) if self.params.flat_logprobs else named
        return self._named_prompt

    def _completion(self, text: TextSequence, *, is_delta: bool) -> CompletionOutput:
        sequence = text.sequence
        tokens, chars = (text.num_sent_tokens, text.num_sent_chars) if is_delta else (0, 0)
        logprobs = text.logprobs_from(tokens) if sequence.params.wants_logprobs else None
        return CompletionOutput(
            index=sequence.index,
            text=text.text[chars:],
            token_ids=sequence.output_ids[tokens:],
            cumulative_logprob=None if logprobs is None else text.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            lora_request=self.lora_request,
        )

    def _stats(self, sequences: SequenceOf[Sequence]) -> RequestStateStats:
        times = sequences[0].times
        return RequestStateStats(
            num_generation_tokens=sum(sequence.num_output for sequence in sequences),
            arrival_time=self._arrival_time,
            queued_ts=times.arrived,
            scheduled_ts=times.scheduled or 0.0,
            first_token_ts=times.first_token or 0.0,
            last_token_ts=max(sequence.times.last_token or 0.0 for sequence in sequences),
            first_token_latency=(times.first_token - times.arrived) if times.first_token else 0.0,
            num_preemptions=sum(sequence.num_preemptions for sequence in sequences),
        )


def name_logprobs(found: Logprobs, tokenizer: Tokenizer | None) -> PositionLogprobs:
    """Return the log-probabilities of one position by id, with each token's text if there is a tokenizer."""
    return {
        token_id: Logprob(value, rank, None if tokenizer is None else tokenizer.decode([token_id]))
        for token_id, value, rank in zip(found.token_ids, found.values, found.ranks, strict=True)
    }
