"""The interactive chat: read a message, obey it or answer it, until the user leaves.

Input comes through a function and output goes to a `Terminal`, so that it all runs without one in tests.
"""

from __future__ import annotations

from collections.abc import Callable

from puna.cli.chat_commands import ChatCommands
from puna.cli.chat_state import NO_CHAT_FORMAT, ChatState
from puna.cli.line_input import read_message
from puna.errors import PunaError


class ChatLoop:
    """Talk with a loaded model."""

    def __init__(self, state: ChatState, read: Callable[[str], str], commands: ChatCommands) -> None:
        self._state = state
        self._read = read
        self._commands = commands
        self._terminal = state.terminal

    def run(self) -> None:
        """Go on until /bye or the end of input; Ctrl-C stops an answer, or says how to leave."""
        self._greet()
        while True:
            try:
                text = read_message(self._read)
            except KeyboardInterrupt:
                self._terminal.write("\nUse Ctrl + d or /bye to exit.\n")
                continue
            except EOFError:
                self._terminal.write("\n")
                return
            except UnicodeDecodeError:
                self._terminal.write("That was not valid text; it is ignored.\n")
                continue
            if not self._take(text):
                return

    def _greet(self) -> None:
        if self._state.conversation is None:
            self._terminal.write(NO_CHAT_FORMAT + "\n")
        self._terminal.write("Send a message (/? for help)\n")

    def _take(self, text: str) -> bool:
        """Act on a message; return False when the user wants to leave."""
        if not text.strip():
            return True
        try:
            if text.startswith("/"):
                return self._commands.obey(text)
            self._state.answer(text)
            self._terminal.write("\n")
        except KeyboardInterrupt:
            self._terminal.write("\n")
        except PunaError as error:
            self._terminal.notice(f"Error: {error}")
        return True
