"""Turn templates into sentences: choices in braces, slots in angle brackets, the roughness of real typing.

A template such as "{What|Which} size has <m>?" stands for several sentences. It knows nothing of llamas.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

TEXT = Path(__file__).parent / "text"

_CHOICE = re.compile(r"\{([^{}]*)\}")
_SLOT = re.compile(r"<(\w+)>")
_WORD = re.compile(r"[a-z]{5,}")
_T = TypeVar("_T")

_OPENERS = (
    "Hi! ",
    "Hey, ",
    "Hello! ",
    "Hi cria, ",
    "Hello cria, ",
    "Quick question: ",
    "Please tell me: ",
    "One question: ",
    "I wonder: ",
    "Another question: ",
    "One more question: ",
    "Sorry, ",
    "Okay, ",
    "So, ",
    "And ",
    "Say, ",
    "Now: ",
    "Hmm, ",
    "Can you help me? ",
    "I have a question. ",
    "Next question. ",
)
_CLOSERS = (" Thanks!", " Please.", " Thank you.", " Thank you!", " I need to know.", " Please help me.")


def choose(rng: random.Random, items: Sequence[_T]) -> _T:
    """Pick one of `items`."""
    return items[int(rng.random() * len(items))]


def choose_branches(template: str, rng: random.Random) -> str:
    """Choose one of each {a|b|c}, innermost first; slots stay."""
    while "{" in template:
        template = _CHOICE.sub(lambda match: choose(rng, match[1].split("|")), template)
    return template


def fill(text: str, slots: Mapping[str, str]) -> str:
    """Fill each <slot>; a missing one raises KeyError."""
    return _SLOT.sub(lambda match: slots[match[1]], text)


def expand(template: str, rng: random.Random, slots: Mapping[str, str] | None = None) -> str:
    """Choose one of each {a|b|c}, then fill each <slot>; a missing slot raises KeyError."""
    return fill(choose_branches(template, rng), slots or {})


def all_forms(template: str) -> list[str]:
    """Return every text that `choose_branches` can make of a template."""
    match = _CHOICE.search(template)
    if match is None:
        return [template]
    before, after = template[: match.start()], template[match.end() :]
    return [form for branch in match[1].split("|") for form in all_forms(before + branch + after)]


def roughen(question: str, rng: random.Random) -> str:
    """Write a question as people type: greeted or not, in lower case, without its mark, with a slip."""
    if rng.random() < 0.18:
        opener = choose(rng, _OPENERS)
        joined = opener.rstrip().endswith(",") or opener == "And "
        question = opener + (_lower_first(question) if joined or rng.random() < 0.3 else question)
    if question.endswith("?") and rng.random() < 0.06:
        question += choose(rng, _CLOSERS)
    elif rng.random() < 0.22:
        question = question.rstrip("?.!")
    if rng.random() < 0.12:
        question = (
            question.replace("What is", "What's").replace("what is", "what's").replace(" do not", " don't")
        )
    if rng.random() < 0.3:
        question = question.lower()
    elif rng.random() < 0.01:
        question = question.upper()
    if rng.random() < 0.07:
        question = _slip(question, rng)
    return question


def _lower_first(text: str) -> str:
    first = text.split(" ", 1)[0]
    keep = first in {"I", "I'm", "Llama", "Llamas", "Scout", "Maverick", "SwiGLU", "RoPE"} or first.isupper()
    return text if keep else text[:1].lower() + text[1:]


def _slip(text: str, rng: random.Random) -> str:
    """Swap, drop or double one letter of one longer word in lower case."""
    words = [match for match in _WORD.finditer(text) if "llama" not in match[0]]
    if not words:
        return text
    word = choose(rng, words)
    at = word.start() + 1 + int(rng.random() * (len(word[0]) - 2))
    kind = rng.random()
    if kind < 0.4:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if kind < 0.8:
        return text[:at] + text[at + 1 :]
    return text[:at] + text[at] + text[at:]


@dataclass(frozen=True, kw_only=True)
class Topic:
    """Hold the questions about one thing and what to answer.

    expect is a regular expression, with slots, that a right answer matches; held_out is never trained.
    """

    key: str
    expect: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    follow_ups: tuple[str, ...]
    answers: tuple[str, ...]
    brief: str


def read_topics(name: str) -> list[Topic]:
    """Read text/`name`.txt: "# key | expect", then lines that start with ? ! > = or - (indented: goes on)."""
    text = (TEXT / f"{name}.txt").read_text().replace("\n  ", "\\n")
    blocks = re.split(r"^# ", text, flags=re.MULTILINE)[1:]
    return [_read_topic(block) for block in blocks]


def _read_topic(block: str) -> Topic:
    head, *lines = block.strip().split("\n")
    key, expect = head.split(" | ", 1)
    found: dict[str, list[str]] = {mark: [] for mark in "?!>=-"}
    for line in lines:
        if line:
            found[line[0]].append(line[2:].replace("\\n", "\n"))
    return Topic(
        key=key,
        expect=expect,
        questions=tuple(found["?"]),
        held_out=tuple(found["!"]),
        follow_ups=tuple(found[">"]),
        answers=tuple(found["="]),
        brief=found["-"][0],
    )


def read_lines(name: str) -> list[str]:
    """Read the questions of text/`name`.txt, which have no topic."""
    return [line[2:] for line in (TEXT / f"{name}.txt").read_text().splitlines() if line.startswith("? ")]


@cache
def read_words(name: str) -> tuple[str, ...]:
    """Read one list of text/words.txt, "name: a, b*3, c"; b*3 stands there three times."""
    for line in (TEXT / "words.txt").read_text().splitlines():
        key, words = line.split(": ", 1)
        if key == name:
            divider = "; " if "; " in words else ", "
            return tuple(word for entry in words.split(divider) for word in _repeated(entry))
    raise KeyError(name)


def _repeated(entry: str) -> list[str]:
    word, _, times = entry.partition("*")
    return [word] * int(times or 1)
