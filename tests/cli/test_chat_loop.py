"""The interactive chat, typed by a script: commands, answers, Ctrl-C, errors."""

from __future__ import annotations

import io
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from puna.cli.chat_commands import ChatCommands
from puna.cli.chat_loop import ChatLoop
from puna.cli.chat_state import ChatState, LoadModel, ModelOptions
from puna.cli.terminal import Terminal
from puna.engine.sampling import SamplingParams
from puna.errors import CheckpointError, ModelNotFoundError, ParameterError
from puna.session import Usage


class Continuing:
    """A model without a chat format: it repeats the text in capitals, or does what the text says."""

    context_length = 100

    def __init__(self) -> None:
        self.tokenizer: Any = self
        self.usage = Usage(prompt_tokens=3, prompt_seconds=1.0, output_tokens=2, output_seconds=1.0)
        self.params: list[SamplingParams] = []

    bos_token_id = 0
    chat_template: str | None = None

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        return [0, *map(ord, text)]

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, continues: bool = False
    ) -> Generator[str, None, None]:
        self.params.append(params)
        text = "".join(map(chr, prompt_ids[1:]))
        if text == "fail":
            raise ParameterError("too long")
        for word in text.upper().split(" "):
            if word == "^C":
                raise KeyboardInterrupt
            yield word + " "


class Talk:
    """Type lines at a chat; `out` and `err` are what was printed, without the greeting."""

    def __init__(self, path: Path, *lines: str | BaseException) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.history: list[bool] = []
        self.model = Continuing()
        self.opened: list[Path] = []
        terminal = Terminal(out=self.out, err=self.err, columns=lambda: None)
        self.state = ChatState(terminal, ModelOptions(), prepare_model=self._prepare)
        self.state.load(path)
        self._lines = [*lines, EOFError()]
        ChatLoop(self.state, self._read, ChatCommands(self.state, self.history.append)).run()

    def _prepare(self, path: Path, options: ModelOptions) -> LoadModel:
        if path.name == "broken":
            raise ModelNotFoundError(f"{path}: no model")

        def load() -> Continuing:
            if path.name == "damaged":
                raise CheckpointError(path, "ends early")
            self.opened.append(path)
            return self.model

        return load

    def _read(self, prompt: str) -> str:
        line = self._lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    @property
    def said(self) -> str:
        """Return what was printed after the greeting."""
        greeting, _, rest = self.out.getvalue().partition("(/? for help)\n")
        assert "no chat format" in greeting
        return rest.removesuffix("\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6}')
    return tmp_path


def test_each_text_is_answered_until_the_end_of_input(folder: Path) -> None:
    talk = Talk(folder, "a llama", "", "  ", "a cria")
    assert talk.said == "A LLAMA \nA CRIA \n"


@pytest.mark.parametrize("leave", ["/bye", "/exit", "/bye now"])
def test_leaving(folder: Path, leave: str) -> None:
    assert Talk(folder, leave, "not read").said == ""


def test_ctrl_c_stops_the_answer_and_not_the_chat(folder: Path) -> None:
    assert Talk(folder, "one ^C two", "three").said == "ONE \nTHREE \n"


def test_ctrl_c_at_the_prompt_says_how_to_leave(folder: Path) -> None:
    assert Talk(folder, KeyboardInterrupt(), "on").said == "\nUse Ctrl + d or /bye to exit.\nON \n"


def test_errors_are_told_and_the_chat_goes_on(folder: Path) -> None:
    talk = Talk(folder, "fail", "/load /no/such/model", "fine")
    assert talk.said == "FINE \n"
    assert talk.err.getvalue().splitlines() == [
        "Error: too long",
        "Error: no model '/no/such/model': give a folder with a checkpoint, a .gguf file, "
        "or 'cria', the embedded model",
    ]


def test_parameters_are_set_shown_and_used(folder: Path) -> None:
    talk = Talk(
        folder,
        "/set parameter temperature 0.25",
        "/set parameter stop END",
        "/set parameter top_p 7",
        "/set parameter heat 1",
        "/show parameters",
        "x",
    )
    lines = talk.said.splitlines()
    assert lines[0] == "Set parameter 'temperature' to '0.25'"
    assert lines[1] == "Set parameter 'stop' to 'END'"
    assert lines[2] == 'Couldn\'t set parameter: "top_p must be in (0, 1], got 7.0"'
    assert lines[3].startswith("Couldn't set parameter: \"unknown parameter 'heat'")
    assert lines[4:] == [
        "Model defined parameters:",
        "  temperature    0.6",
        "  top_k          50",
        "",
        "User defined parameters:",
        "  temperature    0.25",
        '  stop           "END"',
        "X ",
    ]
    used = talk.model.params[-1]
    assert (used.temperature, used.top_k, used.stop, used.max_tokens) == (0.25, 50, ["END"], None)


def test_modes(folder: Path) -> None:
    talk = Talk(folder, "/set verbose", "/set nowordwrap", "/set nohistory", "/set history", "x")
    assert talk.said.splitlines()[:4] == [
        f"Set '{mode}' mode." for mode in ("verbose", "nowordwrap", "nohistory", "history")
    ]
    assert talk.history == [False, True]
    assert talk.state.wordwrap is False
    assert "eval rate:            1.00 tokens/s" in talk.err.getvalue().splitlines()
    assert not Talk(folder, "/set verbose", "/set quiet", "x").err.getvalue()


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("/what", "Unknown command '/what'. Type /? for help"),
        ("/set colour red", "Unknown command '/set colour'. Type /? for help"),
        ("/show me", "Unknown command '/show me'. Type /? for help"),
        ("/set system be kind", "This model has no chat format, so it takes no system message."),
        ("/set system", "Usage:\n  /set system <string>"),
        ("/show system", "No system message was specified for this model."),
        ("/load", "Usage:\n  /load <model>"),
        ("/clear", "Cleared session context"),
        ("/save mine", "'/save' is not available: Puna keeps no library of models yet."),
        (
            "/set format json",
            "'/set format' is not available in the chat: use StructuredOutputsParams in Python.",
        ),
        ("/set think", "'/set think' is not available: Llama models have no separate thinking."),
    ],
)
def test_replies(folder: Path, line: str, reply: str) -> None:
    assert Talk(folder, line).said == reply + "\n"


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("/?", "  /load <model>   Load another model"),
        ("/help", 'Use """ to begin a multi-line message.'),
        ("/? set", "  /set system <string>     Set system message"),
        ("/set", "  /set system <string>     Set system message"),
        ("/help show", "  /show template      Show chat template"),
        ("/show", "  /show template      Show chat template"),
        ("/? load", "  /load <model>    A folder with a checkpoint, a .gguf file, or cria"),
        ("/? shortcuts", "  Ctrl + c    Stop the answer"),
        (
            "/set parameter",
            "  /set parameter top_k <whole number>         choose among the K likeliest tokens",
        ),
    ],
)
def test_help(folder: Path, line: str, part: str) -> None:
    wanted, said = part.split(), Talk(folder, line).said.splitlines()
    assert wanted in [line.split() for line in said]


def test_another_model_can_be_loaded_and_settings_stay(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    talk = Talk(folder, "/set parameter seed 3", f"/load {other}", "x")
    assert talk.opened == [folder, other]
    assert f"Loading model '{other}'" in talk.said
    assert talk.model.params[-1].seed == 3


def test_a_model_that_fails_to_load_leaves_the_old_one(folder: Path) -> None:
    (folder / "broken").mkdir()
    talk = Talk(folder, f"/load {folder / 'broken'}", "still here")
    assert talk.said.endswith("STILL HERE \n")
    assert talk.state.path == folder
    assert talk.err.getvalue() == f"Error: {folder / 'broken'}: no model\n"
    assert talk.opened == [folder]


def test_a_model_with_bad_weights_leaves_the_old_one_loaded_again(folder: Path) -> None:
    (folder / "damaged").mkdir()
    talk = Talk(folder, f"/load {folder / 'damaged'}", "still here")
    assert talk.said.endswith("STILL HERE \n")
    assert talk.state.path == folder and talk.opened == [folder, folder]
    assert talk.err.getvalue() == f"Error: {folder / 'damaged'}: ends early\n"
