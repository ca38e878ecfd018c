"""The commands of the interactive chat, which begin with a slash; names and replies are Ollama's.

What Ollama has and Puna has not yet is named in the reply, never passed to the model.
"""

from __future__ import annotations

from collections.abc import Callable

from puna.cli import chat_help
from puna.cli.adapter import adapter_lines
from puna.cli.chat_state import NO_CHAT_FORMAT, ChatState
from puna.cli.model_facts import ModelFacts, facts_lines, read_facts
from puna.cli.modelfile import modelfile
from puna.cli.sampling_options import columns, parameter_rows, parse_parameter
from puna.errors import ParameterError
from puna.locate import find_model

_NOT_AVAILABLE = {
    "/list": "'/list' is not available: Puna keeps no library of models yet. /load takes a path.",
    "/save": "'/save' is not available: Puna keeps no library of models yet.",
    "/set format": "'/set format' is not available in the chat: use StructuredOutputsParams in Python.",
    "/set noformat": "'/set noformat' is not needed: answers are free in the chat.",
    "/set think": "'/set think' is not available: Llama models have no separate thinking.",
    "/set nothink": "'/set nothink' is not needed: Llama models have no separate thinking.",
}


class ChatCommands:
    """Obey slash commands on a chat; `set_history` turns remembering lines on and off."""

    def __init__(self, state: ChatState, set_history: Callable[[bool], None]) -> None:
        self._state = state
        self._set_history = set_history

    def obey(self, text: str) -> bool:
        """Do what a line says; return False when it says to leave."""
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        match name:
            case "/bye" | "/exit":
                return False
            case "/?" | "/help":
                self._say(chat_help.help_text(rest.split()))
            case "/set":
                self._set(rest)
            case "/show":
                self._show(rest)
            case "/clear":
                self._clear()
            case "/load":
                self._load(rest)
            case "/list" | "/save":
                self._say(_NOT_AVAILABLE[name])
            case _:
                self._say(f"Unknown command '{name}'. Type /? for help")
        return True

    def _say(self, text: str) -> None:
        self._state.terminal.write(text + "\n")

    def _clear(self) -> None:
        if self._state.conversation is not None:
            self._state.conversation.clear()
        self._say("Cleared session context")

    def _load(self, name: str) -> None:
        if not name:
            self._say("Usage:\n  /load <model>")
            return
        path = find_model(name)
        self._say(f"Loading model '{name}'")
        self._state.load(path)
        if self._state.conversation is None:
            self._say(NO_CHAT_FORMAT)

    def _set(self, text: str) -> None:
        state = self._state
        name, _, rest = text.partition(" ")
        match name:
            case "":
                self._say(chat_help.help_text(["set"]))
            case "parameter":
                self._set_parameter(rest.strip())
            case "system":
                self._set_system(rest.strip())
            case "history" | "nohistory":
                self._set_history(name == "history")
                self._say(f"Set '{name}' mode.")
            case "verbose" | "quiet":
                state.verbose = name == "verbose"
                self._say(f"Set '{name}' mode.")
            case "wordwrap" | "nowordwrap":
                state.wordwrap = name == "wordwrap"
                self._say(f"Set '{name}' mode.")
            case "format" | "noformat" | "think" | "nothink":
                self._say(_NOT_AVAILABLE[f"/set {name}"])
            case _:
                self._say(f"Unknown command '/set {name}'. Type /? for help")

    def _set_parameter(self, text: str) -> None:
        name, _, value = text.partition(" ")
        value = value.strip()
        if not value:
            self._say("\n".join(["Available Parameters:", *chat_help.parameter_help(), ""]))
            return
        try:
            self._state.set_sampling(parse_parameter(name, value))
        except ParameterError as error:
            self._say(f'Couldn\'t set parameter: "{error}"')
            return
        self._say(f"Set parameter '{name}' to '{value}'")

    def _set_system(self, text: str) -> None:
        if not text:
            self._say("Usage:\n  /set system <string>")
            return
        if self._state.conversation is None:
            self._say("This model has no chat format, so it takes no system message.")
            return
        self._state.system = text
        self._say("Set system message.")

    def _show(self, text: str) -> None:
        match text.split():
            case []:
                self._say(chat_help.help_text(["show"]))
            case ["info"]:
                self._say("\n".join([*facts_lines(self._facts()), *self._adapter_lines()]))
            case ["license"]:
                self._say(self._facts().licence_text or "No license was specified for this model.")
            case ["modelfile"]:
                self._say(self._modelfile())
            case ["parameters"]:
                self._say("\n".join(self._parameter_lines()))
            case ["system"]:
                self._say(self._state.system or "No system message was specified for this model.")
            case ["template"]:
                self._say(self._state.template or "No prompt template was specified for this model.")
            case [name, *_]:
                self._say(f"Unknown command '/show {name}'. Type /? for help")

    def _facts(self) -> ModelFacts:
        return read_facts(self._state.path)

    def _modelfile(self) -> str:
        state = self._state
        return modelfile(self._facts(), state.sampling, state.system, state.options.adapter)

    def _adapter_lines(self) -> list[str]:
        folder = self._state.options.adapter
        if folder is None:
            return []
        from puna.weights.adapter_facts import read_adapter_facts
        from puna.weights.loader import open_checkpoint

        facts = read_adapter_facts(folder, open_checkpoint(self._state.path).config)
        return ["  Adapter", *(f"  {line}" for line in adapter_lines(facts)), ""]

    def _parameter_lines(self) -> list[str]:
        lines = ["Model defined parameters:", *columns(parameter_rows(self._state.default_sampling))]
        if self._state.sampling:
            lines += ["", "User defined parameters:", *columns(parameter_rows(self._state.sampling))]
        return lines
