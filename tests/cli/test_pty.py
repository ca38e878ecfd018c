"""A chat in a real terminal: prompts, Ctrl-C in both places, several lines, history, Ctrl-D."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")

TIMEOUT = 120
AGAIN = 5  # seconds after which a key that had no effect is typed again
PROMPT = ">>> "
# The session's leader that opens a terminal gets it as its own, so that Ctrl-C becomes a signal.
START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored where the tests run unattended
os.open(os.ttyname(0), os.O_RDWR)
from puna.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Screen:
    """A process in a pseudo-terminal, typed at and read from."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"PUNA_HOME": str(home), "TERM": "dumb", "COLUMNS": "60", "LINES": "40"},
        )
        os.close(theirs)
        self._read = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, text: str) -> str:
        """Read until `text` appears; return what came before it."""
        if not self._appears(text, TIMEOUT):
            pytest.fail(f"{text!r} did not appear; the screen has {self._read!r}")
        before, _, self._read = self._read.partition(text)
        return before.replace("\r\n", "\n")

    def press_until(self, key: str, text: str) -> None:
        """Type a key until `text` appears.

        An interrupt that comes after readline has shown its prompt but before it waits for input is not seen
        until something ends that wait, which is what the second one does; a person would press again too.
        """
        for _ in range(TIMEOUT // AGAIN):
            self.type(key)
            if self._appears(text, AGAIN):
                break
        self.expect(text)

    def _appears(self, text: str, seconds: float) -> bool:
        """Read until `text` is there, or time is up."""
        deadline = time.monotonic() + seconds
        while text not in self._read:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return False
            try:
                self._read += os.read(self._ours, 4096).decode(errors="replace")
            except OSError:  # the process has closed the terminal
                pytest.fail(f"{text!r} did not appear before the end; the screen has {self._read!r}")
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def screen(stories: Path, tmp_path: Path) -> Iterator[Screen]:
    model = str(stories / "hf")
    opened = Screen(["run", model, "--temperature", "0", "--max-tokens", "250"], tmp_path / "home")
    yield opened
    opened.close()


@pytest.mark.slow
def test_a_chat_in_a_terminal(screen: Screen, tmp_path: Path) -> None:
    screen.expect("Send a message (/? for help)")
    screen.expect(PROMPT)
    screen.press_until("\x03", "Use Ctrl + d or /bye to exit.")
    screen.expect(PROMPT)
    screen.type("Once upon a\n")
    screen.expect("Once upon a")
    answer = screen.expect(PROMPT)
    assert "time, there was a little girl named Lily." in " ".join(answer.split())
    lines = answer.strip().splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= 55
    screen.type('"""The big\n')
    screen.expect("... ")
    screen.type('llama"""\n')
    screen.expect(" ")
    time.sleep(0.05)
    screen.type("\x03")
    screen.expect(PROMPT)
    screen.type("/set parameter seed 7\n")
    screen.expect("Set parameter 'seed' to '7'")
    screen.expect(PROMPT)
    screen.type("\x04")
    assert screen.process.wait(TIMEOUT) == 0
    history = (tmp_path / "home" / "history").read_text().splitlines()
    assert history == ["Once upon a", '"""The big', 'llama"""', "/set parameter seed 7"]
