"""What a request gives back, in vLLM's shapes: text, ids, log-probabilities, and why it ended.

Here ids become text: each sequence has its own decoder, and its stop strings are looked for in what it adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from puna.engine.request import Logprobs, RequestTimes, Sequence
from puna.text.stop_strings import StopStrings
from puna.text.tokenizer import Tokenizer


@dataclass
class Logprob:
    """The log-probability of a token, its rank in the vocabulary (from 1), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One answer. `stop_reason` is the stop string or id that ended it, None for an end of turn."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Say whether the answer has ended."""
        return self.finish_reason is not None


@dataclass
class RequestStats:
    """Seconds on a monotonic clock, and counts, of one request."""

    arrival_time: float
    scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None
    num_generation_tokens: int
    num_preemptions: int

    @property
    def queue_seconds(self) -> float | None:
        """Return how long the request waited before its first step."""
        return None if self.scheduled_time is None else self.scheduled_time - self.arrival_time

    @property
    def prefill_seconds(self) -> float | None:
        """Return how long it took from the first step to the first token."""
        if self.scheduled_time is None or self.first_token_time is None:
            return None
        return self.first_token_time - self.scheduled_time

    @property
    def decode_seconds(self) -> float | None:
        """Return how long it took from the first token to the end."""
        if self.finished_time is None or self.first_token_time is None:
            return None
        return self.finished_time - self.first_token_time


@dataclass
class RequestOutput:
    """All answers to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestStats | None = None
    num_cached_tokens: int | None = None
    lora_request: None = None


@dataclass
class BeamSearchSequence:
    """One beam: ids with the prompt, its log-probability, and its text without the prompt."""

    tokens: list[int]
    cum_logprob: float
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[PositionLogprobs] = field(default_factory=list)


@dataclass
class BeamSearchOutput:
    """The best beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass
class EmbeddingOutput:
    """A vector for a text."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Return the length of the vector."""
        return len(self.embedding)


@dataclass
class EmbeddingRequestOutput:
    """The vector of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


@dataclass
class ScoringOutput:
    """How alike two texts are, from -1 to 1."""

    score: float


@dataclass
class ScoringRequestOutput:
    """The score of one pair."""

    request_id: str
    outputs: ScoringOutput
    finished: bool = True


class TextSequence:
    """Turn the ids of one sequence into text as they come."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, *, continues: bool) -> None:
        params = sequence.params
        self.sequence = sequence
        self.text = ""
        self._tokenizer = tokenizer
        self._seen = 0
        skip = params.skip_special_tokens
        self._decoder = tokenizer.stream(skip_special_tokens=skip, continues=continues)
        self._stop = StopStrings(params.stop or (), include=params.include_stop_str_in_output)

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
            if place + 1 <= params.min_tokens:  # stop strings do not count yet
                self.text += piece
            else:
                self.text += self._stop.push(piece)
            if self._stop.found is not None:
                del sequence.token_ids[len(sequence.prompt_ids) + place + 1 :]
                return self._stop.found
        self._seen = len(output)
        if sequence.finish_reason is not None:
            self.text += self._stop.push(self._decoder.flush()) + self._stop.flush()
            return self._stop.found
        return None


class RequestOutputs:
    """Gather the answers of one request.

    With `continues` the text goes on from the prompt, so a space that it begins with is kept.
    """

    def __init__(
        self, request_id: str, prompt: str | None, tokenizer: Tokenizer, n: int, *, continues: bool
    ) -> None:
        self.request_id = request_id
        self._continues = continues
        self.prompt = prompt
        self.n = n
        self._tokenizer = tokenizer
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
        return len(ended) == self.n and all(ended)

    def snapshot(self) -> RequestOutput:
        """Return the request as it stands now."""
        texts = [self.sequences[index] for index in sorted(self.sequences)]
        first = texts[0].sequence
        prompt_logprobs: list[PositionLogprobs | None] | None = None
        if first.params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(self._named(found) for found in first.prompt_logprobs)]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[self._completion(text) for text in texts],
            finished=self.finished,
            metrics=_stats([text.sequence for text in texts]),
            num_cached_tokens=first.num_cached,
        )

    def _completion(self, text: TextSequence) -> CompletionOutput:
        sequence = text.sequence
        wants_logprobs = sequence.params.logprobs is not None
        kept = sequence.logprobs[: sequence.num_output]
        return CompletionOutput(
            index=sequence.index,
            text=text.text,
            token_ids=list(sequence.output_ids),
            cumulative_logprob=sum(found.values[0] for found in kept) if wants_logprobs else None,
            logprobs=[self._named(found) for found in kept] if wants_logprobs else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _named(self, found: Logprobs) -> PositionLogprobs:
        return {
            token_id: Logprob(value, rank, self._tokenizer.decode([token_id]))
            for token_id, value, rank in zip(found.token_ids, found.values, found.ranks, strict=True)
        }


def _stats(sequences: SequenceOf[Sequence]) -> RequestStats:
    times: RequestTimes = dataclasses.replace(sequences[0].times)
    ends = [sequence.times.finished for sequence in sequences]
    return RequestStats(
        arrival_time=times.arrived,
        scheduled_time=times.scheduled,
        first_token_time=times.first_token,
        finished_time=None if None in ends else max(end for end in ends if end is not None),
        num_generation_tokens=sum(sequence.num_output for sequence in sequences),
        num_preemptions=sum(sequence.num_preemptions for sequence in sequences),
    )
