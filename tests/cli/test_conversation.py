"""What a model is asked: turns, cut answers, and forgetting when the context is full."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import pytest

from puna.cli.conversation import Conversation, Message, continue_text
from puna.engine.sampling import SamplingParams
from puna.errors import ParameterError
from puna.session import Usage

PARAMS = SamplingParams(max_tokens=None)


class Letters:
    """A tokenizer with an id for each character, BOS (1) in front, and `<s>` as a special token."""

    bos_token_id = 1
    chat_template = None

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        if parse_special:
            text = text.replace("<s>", "\x01")
        return [1, *map(ord, text)]


class Scripted:
    """A model that gives fixed answers and remembers what it was asked."""

    def __init__(self, answers: Sequence[str], context_length: int = 1000) -> None:
        self.tokenizer: Any = Letters()
        self.usage = Usage()
        self.context_length = context_length
        self.asked: list[str] = []
        self.continued: list[bool] = []
        self._answers = list(answers)

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, continues: bool = False
    ) -> Generator[str, None, None]:
        self.asked.append("".join(map(chr, prompt_ids)))
        self.continued.append(continues)
        answer = self._answers.pop(0)
        if answer == "fail":
            raise ParameterError("no")
        for word in answer.split(" "):
            if word == "^C":
                raise KeyboardInterrupt
            yield word


def render(messages: list[Message]) -> list[int]:
    return [ord(char) for message in messages for char in f"{message['role'][0]}:{message['content']};"]


def conversation(
    model: Scripted, notices: list[str] | None = None, system: str | None = None
) -> Conversation:
    said = [] if notices is None else notices
    return Conversation(model, render=render, notice=said.append, system=system)


def ask(talk: Conversation, text: str) -> str:
    return "|".join(talk.ask(text, PARAMS))


def test_turns_are_kept_and_sent_again() -> None:
    model = Scripted(["hello there", "fine"])
    talk = conversation(model, system="be kind")
    assert ask(talk, "hi") == "hello|there"
    assert ask(talk, "how are you") == "fine"
    assert model.asked == ["s:be kind;u:hi;", "s:be kind;u:hi;a:hellothere;u:how are you;"]


def test_clear_forgets_all_but_the_system_message() -> None:
    model = Scripted(["one", "two"])
    talk = conversation(model, system="be kind")
    ask(talk, "hi")
    talk.clear()
    ask(talk, "again")
    assert model.asked[-1] == "s:be kind;u:again;"


def test_a_cut_answer_is_not_kept_and_its_question_joins_the_next() -> None:
    model = Scripted(["a long ^C", "short"])
    talk = conversation(model)
    with pytest.raises(KeyboardInterrupt):
        ask(talk, "tell me")
    ask(talk, "in a word")
    assert model.asked[-1] == "u:tell me\nin a word;"


def test_a_failed_question_leaves_no_trace() -> None:
    model = Scripted(["fail", "ok"])
    talk = conversation(model)
    with pytest.raises(ParameterError):
        ask(talk, "bad")
    ask(talk, "good")
    assert model.asked[-1] == "u:good;"


def test_old_turns_are_forgotten_with_a_notice_when_the_context_is_full() -> None:
    notices: list[str] = []
    model = Scripted(["x" * 20] * 4, context_length=100)
    talk = conversation(model, notices, system="s")
    for text in ("1" * 10, "2" * 10):
        ask(talk, text)
    assert notices == []
    ask(talk, "3" * 10)
    assert model.asked[-1] == f"s:s;u:{'3' * 10};"
    assert notices == ["[the context of 100 tokens is full: 4 old messages are forgotten]"]


def test_half_of_the_context_is_freed_at_a_time() -> None:
    notices: list[str] = []
    model = Scripted(["x"] * 9, context_length=100)
    talk = conversation(model, notices)
    for number in range(8):
        ask(talk, str(number) * 10)
    assert notices == ["[the context of 100 tokens is full: 4 old messages are forgotten]"] * 2
    assert [len(asked) for asked in model.asked] == [13, 30, 47, 64, 47, 64, 47, 64]
    assert model.asked[4] == "u:2222222222;a:x;u:3333333333;a:x;u:4444444444;"


def test_a_message_that_fills_the_context_alone_is_refused_and_not_kept() -> None:
    model = Scripted(["ok"], context_length=20)
    talk = conversation(model)
    with pytest.raises(ParameterError, match="the message is too long: 43 tokens .* context is 20"):
        ask(talk, "x" * 40)
    ask(talk, "y")
    assert model.asked == ["u:y;"]


def test_a_long_message_may_take_the_room_for_the_answer() -> None:
    model = Scripted(["ok"], context_length=20)
    assert ask(conversation(model), "x" * 15) == "ok"


def test_texts_are_continued_as_they_are() -> None:
    model = Scripted(["a", "b", "c"])
    for text, special in (("", False), ("<s>x", False), ("<s>x", True)):
        list(continue_text(model, text, PARAMS, parse_special=special))
    assert model.asked == ["\x01", "\x01<s>x", "\x01x"]
    assert model.continued == [False, True, True]
