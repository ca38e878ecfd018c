"""Let a model that is in training answer some prompts, so that one can read what it has learnt so far.

Decoding is greedy and takes no random number: a training with samples ends in the same bits as one without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import SamplingParams
from puna.errors import ParameterError
from puna.model.llama import Llama
from puna.text.chat import encode_chat
from puna.text.tokenizer import Tokenizer
from puna.train.encoding import ChatRendering

_BLOCK = 16  # tokens of a block of the cache


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Hold a prompt and what the model made of it; "..." is at the end of an answer that was cut."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class SampleMetrics:
    """Hold the samples of a step: a line of metrics.jsonl too."""

    step: int  # 0: before the first
    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplePrompts:
    """Hold prompts as ids, and how long their answers may be."""

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    tokenizer: Tokenizer
    max_tokens: int

    @classmethod
    def encode(
        cls,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        context_length: int,
        rendering: ChatRendering | None,
    ) -> SamplePrompts:
        """Encode prompts as a user's first message or, with `rendering` None, as text to go on with.

        Raises ParameterError for one that leaves no room for its answer.
        """
        ids = [_encode(text, tokenizer, rendering) for text in texts]
        for text, tokens in zip(texts, ids, strict=True):
            if len(tokens) + max_tokens > context_length:
                raise ParameterError(
                    f"sample_prompts: {text[:40]!r} has {len(tokens)} tokens; with sample_max_tokens "
                    f"{max_tokens} that is more than the model's context of {context_length}"
                )
        return cls(texts=texts, ids=ids, tokenizer=tokenizer, max_tokens=max_tokens)

    def answers(self, network: Llama) -> list[Sample]:
        """Return the greedy answers of a network as it is now; its mode is evaluation meanwhile."""
        was_training = network.training
        network.eval()
        try:
            found = self._generate(network)
        finally:
            network.train(was_training)
        return [Sample(prompt=text, answer=answer) for text, answer in zip(self.texts, found, strict=True)]

    def _generate(self, network: Llama) -> list[str]:
        longest = max(map(len, self.ids)) + self.max_tokens
        limits = EngineConfig(
            max_model_len=longest,
            block_size=_BLOCK,
            num_blocks=len(self.ids) * (longest // _BLOCK + 2),
            max_num_seqs=len(self.ids),
        )
        engine = LLMEngine(
            network,
            limits,
            end_ids=self.tokenizer.eos_token_ids,
            num_token_ids=min(self.tokenizer.vocab_size, network.config.vocab_size),
        )
        for number, tokens in enumerate(self.ids):
            params = SamplingParams(temperature=0.0, max_tokens=self.max_tokens)
            engine.add(str(number), tokens, params)
        answers = [""] * len(self.ids)
        while engine.has_unfinished:
            for output in engine.step():
                sequence = output.sequence
                if sequence.finish_reason is not None:
                    text = self.tokenizer.decode(sequence.output_ids, skip_special_tokens=True)
                    cut = "" if sequence.finish_reason == "stop" else "..."
                    answers[int(sequence.request_id)] = text + cut
        return answers


def _encode(text: str, tokenizer: Tokenizer, rendering: ChatRendering | None) -> list[int]:
    if rendering is None:
        return tokenizer.encode(text)
    settings = {field.name: getattr(rendering, field.name) for field in dataclasses.fields(rendering)}
    return encode_chat(tokenizer, [{"role": "user", "content": text}], **settings)
