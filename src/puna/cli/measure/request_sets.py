"""The requests of a benchmark, made from a seed or read from a file.

The random sets are as those of `vllm bench`: lengths uniform in [len * (1 - r), len * (1 + r)], behind a
prefix that all prompts share. Where only text can be sent and there is no tokenizer, prompts are short words.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.errors import ParameterError, PunaError

if TYPE_CHECKING:
    from puna.text.tokenizer import Tokenizer

# Each is one token in the vocabularies of Llama 3 and 4, with the space before it.
_WORDS = re.findall(
    r"\w+",
    """
    the of and to in for on with as by at from is was be are it this that not have had has but or an they his
    her she he we you all one two new more can will time day year man water house city old world people first
    """,
)


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """One prompt, as text or ids, with its count of tokens, and how many tokens are wanted."""

    prompt: str | list[int]
    prompt_len: int
    output_len: int


@dataclass(frozen=True, kw_only=True)
class RandomSet:
    """Say how random requests are made: tokens of prompt and output, and what they may vary by."""

    num_prompts: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.range_ratio < 1:
            raise ParameterError(f"range_ratio must be in [0, 1), got {self.range_ratio}")
        if self.prefix_len < 0:
            raise ParameterError(f"prefix_len must not be negative, got {self.prefix_len}")

    def draw(self, items: Sequence[Any]) -> Iterator[tuple[list[Any], int]]:
        """Yield (items of a prompt, output length) of each request; the same seed draws the same."""
        rng = random.Random(self.seed)
        prefix = rng.choices(items, k=self.prefix_len)
        for _ in range(self.num_prompts):
            length = _around(rng, self.input_len, self.range_ratio)
            output_len = _around(rng, self.output_len, self.range_ratio)
            yield [*prefix, *rng.choices(items, k=length)], output_len


def random_id_requests(wanted: RandomSet, ids: Sequence[int]) -> list[BenchRequest]:
    """Make requests of random ids, drawn from `ids`."""
    return [
        BenchRequest(prompt=prompt, prompt_len=len(prompt), output_len=output_len)
        for prompt, output_len in wanted.draw(ids)
    ]


def random_text_requests(wanted: RandomSet, tokenizer: Tokenizer | None) -> list[BenchRequest]:
    """Make requests of random text: of as many tokens as wanted, or of words without a tokenizer."""
    if tokenizer is None:
        return [
            BenchRequest(prompt=" ".join(words), prompt_len=len(words), output_len=output_len)
            for words, output_len in wanted.draw(_WORDS)
        ]
    made = []
    whole = [i for i in plain_ids(tokenizer, tokenizer.vocab_size) if _is_text(tokenizer.token_bytes(i))]
    for ids, output_len in wanted.draw(whole):
        text = _text_of_length(tokenizer, ids)
        made.append(BenchRequest(prompt=text, prompt_len=len(tokenizer.encode(text)), output_len=output_len))
    return made


def plain_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return the ids that are text: those of the tokenizer and the model, without special tokens."""
    special = set(tokenizer.special_tokens.values())
    return [i for i in range(min(tokenizer.vocab_size, vocab_size)) if i not in special]


def dataset_requests(
    path: Path, num_prompts: int | None, output_len: int, tokenizer: Tokenizer | None
) -> list[BenchRequest]:
    """Read the first prompts of a JSONL file: `prompt`, and `output_tokens` where it differs from the rest.

    Without a tokenizer a prompt counts its words. Raises PunaError naming the line that cannot be used.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PunaError(f"{path}: {error}") from None
    wanted = len(lines) if num_prompts is None else num_prompts
    if not 0 < wanted <= len(lines):
        raise PunaError(f"{path}: holds {len(lines)} prompts, and {wanted or 'at least 1'} are wanted")
    return [
        _dataset_request(f"{path}, prompt {number}", line, output_len, tokenizer)
        for number, line in enumerate(lines[:wanted], start=1)
    ]


def _dataset_request(where: str, line: str, output_len: int, tokenizer: Tokenizer | None) -> BenchRequest:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise PunaError(f"{where}: is not JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
        raise PunaError(f"{where}: must be an object with a text 'prompt'")
    unknown = sorted(set(entry) - {"prompt", "output_tokens"})
    if unknown:
        raise PunaError(f"{where}: unknown key {unknown[0]!r} (there are prompt and output_tokens)")
    length = entry.get("output_tokens", output_len)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise PunaError(f"{where}: output_tokens must be a whole number of at least 1, not {length!r}")
    prompt = entry["prompt"]
    count = len(tokenizer.encode(prompt)) if tokenizer else len(prompt.split())
    return BenchRequest(prompt=prompt, prompt_len=count, output_len=length)


def _is_text(data: bytes) -> bool:
    """Say whether a token is whole characters: what is not cannot be sent as text."""
    return "\ufffd" not in data.decode("utf-8", errors="replace")


def _around(rng: random.Random, length: int, ratio: float) -> int:
    return rng.randint(max(round(length * (1 - ratio)), 1), max(round(length * (1 + ratio)), 1))


def _text_of_length(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return text of as many tokens as `ids`, which it mostly is; text of ids need not encode to the same."""
    wanted, found = len(ids), ids
    for _ in range(10):
        text = tokenizer.decode(found, skip_special_tokens=True)
        again = tokenizer.encode(text, add_special_tokens=False)
        if len(again) == wanted:
            return text
        found = (again + ids)[:wanted] if len(again) < wanted else again[:wanted]
    return text
