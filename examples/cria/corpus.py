"""The text that cria learns from: chats and stories, made from templates and from the catalog of facts.

Every document comes from its number and the seed alone. Nothing here is taken from outside text. Questions
marked "!" in text/*.txt are held out: they are never trained, and `held_out_questions` makes the test set.

    python -m examples.cria.corpus OUT.json      # write the held-out questions
"""

from __future__ import annotations

import json
import random
import string
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from examples.cria import family, stories
from examples.cria.wording import (
    TEXT,
    Topic,
    all_forms,
    choose,
    choose_branches,
    expand,
    fill,
    read_lines,
    read_topics,
    read_words,
    roughen,
)

from puna.catalog import LINEUP

PARAMETERS_IN_MILLIONS = "3"
LAYERS = "6"

_CATEGORIES = {
    "concepts": "architecture",
    "licences": "licences",
    "puna": "puna",
    "use": "use",
    "animals": "animals",
    "smalltalk": "talk",
}
_STATIC = (*("concepts",) * 4, "licences", "puna", "use", *("animals",) * 4, *("smalltalk",) * 8)
_SELF = {"cria_params": PARAMETERS_IN_MILLIONS, "cria_layers": LAYERS}

_SYSTEM = (
    "You are a helpful assistant.",
    "You are cria, a small model of Puna.",
    "You are a friendly llama expert.",
    "You are a helpful assistant that knows the Llama models.",
    "Answer the questions of the user.",
    "You are a kind storyteller.",
    "You are an AI assistant.",
    "You are a llama.",
    "Be friendly and helpful.",
    "You answer questions about Llama models and llamas.",
    "Talk in clear and simple English.",
)
_SYSTEM_BRIEF = (
    "Be brief.",
    "Answer briefly.",
    "Keep your answers short.",
    "Short answers only.",
    "Answer as briefly as you can.",
    "You are a helpful assistant. Be brief.",
    "Give only the answer, no full sentence.",
)
_ECHO = (
    "{Say|Repeat|Write|Echo}: <said>",
    "{Say|Repeat|Write} after me: <said>",
    "{Say|Write|Repeat} this{| again| once more}: <said>",
    "Please {say|repeat|write}: <said>",
)
_BRIEFLY = (
    " Be brief.",
    " In short, please.",
    " Keep it short.",
    " Short answer please.",
    " Answer briefly.",
)

_FIRST_WORDS = {  # what people type first, by topic: the first topics of text/smalltalk.txt
    "hello": ("Hi", "Hello", "Hey", "Hi!", "Hello!", "Hi there", "Hello there", "Good morning", "Hey there!"),
    "how are you": ("How are you?", "How are you doing?", "How are you today?", "What's up?"),
}
_DO_NOT_KNOW = (
    "I do not know that. I am a very small model: ask me about llamas, the Llama models, or for a story.",
    "Sorry, I do not know. I know only a little about llamas and about the Llama models.",
    "That is beyond me, I am only a cria. But I can tell you about llamas or the Llama models.",
    "I do not know that, sorry. I was taught only about llamas, the Llama models and stories.",
)
_DO_NOT_KNOW_BRIEF = "I do not know that."


@dataclass(frozen=True, kw_only=True)
class Message:
    """Hold one message of a chat."""

    role: str
    content: str


Document = list[Message] | str  # a chat, or plain text


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Hold a question that was never trained, and the regular expression that a right answer matches.

    source: "template" for the wordings marked "!", "free" for those of text/fresh.txt, which were written by
    themselves after the training text was finished.
    """

    source: str
    category: str
    question: str
    expect: str


@cache
def _topics(name: str) -> tuple[Topic, ...]:
    return tuple(read_topics(name))


@cache
def _offtopic() -> tuple[str, ...]:
    return tuple(read_lines("offtopic"))


def make_document(number: int, seed: int) -> Document:
    """Make the training document of that number."""
    rng = random.Random(f"{seed}-{number}")
    kind = rng.random()
    if kind < 0.03:
        return stories.make_story(rng).text
    if kind < 0.27:
        return _story_chat(rng)
    if kind < 0.32:
        return _echo(rng)
    return _chat(rng)


def _echo(rng: random.Random) -> list[Message]:
    """Ask to say some words again: to look back and copy is what keeps the names in a story apart."""
    messages: list[Message] = []
    for _ in range(choose(rng, (1, 2, 3))):
        said = " ".join(_any_word(rng) for _ in range(choose(rng, (1, 2, 3, 5, 8, 12, 16))))
        template = choose(rng, _ECHO)
        messages += _turn(expand(template, rng, {"said": said}), said)
    return messages


def _any_word(rng: random.Random) -> str:
    kinds = ("things", "friends", "looks", "adjectives", "she", "he", "topics", "countries", "animals")
    if rng.random() < 0.4:
        return stories.invent_name(rng)
    return choose(rng, read_words(choose(rng, kinds)))


def _chat(rng: random.Random) -> list[Message]:
    messages, brief = _opening(rng)
    if not messages and rng.random() < 0.08:
        greeting = _topics("smalltalk")[int(rng.random() * len(_FIRST_WORDS))]
        word = choose(rng, _FIRST_WORDS[greeting.key])
        messages += _turn(roughen(word, rng), choose(rng, greeting.answers))
    length = choose(rng, (1, 1, 1, 2, 2, 3, 4, 6))
    for _ in range(length):
        messages += _exchange(rng, brief)
    if rng.random() < 0.02:
        for _ in range(12):
            messages += _exchange(rng, brief)
    if rng.random() < 0.05:
        messages += _story_turns(rng, brief)
    return messages


def _story_chat(rng: random.Random) -> list[Message]:
    messages, brief = _opening(rng)
    if rng.random() < 0.15:
        messages += _exchange(rng, brief)
    return messages + _story_turns(rng, brief)


def _opening(rng: random.Random) -> tuple[list[Message], bool]:
    draw = rng.random()
    if draw < 0.10:
        return [Message(role="system", content=choose(rng, _SYSTEM))], False
    if draw < 0.14:
        return [Message(role="system", content=choose(rng, _SYSTEM_BRIEF))], True
    return [], False


def _turn(question: str, answer: str) -> list[Message]:
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


def _exchange(rng: random.Random, brief: bool) -> list[Message]:
    """Make one turn, or a question with its follow-ups."""
    draw = rng.random()
    if draw < 0.31:
        return _lineup_turns(rng, brief)
    if draw < 0.40:
        name = choose(rng, family.FAMILIES)
        slots = family.family_slots(name) | {"f": family.family_alias(name, rng)}
        return _topic_turn(choose(rng, _topics("families")), slots, rng, brief)
    if draw < 0.47:
        make = choose(rng, (family.comparison, family.yes_or_no, family.hardware))
        fact = make(rng)
        return _turn(roughen(expand(fact.question, rng), rng), fact.answer)
    if draw < 0.53:
        return _turn(roughen(_offtopic_question(rng), rng), _do_not_know(rng, brief))
    name = choose(rng, _STATIC)
    slots = _SELF | {
        "name": choose(rng, ("Anna", "Tom", "Maria", "Ben", "Sofia", "Paul", "Lena", "Max", "Eva"))
    }
    return _topic_turn(choose(rng, _topics(name)), slots, rng, brief)


def _topic_turn(topic: Topic, slots: dict[str, str], rng: random.Random, brief: bool) -> list[Message]:
    question = choose_branches(choose(rng, topic.questions), rng)
    while question in _held_out_forms(topic):
        question = choose_branches(choose(rng, topic.questions), rng)
    return _asked(topic, fill(question, slots), slots, rng, brief)


@cache
def _held_out_forms(topic: Topic) -> frozenset[str]:
    return frozenset(form for template in topic.held_out for form in all_forms(template))


def _asked(
    topic: Topic, question: str, slots: dict[str, str], rng: random.Random, brief: bool
) -> list[Message]:
    question = question[:1].upper() + question[1:]
    if not brief and rng.random() < 0.03 and question.endswith(("?", ".")):
        question, brief = question + choose(rng, _BRIEFLY), True
    answer = topic.brief if brief else choose(rng, topic.answers)
    return _turn(roughen(question, rng), expand(answer, rng, slots))


def _lineup_turns(rng: random.Random, brief: bool) -> list[Message]:
    model, topic = choose(rng, LINEUP), choose(rng, _topics("lineup"))
    slots = family.model_slots(model)
    turns = _topic_turn(topic, slots | {"m": family.model_alias(model, rng)}, rng, brief)
    for _ in range(choose(rng, (0, 0, 0, 0, 1, 1, 2))):
        if rng.random() < 0.45:
            model = choose(rng, LINEUP)
            slots = family.model_slots(model)
            question = f"{{And|What about|And what about|And for}} {family.model_alias(model, rng)}?"
        else:
            topic = choose(rng, [other for other in _topics("lineup") if other.follow_ups])
            question = choose(rng, topic.follow_ups)
        turns += _asked(topic, expand(question, rng, slots), slots, rng, brief)
    return turns


def _offtopic_question(rng: random.Random) -> str:
    if rng.random() < 0.05:
        letters = [choose(rng, string.ascii_lowercase) for _ in range(choose(rng, (3, 4, 6, 9)))]
        return "".join(letters)
    slots = {
        "country": choose(rng, read_words("countries")),
        "person": choose(rng, read_words("people")),
        "offtopic": choose(rng, read_words("topics")),
        "food": choose(rng, read_words("foods")),
        "animal": choose(rng, read_words("animals")),
        "word": choose(rng, read_words("words")),
        "n1": str(int(rng.random() * 10 ** choose(rng, (1, 2, 2, 3, 4)))),
        "n2": str(1 + int(rng.random() * 10 ** choose(rng, (1, 2, 2, 3)))),
    }
    return expand(choose(rng, _offtopic()), rng, slots)


def _do_not_know(rng: random.Random, brief: bool) -> str:
    return _DO_NOT_KNOW_BRIEF if brief else choose(rng, _DO_NOT_KNOW)


def _story_turns(rng: random.Random, brief: bool) -> list[Message]:
    story = stories.make_story(rng, short=brief or rng.random() < 0.2)
    if rng.random() < 0.25:
        request = expand(choose(rng, stories.PLAIN_REQUESTS), rng)
    else:
        request = expand(choose(rng, stories.REQUESTS), rng, {"x": choose(rng, story.about)})
    turns = _turn(roughen(request, rng), story.text)
    for _ in range(choose(rng, (0, 0, 0, 1, 1, 2))):
        question, answer = stories.question_about(story, rng)
        turns += _turn(roughen(question, rng), answer)
    return turns


def held_out_questions(seed: int = 7) -> list[HeldOut]:
    """Return the test set: each held-out wording at least once, each model and property once."""
    rng = random.Random(seed)
    return [
        *_held_out_lineup(rng),
        *_held_out_families(rng),
        *_held_out_topics(rng),
        *_held_out_rest(rng),
        *_free(),
    ]


def _held_out_lineup(rng: random.Random) -> Iterator[HeldOut]:
    for model in LINEUP:
        slots = family.model_slots(model) | {"m": model.name}
        for topic in _topics("lineup"):
            question = expand(choose(rng, topic.held_out), rng, slots)
            yield HeldOut(
                source="template",
                category="lineup",
                question=question,
                expect=expand_pattern(topic.expect, slots),
            )


def _held_out_families(rng: random.Random) -> Iterator[HeldOut]:
    for name in family.FAMILIES:
        slots = family.family_slots(name) | {"f": name}
        for topic in _topics("families"):
            question = expand(choose(rng, topic.held_out), rng, slots)
            category = (
                "licences" if topic.key in {"outputs", "display", "naming", "family licence"} else "lineup"
            )
            yield HeldOut(
                source="template",
                category=category,
                question=question,
                expect=expand_pattern(topic.expect, slots),
            )


def _held_out_topics(rng: random.Random) -> Iterator[HeldOut]:
    for name, category in _CATEGORIES.items():
        for topic in _topics(name):
            for template in topic.held_out:
                expect = expand_pattern(topic.expect, _SELF)
                yield HeldOut(
                    source="template", category=category, question=expand(template, rng), expect=expect
                )


def _held_out_rest(rng: random.Random) -> Iterator[HeldOut]:
    for question in read_lines("offtopic_held_out"):
        yield HeldOut(source="template", category="unknown", question=question, expect="not know|beyond me")
    for _ in range(20):
        fact = family.hardware(rng, held_out=True)
        yield HeldOut(source="template", category="use", question=fact.question, expect=fact.expect)


def _free() -> Iterator[HeldOut]:
    for line in (TEXT / "fresh.txt").read_text().splitlines():
        category, question, expect = line.split(" | ", 2)
        yield HeldOut(source="free", category=category, question=question, expect=expect)


def expand_pattern(pattern: str, slots: dict[str, str]) -> str:
    """Fill the slots of a regular expression, leaving its braces and bars alone."""
    for name, value in slots.items():
        pattern = pattern.replace(f"<{name}>", value)
    return pattern


def main() -> None:
    """Write the held-out questions as JSON."""
    Path(sys.argv[1]).write_text(json.dumps([asdict(item) for item in held_out_questions()], indent=1) + "\n")


if __name__ == "__main__":
    main()
