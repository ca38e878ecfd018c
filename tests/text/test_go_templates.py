"""Ollama's templates of Llama's formats: what they write, by a small interpreter, equals the jinja ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from puna.text.chat import render_chat_text
from puna.text.formats import BUILT_IN
from puna.text.go_templates import GO_TEMPLATES, find_format
from puna.text.tokenizer import Tokenizer, load_tokenizer
from tiny_chat import TEMPLATE, save_tokenizer

Node = tuple[Any, ...]
TURNS: list[dict[str, str]] = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "One more.\nPlease."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = [TURNS[:1], TURNS, [SYSTEM, *TURNS[:1]], [SYSTEM, *TURNS]]


class GoTemplate:
    """Run the part of Go's text/template that ours use: trimming, range, if, variables, calls."""

    def __init__(self, source: str) -> None:
        source = re.sub(r"\s*\{\{-", "{{", source)
        source = re.sub(r"-\}\}\s*", "}}", source)
        self._parts = iter(re.split(r"\{\{(.*?)\}\}", source))
        self._nodes, _ = self._block()

    def render(self, messages: list[dict[str, str]]) -> str:
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        data = {
            "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
            "System": system,
        }
        return "".join(self._run(self._nodes, data, {"$": data}))

    def _block(self) -> tuple[list[Node], str]:
        nodes: list[Node] = []
        while True:
            nodes.append(("text", next(self._parts)))
            action = next(self._parts, "end").strip()
            if action == "end" or action.startswith("else"):
                return nodes, action
            if action.startswith("range "):
                nodes.append(("range", action[6:], self._block()[0]))
            elif action.startswith("if "):
                nodes.append(self._if(action[3:]))
            else:
                nodes.append(("do", action))

    def _if(self, condition: str) -> Node:
        body, closing = self._block()
        if closing == "end":
            return ("if", condition, body, [])
        if closing == "else":
            return ("if", condition, body, self._block()[0])
        return ("if", condition, body, [self._if(closing.removeprefix("else if "))])

    def _run(self, nodes: list[Node], dot: Any, names: dict[str, Any]) -> Iterator[str]:
        for kind, *rest in nodes:
            if kind == "text":
                yield rest[0]
            elif kind == "if":
                yield from self._run(rest[1] if self._value(rest[0], dot, names) else rest[2], dot, names)
            elif kind == "range":
                variables, _, source = rest[0].rpartition(":=")
                index = variables.split(",")[0].strip()
                for place, item in enumerate(self._value(source, dot, names)):
                    if index:
                        names[index] = place
                    yield from self._run(rest[1], item, names)
            elif (match := re.fullmatch(r"(\$\w+) :?= (.+)", rest[0])) is not None:
                names[match[1]] = self._value(match[2], dot, names)
            else:
                yield str(self._value(rest[0], dot, names))

    def _value(self, text: str, dot: Any, names: dict[str, Any]) -> Any:
        terms = re.findall(r"\([^()]*(?:\([^()]*\)[^()]*)*\)|\"[^\"]*\"|\S+", text)
        values = [self._term(term, dot, names) for term in terms if term not in FUNCTIONS]
        return FUNCTIONS[terms[0]](*values) if terms[0] in FUNCTIONS else values[0]

    def _term(self, term: str, dot: Any, names: dict[str, Any]) -> Any:
        if term.startswith("("):
            return self._value(term[1:-1], dot, names)
        if term.startswith('"'):
            return term[1:-1]
        if term in ("true", "false") or term.isdigit():
            return term == "true" if not term.isdigit() else int(term)
        owner, _, field = term.partition(".")
        value = dot if owner == "" else names[owner]
        return value[field] if field else value


FUNCTIONS: dict[str, Any] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a and b,
    "not": lambda a: not a,
    "len": len,
    "slice": lambda items, start: items[start:],
}


@pytest.fixture(scope="module")
def tokenizers(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    llama3 = load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("llama3")))
    return {
        "llama2": load_tokenizer(test_data / "stories260k" / "hf"),
        "llama3": llama3,
        "llama3.1": llama3,
        "llama4": load_tokenizer(_folder(test_data, tmp_path_factory.mktemp("llama4"))),
    }


def _folder(test_data: Path, folder: Path) -> Path:
    source = test_data / "tokenizers" / "llama4-tokenizer.model"
    (folder / "tokenizer.model").symlink_to(source)
    return folder


@pytest.mark.parametrize("name", GO_TEMPLATES)
def test_writes_what_the_jinja_template_does_but_for_the_first_bos(
    name: str, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[name]
    assert tokenizer.bos_token_id is not None
    bos = tokenizer.id_to_token(tokenizer.bos_token_id)
    template = GoTemplate(GO_TEMPLATES[name])
    for chat in CHATS:
        expected = render_chat_text(tokenizer, chat, template=BUILT_IN[name])
        assert template.render(chat) == expected.removeprefix(bos)


@pytest.mark.parametrize("name", ["llama3", "llama3.1", "llama4"])
def test_an_answer_that_is_begun_stays_open(name: str) -> None:
    written = GoTemplate(GO_TEMPLATES[name]).render(TURNS[:2])
    assert written.endswith("\n\nHi.")


def test_a_template_is_known_by_what_it_writes(tokenizers: dict[str, Tokenizer]) -> None:
    for name in GO_TEMPLATES:
        assert find_format(tokenizers[name], BUILT_IN[name]) == name
    assert find_format(tokenizers["llama3"], TEMPLATE) == "llama3"  # other jinja, the same text
    assert find_format(tokenizers["llama3"], BUILT_IN["llama3.2"]) is None  # it writes today's date
    assert find_format(tokenizers["llama3"], "{{ messages[0].content }}") is None
    assert find_format(tokenizers["llama3"], "{{ raise_exception('no') }}") is None
