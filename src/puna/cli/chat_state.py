"""A loaded model with everything that is set for it, and how it answers: what `puna run` works on.

It knows how to load, which sampling settings hold, and where an answer and its timings go. It does not read
input: one prompt comes from `run.py`, a talk from `chat_loop.py`.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from puna.cli.conversation import Conversation, TextModel, continue_text
from puna.cli.terminal import Terminal
from puna.cli.timings import usage_lines
from puna.engine.sampling import SamplingParams
from puna.errors import ParameterError, PunaError
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
    quantize: str | None = None  # what weights are quantised to as they are loaded
    adapter: str | None = None  # the folder of one, for the first model that is loaded

    def __post_init__(self) -> None:
        if self.chat_format is not None and self.chat_format not in BUILT_IN:
            raise ParameterError(f"chat format {self.chat_format!r} is not known: {', '.join(BUILT_IN)} are")


LoadModel = Callable[[], TextModel]


def prepare_session(path: Path, options: ModelOptions) -> LoadModel:
    """Check a model and read its tokenizer; return what loads its weights."""
    try:
        device = str(torch.device(options.device))
    except RuntimeError:
        raise ParameterError(f"device must be cpu, cuda, cuda:1, or such, not {options.device!r}") from None
    return Session.prepare(
        path,
        dtype=DTYPES[options.dtype],
        device=device,
        quantize=options.quantize,
        adapter=options.adapter,
    )


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
        prepare_model: Callable[[Path, ModelOptions], LoadModel] = prepare_session,
    ) -> None:
        """Check the settings before anything is loaded; raises ParameterError."""
        self.terminal = terminal
        self.options = options
        self.sampling: dict[str, Any] = {}
        self.set_sampling(sampling or {})
        self.verbose = verbose
        self.wordwrap = wordwrap
        self._system = system
        self._prepare_model = prepare_model
        self._model: TextModel | None = None
        self._load_again: LoadModel | None = None
        self._load_seconds = 0.0
        self.path = Path()

    def load(self, path: Path) -> None:
        """Load a model and begin a new conversation with it; if that fails, nothing is changed.

        The memory of the model before is given back first, as soon as nothing but the weights can be wrong.
        """
        began = time.monotonic()
        defaults = default_sampling(path)
        options = self.options
        if self._load_again is not None and path != self.path:  # an adapter belongs to its model
            options = replace(options, adapter=None)
        load_model = self._prepare_model(path, options)
        self._model = model = self._load_instead(load_model)
        self._load_seconds = time.monotonic() - began
        self.path, self.default_sampling, self._load_again = path, defaults, load_model
        if options != self.options:
            self.terminal.notice(f"[the adapter {self.options.adapter} stays behind with its model]")
            self.options = options
        self.template, guessed = _find_template(path, model.tokenizer, self.options)
        self.conversation = None if self.template is None else self._new_conversation(self.template)
        if self._system is not None and self.template is None:
            self.terminal.notice("[the system message is not used: this model has no chat format]")
        if guessed is not None:
            self.terminal.notice(
                f"[the chat format is taken to be {guessed}'s; --raw continues text instead]"
            )

    def _load_instead(self, load_model: LoadModel) -> TextModel:
        """Load a model in place of the one there is, which is loaded again if that fails."""
        if self._load_again is None:
            return load_model()
        messages = [] if self.conversation is None else self.conversation.messages
        self._model = self.conversation = None
        gc.collect()  # modules and what they hold refer to each other
        try:
            return load_model()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold what was loaded so far
            gc.collect()
            self._model = self._load_again()
            if self.template is not None:
                self.conversation = self._new_conversation(self.template)
                self.conversation.messages = messages
            if _is_out_of_memory(error):
                raise PunaError("there is not enough memory for this model") from error
            raise

    @property
    def model(self) -> TextModel:
        """Return the model; raises PunaError where one could not be loaded again."""
        if self._model is None:
            raise PunaError("no model is loaded: /load one, or leave with /bye")
        return self._model

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


def _is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory is what was lacking; on the CPU torch has no class of its own for that."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
