"""The command as a process: exit codes, one-line errors, a quick start, the page of help texts."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import puna
from puna.cli import main
from puna.cli.help_page import help_page

ROOT = Path(__file__).resolve().parents[2]


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "\n  run   " in shown and "\n  show  " in shown
    assert main([]) == 0
    assert capsys.readouterr().out == shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"puna {puna.__version__}\n"


def test_an_error_is_one_line_and_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "/no/such/model"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Error: no model '/no/such/model': ")
    assert printed.err.count("\n") == 1


def test_wrong_usage_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fly"]) == 2
    assert "No such command 'fly'" in capsys.readouterr().err


def test_a_character_that_the_terminal_lacks_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    main(["--version"])
    print("\u00e9", end="", flush=True)
    assert written.getvalue().endswith(b"?")


def test_help_is_quick() -> None:
    """Counts processor time, which other work on the machine disturbs less; the best of three."""

    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "puna", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.3


def test_a_reader_that_leaves_is_no_noise(stories: Path) -> None:
    command = [sys.executable, "-m", "puna", "run", str(stories / "hf"), "", "--max-tokens", "400"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["show", "/no/such/model"]])
def test_neither_help_nor_a_wrong_name_imports_torch_or_rich(arguments: list[str]) -> None:
    code = (
        "import sys; from puna.cli import main; main(sys.argv[1:]);"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'rich', 'numpy', 'jinja2')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert done.returncode == 0


def test_the_page_of_help_texts_is_up_to_date() -> None:
    page = ROOT / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == help_page(), (
        "python -m puna.cli.help_page > docs/cli.md brings it up to date"
    )
