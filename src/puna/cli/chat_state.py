"""A loaded model with everything that is set for it, and how it answers: what `puna run` works on.

It knows how to load, which sampling settings hold, and where an answer and its timings go. It does not read
input: one prompt comes from `run.py`, a talk from `chat_loop.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from puna.cli.conversation import Conversation, TextModel, continue_text
from puna.cli.terminal import Terminal
from puna.cli.timings import usage_lines
from puna.engine.sampling import SamplingParams
from puna.errors import ParameterError
from puna.locate import default_sampling
from puna.session import Session
from puna.text.formats import BUILT_IN
from puna.text.tokenizer import Tokenizer

NO_CHAT_FORMAT = "This model has no chat format: it continues each text you type."

DTYPES: dict[str, torch.dtype | Literal["auto"]] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Say how a model is loaded and prompted; raises ParameterError for a format that is not built in."""

    dtype: str = "auto"
    device: str = "cpu"
    chat_format: str | None = None  # the name of a built-in format that replaces the model's
    raw: bool = False  # continue texts, whatever the model

    def __post_init__(self) -> None:
        if self.chat_format is not None and self.chat_format not in BUILT_IN:
            raise ParameterError(f"chat format {self.chat_format!r} is not known: {', '.join(BUILT_IN)} are")


def open_session(path: Path, options: ModelOptions) -> TextModel:
    """Load a model and its tokenizer."""
    try:
        device = str(torch.device(options.device))
    except RuntimeError:
        raise ParameterError(f"device must be cpu, cuda, cuda:1, or such, not {options.device!r}") from None
    return Session.open(path, dtype=DTYPES[options.dtype], device=device)


class ChatState:
    """Hold a model, its conversation and its settings; the ones that a user made stay when it is changed."""

    def __init__(
        self,
        terminal: Terminal,
        options: ModelOptions,
        *,
        sampling: dict[str, Any] | None = None,
        system: str | None = None,
        verbose: bool = False,
        wordwrap: bool = True,
        open_model: Callable[[Path, ModelOptions], TextModel] = open_session,
    ) -> None:
        """Check the settings before anything is loaded; raises ParameterError."""
        self.terminal = terminal
        self.options = options
        self.sampling: dict[str, Any] = {}
        self.set_sampling(sampling or {})
        self.verbose = verbose
        self.wordwrap = wordwrap
        self._system = system
        self._open_model = open_model
        self._load_seconds = 0.0

    def load(self, path: Path) -> None:
        """Load a model and begin a new conversation with it; if that fails, nothing is changed."""
        began = time.monotonic()
        defaults = default_sampling(path)
        model = self._open_model(path, self.options)
        self._load_seconds = time.monotonic() - began
        self.path, self.model, self.default_sampling = path, model, defaults
        self.template, guessed = _find_template(path, model.tokenizer, self.options)
        self.conversation = None if self.template is None else self._new_conversation(self.template)
        if self._system is not None and self.template is None:
            self.terminal.notice("[the system message is not used: this model has no chat format]")
        if guessed is not None:
            self.terminal.notice(
                f"[the chat format is taken to be {guessed}'s; --raw continues text instead]"
            )

    @property
    def system(self) -> str | None:
        """Return the system message that is set."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = text
        if self.conversation is not None:
            self.conversation.system = text

    def set_sampling(self, changes: dict[str, Any]) -> None:
        """Change sampling settings; raises ParameterError, and then none is changed."""
        changed = self.sampling | changes
        SamplingParams(**changed)
        self.sampling = changed

    def answer(self, text: str) -> None:
        """Print the answer to a message, or what follows a text, and timings where they are wanted.

        KeyboardInterrupt comes through after the output has been put in order.
        """
        params = SamplingParams(**{"max_tokens": None, **self.default_sampling, **self.sampling})
        load_seconds, self._load_seconds = self._load_seconds, 0.0
        self.terminal.stream(self._pieces(text, params), wordwrap=self.wordwrap)
        if self.verbose:
            for line in usage_lines(self.model.usage, load_seconds):
                self.terminal.notice(line)

    def _pieces(self, text: str, params: SamplingParams) -> Iterator[str]:
        if self.conversation is not None:
            return self.conversation.ask(text, params)
        return continue_text(self.model, text, params, parse_special=self.options.raw)

    def _new_conversation(self, template: str) -> Conversation:
        from puna.text.chat import encode_chat

        tokenizer = self.model.tokenizer
        return Conversation(
            self.model,
            render=lambda messages: encode_chat(tokenizer, messages, template=template),
            notice=self.terminal.notice,
            system=self._system,
        )


def _find_template(path: Path, tokenizer: Tokenizer, options: ModelOptions) -> tuple[str | None, str | None]:
    """Return the chat template to use, None for a model that continues text, and its name if it is guessed.

    A model that could have brought a template and has none is a base model. Meta's folders cannot: there the
    vocabulary shows the format.
    """
    if options.raw:
        return None, None
    if options.chat_format is not None:
        return BUILT_IN[options.chat_format], None
    if tokenizer.chat_template is None and (path / "params.json").is_file():
        from puna.text.chat import find_built_in  # brings jinja, which texts to continue do not need

        name = find_built_in(tokenizer)
        return (None, None) if name is None else (BUILT_IN[name], name)
    return tokenizer.chat_template, None
