"""Messages of several lines, and the history file."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from puna.cli.line_input import LineInput, puna_home, read_message


def typing(*lines: str) -> tuple[Callable[[str], str], list[str]]:
    prompts: list[str] = []
    waiting = list(lines)

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return waiting.pop(0)

    return read, prompts


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hello"], "hello"),
        (['"""one line"""'], "one line"),
        (['"""first', "second", 'third"""'], "first\nsecond\nthird"),
        (['"""', "text", '"""'], "\ntext\n"),
        (['/set system """be', 'kind"""'], "/set system be\nkind"),
        (['he said """no'], 'he said """no'),
        (['""""""'], ""),
    ],
)
def test_messages(lines: list[str], message: str) -> None:
    read, prompts = typing(*lines)
    assert read_message(read) == message
    assert prompts == [">>> "] + ["... "] * (len(lines) - 1)


def test_home_is_a_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PUNA_HOME", str(tmp_path))
    assert puna_home() == tmp_path
    monkeypatch.setenv("PUNA_HOME", "")
    assert puna_home() == Path("~/.puna").expanduser()


def test_history_is_kept_for_its_owner_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "new" / "history"
    read, _ = typing("first", " ", "secret", "last")
    monkeypatch.setattr("builtins.input", read)
    lines = LineInput(file)
    lines(">>> "), lines(">>> ")
    lines.set_history(False)
    lines(">>> ")
    lines.set_history(True)
    lines(">>> ")
    assert file.read_text() == "first\nlast\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_written_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    read, _ = typing("one", "two")
    monkeypatch.setattr("builtins.input", read)
    lines = LineInput(tmp_path / "file" / "history")
    assert [lines(">>> "), lines(">>> ")] == ["one", "two"]
    assert [record.getMessage()[:22] for record in caplog.records] == ["history is not kept: ["]


def test_history_is_read_back(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    file = tmp_path / "history"
    file.write_text("".join(f"line {number}\n" for number in range(1500)))
    readline.clear_history()
    LineInput(file)
    assert readline.get_current_history_length() == 1000
    assert readline.get_history_item(1000) == "line 1499"
    readline.clear_history()
