"""Which chat format is taken, and what the model is then asked, with a real vocabulary and templates."""

from __future__ import annotations

import io
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from puna.cli.chat_state import ChatState, LoadModel, ModelOptions
from puna.cli.terminal import Terminal
from puna.engine.sampling import SamplingParams
from puna.errors import ParameterError, PunaError
from puna.session import Usage
from puna.text.formats import BUILT_IN
from puna.text.tokenizer import load_tokenizer

LLAMA3_NAMES = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
OWN = "{{ bos_token }}{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"


class Yes:
    """A model that answers yes to every question and keeps the prompts, as text."""

    context_length = 512

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.usage = Usage()
        self.asked: list[str] = []
        self.asked_ids: list[Sequence[int]] = []

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, continues: bool = False
    ) -> Generator[str, None, None]:
        self.asked_ids.append(prompt_ids)
        self.asked.append(self.tokenizer.decode(prompt_ids))
        yield "yes"


def load(path: Path, tokenizer: Any, **options: Any) -> tuple[ChatState, Yes, str]:
    out, err = io.StringIO(), io.StringIO()
    model = Yes(tokenizer)
    terminal = Terminal(out=out, err=err, columns=lambda: None)
    state = ChatState(terminal, ModelOptions(**options), prepare_model=lambda path, options: lambda: model)
    state.load(path)
    return state, model, err.getvalue()


def vocabulary(*names: str, template: str | None = None) -> Any:
    return SimpleNamespace(
        special_tokens={name: 9 for name in names},
        chat_template=template,
        chat_templates={} if template is None else {"default": template},
    )


def test_the_template_of_the_checkpoint_is_taken(tmp_path: Path) -> None:
    state, _, said = load(tmp_path, vocabulary(*LLAMA3_NAMES, template=OWN))
    assert (state.template, said) == (OWN, "")


def test_a_checkpoint_that_could_have_one_and_has_none_continues_text(tmp_path: Path) -> None:
    state, _, said = load(tmp_path, vocabulary(*LLAMA3_NAMES))
    assert (state.template, state.conversation, said) == (None, None, "")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (LLAMA3_NAMES, "llama3"),
        ((*LLAMA3_NAMES, "<|eom_id|>"), "llama3.1"),
        (("<|header_start|>", "<|header_end|>", "<|eot|>"), "llama4"),
        ((), None),
    ],
)
def test_metas_folders_have_none_so_the_vocabulary_tells(
    tmp_path: Path, names: tuple[str, ...], expected: str | None
) -> None:
    (tmp_path / "params.json").write_text("{}")
    state, _, said = load(tmp_path, vocabulary(*names))
    if expected is None:
        assert (state.template, said) == (None, "")
    else:
        assert state.template == BUILT_IN[expected]
        assert said == f"[the chat format is taken to be {expected}'s; --raw continues text instead]\n"


def test_options_win_over_the_checkpoint(tmp_path: Path) -> None:
    tokenizer = vocabulary(template=OWN)
    assert load(tmp_path, tokenizer, raw=True)[0].template is None
    assert load(tmp_path, tokenizer, chat_format="llama3.2")[0].template == BUILT_IN["llama3.2"]
    with pytest.raises(ParameterError, match="chat format 'llama5' is not known: llama2, llama3, llama3.1"):
        ModelOptions(chat_format="llama5")


def test_turns_are_written_in_the_format(stories: Path) -> None:
    tokenizer = load_tokenizer(stories / "hf")
    state, model, _ = load(stories / "hf", tokenizer, chat_format="llama2")
    state.system = "Be kind."
    state.answer("Are you a llama?")
    state.system = None
    state.answer("Sure?")
    assert model.asked == [
        "<s> [INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nAre you a llama? [/INST]",
        "<s> [INST] Are you a llama? [/INST] yes </s><s> [INST] Sure? [/INST]",
    ]


@pytest.mark.parametrize(
    ("options", "expected"), [({"chat_format": "llama2"}, False), ({}, False), ({"raw": True}, True)]
)
def test_only_raw_text_may_spell_special_tokens(
    stories: Path, options: dict[str, Any], expected: bool
) -> None:
    tokenizer = load_tokenizer(stories / "hf")
    state, model, _ = load(stories / "hf", tokenizer, **options)
    state.answer("a</s>b")
    assert (tokenizer.eos_token_id in model.asked_ids[0]) is expected


class Memory:
    """Models that are alive, and paths that fail to load."""

    def __init__(self, tokenizer: Any) -> None:
        self.alive: weakref.WeakSet[Yes] = weakref.WeakSet()
        self.most = 0
        self.failing: set[Path] = set()
        self._tokenizer = tokenizer

    def prepare(self, path: Path, options: ModelOptions) -> LoadModel:
        def load() -> Yes:
            if path in self.failing:
                raise MemoryError
            model = Yes(self._tokenizer)
            self.alive.add(model)
            self.most = max(self.most, len(self.alive))
            return model

        return load


def test_one_model_at_a_time_is_in_memory(stories: Path, tmp_path: Path) -> None:
    memory = Memory(load_tokenizer(stories / "hf"))
    terminal = Terminal(out=io.StringIO(), err=io.StringIO(), columns=lambda: None)
    state = ChatState(terminal, ModelOptions(chat_format="llama2"), prepare_model=memory.prepare)
    state.load(stories / "hf")
    state.answer("hello")
    state.load(stories / "meta")
    assert memory.most == 1 and state.conversation is not None and state.conversation.messages == []
    state.answer("one")
    memory.failing.add(tmp_path)
    with pytest.raises(PunaError, match="not enough memory for this model"):
        state.load(tmp_path)
    assert memory.most == 1 and state.path == stories / "meta"
    state.answer("two")
    said = [message["content"] for message in state.conversation.messages]
    assert said == ["one", "yes", "two", "yes"]
    memory.failing.add(stories / "meta")
    with pytest.raises(MemoryError):
        state.load(tmp_path)
    with pytest.raises(PunaError, match="no model is loaded: /load one"):
        state.answer("three")
    state.load(stories / "hf")
    state.answer("four")
    assert memory.most == 1
