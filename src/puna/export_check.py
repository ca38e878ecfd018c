"""Compare a model that was written with the one it was made from, through the written files themselves.

Both encode the same questions; the source answers greedily, and then both say what they would write at each
place of those answers. Equal choices at every place are equal greedy answers; where weights were quantised,
the share of equal choices and the divergence say by how much that changed the model. One model is in memory
at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puna.engine.llm_engine import EngineConfig
from puna.engine.sampling import SamplingParams
from puna.errors import CheckpointError
from puna.model import Llama, PackedAttention
from puna.peft_model import PeftModel
from puna.text.chat import encode_chat
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.text_engine import TextEngine
from puna.weights.adapter_open import OpenedAdapter
from puna.weights.loader import Checkpoint, load_model

QUESTIONS = (
    "Who are you?",
    "Write one sentence about the mountains.",
    "Once upon a time, there was a little llama",
    "What is 12 + 30? Explain in a few words.",
)
NUM_TOKENS = 32  # of each answer

_ROUNDING = 0.05  # nats a token: float types differ by far less, another model by far more


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Say how far two models agree on the answers of the first."""

    num_prompts: int
    num_tokens: int
    num_same: int  # tokens that the second would have written too
    divergence: float  # Kullback-Leibler, in nats a token, averaged

    @property
    def equal(self) -> bool:
        """Say whether the greedy answers are the same."""
        return self.num_same == self.num_tokens

    def require(self, out: Path) -> None:
        """Raise CheckpointError naming what was written where more than rounding lies between the two."""
        if not self.equal and not self.divergence < _ROUNDING:
            raise CheckpointError(out, "does not answer as what it was made from: do not use it")

    def __str__(self) -> str:
        asked = f"{self.num_prompts} answers of {self.num_tokens} tokens"
        if self.equal:
            return f"checked: {asked} are the same (divergence {self.divergence:.2g} nats a token)"
        share = 100 * self.num_same / self.num_tokens
        return f"checked: {asked}: {share:.1f}% are the same (divergence {self.divergence:.2g} nats a token)"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model answers: prompts, whole sequences, and log-probabilities at each place of an answer."""

    prompts: list[list[int]]
    sequences: list[list[int]]
    logprobs: Tensor  # (answer tokens, vocab)


def encode_questions(
    tokenizer: Tokenizer, template: str | None, questions: Sequence[str] = QUESTIONS
) -> list[list[int]]:
    """Return the prompts: chats where there is a template, else texts to continue."""
    if template is None:
        return [tokenizer.encode(text) for text in questions]
    return [
        encode_chat(tokenizer, [{"role": "user", "content": text}], template=template) for text in questions
    ]


def answer(
    source: Checkpoint, tokenizer: Tokenizer, template: str | None, adapter: OpenedAdapter | None = None
) -> Answers:
    """Let the model that shall be written answer, an adapter beside its weights."""
    network = load_model(source)
    if adapter is not None:
        PeftModel.from_tensors(network, adapter.config, adapter.tensors, source=adapter.folder)
    prompts = encode_questions(tokenizer, template)
    longest = min(max(map(len, prompts)) + NUM_TOKENS, network.config.context_length)
    config = EngineConfig(max_num_seqs=len(prompts), max_model_len=longest)
    engine = TextEngine(network, tokenizer, config)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    requests = [engine.add(str(place), ids, params) for place, ids in enumerate(prompts)]
    while engine.has_unfinished:
        engine.step()
    sequences = [list(request.sequences[0].sequence.token_ids) for request in requests]
    return Answers(prompts=prompts, sequences=sequences, logprobs=_logprobs(network, prompts, sequences))


def compare(expected: Answers, written: Path, *, template: str | None) -> Agreement:
    """Load what was written, and let it say what it would have answered.

    Raises CheckpointError where its tokenizer or chat template makes other prompts.
    """
    gc.collect()  # modules and what they hold refer to each other
    tokenizer = load_tokenizer(written)
    own = tokenizer.chat_template if template is not None else None
    if template is not None and own is None:
        raise CheckpointError(written, "the chat template was not written")
    if encode_questions(tokenizer, own) != expected.prompts:
        raise CheckpointError(written, "its tokenizer and chat template make other prompts than the source's")
    return _agreement(expected, load_model(written))


def compare_adapter(expected: Answers, source: Checkpoint, adapter: OpenedAdapter) -> Agreement:
    """Let the model say with another adapter, the one that was written, what it would have answered."""
    gc.collect()
    network = load_model(source)
    PeftModel.from_tensors(network, adapter.config, adapter.tensors, source=adapter.folder)
    return _agreement(expected, network)


def _agreement(expected: Answers, network: Llama) -> Agreement:
    found = _logprobs(network, expected.prompts, expected.sequences)
    size = min(found.shape[1], expected.logprobs.shape[1])
    ours, theirs = expected.logprobs[:, :size], found[:, :size]
    return Agreement(
        num_prompts=len(expected.prompts),
        num_tokens=len(ours),
        num_same=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
        divergence=max(float((ours.exp() * (ours - theirs)).sum(-1).mean()), 0.0),
    )


@torch.inference_mode()
def _logprobs(network: Llama, prompts: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return log-probabilities, in float32, of what is written at each place of the answers."""
    rows = []
    for prompt, ids in zip(prompts, sequences, strict=True):
        places = torch.arange(len(prompt) - 1, len(ids) - 1)
        whole = torch.tensor(ids), torch.arange(len(ids)), PackedAttention([0, len(ids)])
        rows.append(network(*whole, places).float().log_softmax(-1))
    return torch.cat(rows)
