"""`puna run` with a prompt: the golden story from three formats, what is joined to what, refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from puna.cli.app import app
from puna.cria import FOLDER
from puna.errors import ModelNotFoundError, ParameterError

FORMATS = ("hf", "meta", "gguf/stories260k-f32.gguf")
GREEDY = ("--temperature", "0", "--max-tokens", "256")


def invoke(*arguments: str, piped: str | bytes = "") -> Result:
    return CliRunner().invoke(app, ["run", *arguments], input=piped, prog_name="puna")


def error_of(result: Result) -> str:
    assert result.exit_code == 1
    assert isinstance(result.exception, ModelNotFoundError | ParameterError)
    return str(result.exception)


@pytest.mark.parametrize("path", FORMATS)
def test_writes_the_golden_story(stories: Path, path: str) -> None:
    result = invoke(str(stories / path), "", *GREEDY)
    assert result.stdout == (stories / "golden.txt").read_text(encoding="utf-8")
    assert result.stderr == ""


def test_the_command_itself_writes_the_golden_story(stories: Path) -> None:
    command = [sys.executable, "-m", "puna", "run", str(stories / "hf"), "", *GREEDY]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (stories / "golden.txt").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "piped"),
    [
        (("Once upon a",), ""),
        (("Once", "upon", "a"), ""),
        ((), "Once upon a"),
        ((), "Once upon a\n"),
        (("a",), "Once upon\r\n"),
    ],
)
def test_the_prompt_is_what_is_piped_then_the_arguments(
    stories: Path, arguments: Sequence[str], piped: str
) -> None:
    result = invoke(str(stories / "hf"), *arguments, "--temperature", "0", "--max-tokens", "4", piped=piped)
    assert result.stdout == " time, there was"


def test_nothing_piped_is_an_empty_text_to_continue(stories: Path) -> None:
    result = invoke(str(stories / "hf"), "--max-tokens", "4")
    assert (stories / "golden.txt").read_text().startswith(result.stdout)
    assert result.stdout


def test_flags_reach_the_engine(stories: Path) -> None:
    def story(*flags: str) -> str:
        done = invoke(str(stories / "hf"), "", "--max-tokens", "40", *flags)
        assert done.exit_code == 0
        return done.stdout

    greedy, hot = story(), story("--temperature", "1", "--seed", "1")
    assert hot != greedy
    assert story("--temperature", "1", "--seed", "1") == hot
    assert story("--temperature", "1", "--seed", "1", "--top-k", "1") == greedy
    assert story("--temperature", "1", "--seed", "1", "--top-p", "0.01") == greedy
    assert story("--temperature", "1", "--seed", "1", "--min-p", "1") == greedy
    for penalty in ("--repeat-penalty", "--presence-penalty", "--frequency-penalty"):
        assert story(penalty, "1.9") != greedy
    assert story("--stop", "girl", "--stop", "never") == greedy[: greedy.index("girl")]


def test_threads_are_those_of_torch(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert invoke(str(stories / "hf"), "Once", "--max-tokens", "1", "--threads", "3").exit_code == 0
    assert asked == [3]
    refused = invoke(str(stories / "hf"), "Once", "--threads", "0")
    assert refused.exit_code == 2 and "--threads" in refused.stderr


def test_verbose_prints_timings_beside_the_answer(stories: Path) -> None:
    result = invoke(str(stories / "hf"), "Once", "--max-tokens", "4", "--verbose")
    names = [line.split(":")[0] for line in result.stderr.splitlines()]
    assert names == [
        "total duration",
        "load duration",
        "prompt eval count",
        "prompt eval duration",
        "prompt eval rate",
        "eval count",
        "eval duration",
        "eval rate",
    ]
    assert "eval count:           4 token(s)" in result.stderr
    assert "token(s)" not in result.stdout


def test_raw_text_may_spell_special_tokens(stories: Path) -> None:
    flags = ("--temperature", "0", "--max-tokens", "8")
    plain = invoke(str(stories / "hf"), "<s>Once", *flags).stdout
    raw = invoke(str(stories / "hf"), "<s>Once", "--raw", *flags).stdout
    assert raw == invoke(str(stories / "hf"), "Once", *flags).stdout != plain


def test_a_typing_error_in_a_path_is_not_sent_to_a_model_as_a_prompt() -> None:
    assert error_of(invoke("tell me a story")) == (
        "no model 'tell me a story': give a folder with a checkpoint, a .gguf file, or 'cria', the embedded "
        "model (to prompt it: puna run cria 'tell me a story')"
    )
    assert "to prompt it" not in error_of(invoke("/no/such/model", "hi"))


@pytest.mark.parametrize("name", ["", "word " * 1000, "~nobody-of-that-name/model", "a\0b"])
def test_names_that_no_file_has_are_not_found(name: str) -> None:
    message = error_of(invoke(name))
    assert message.startswith("no model '")
    assert len(message) < 400


def test_broken_text_is_refused(stories: Path) -> None:
    assert error_of(invoke(str(stories / "hf"), piped=b"a\xff")) == (
        "standard input is not UTF-8 text: see byte 1"
    )
    assert error_of(invoke(str(stories / "hf"), "a\udcff")) == "the prompt is not UTF-8 text"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", "3"), "temperature must be in [0, 2], got 3.0"),
        (("--max-tokens", "0"), "max_tokens must be at least 1, got 0"),
        (("--device", "toaster"), "device must be cpu, cuda, cuda:1, or such, not 'toaster'"),
    ],
)
def test_wrong_values_are_named(stories: Path, flags: Sequence[str], message: str) -> None:
    assert error_of(invoke(str(stories / "hf"), "x", *flags)) == message


@pytest.mark.parametrize(
    "flags", [("--dtype", "int8"), ("--top-k", "many"), ("--bogus",), ("--raw", "--system", "x")]
)
def test_wrong_usage_ends_with_2(stories: Path, flags: Sequence[str]) -> None:
    result = invoke(str(stories / "hf"), "x", *flags)
    assert result.exit_code == 2
    assert "Usage: puna run" in result.stderr


def test_ctrl_c_ends_an_answer_and_is_no_error(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.session import Session

    def cut(*_: Any, **__: Any) -> Any:
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "stream", cut)
    result = invoke(str(stories / "hf"), "x")
    assert (result.exit_code, result.stdout) == (0, "half")


@pytest.mark.skipif(not (FOLDER / "model.safetensors").exists(), reason="cria has not been trained here")
@pytest.mark.parametrize(
    ("arguments", "piped"),
    [(("cria", "Who are you?"), ""), ((), "Who are you?\n"), (("cria", "you?"), "Who are")],
)
def test_cria_answers_and_is_there_when_nothing_is_named(arguments: Sequence[str], piped: str) -> None:
    result = invoke(*arguments, "--temperature", "0", "--max-tokens", "100", piped=piped)
    assert result.exit_code == 0
    assert "cria" in result.stdout


@pytest.mark.skipif(not (FOLDER / "model.safetensors").exists(), reason="cria has not been trained here")
@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_message_to_a_chat_model_is_an_error(prompt: str) -> None:
    message = "the prompt is empty: give one after the model, or on standard input"
    assert error_of(invoke("cria", prompt)) == message
