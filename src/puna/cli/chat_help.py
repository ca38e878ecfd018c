"""What the chat says about itself, in answer to /?."""

from __future__ import annotations

from puna.cli.sampling_options import PARAMETERS, columns

_KINDS: dict[type, str] = {float: "<number>", int: "<whole number>"}

COMMANDS = columns(
    [
        ("/set", "Set session variables"),
        ("/show", "Show model information"),
        ("/load <model>", "Load another model"),
        ("/clear", "Clear session context"),
        ("/bye, /exit", "Leave"),
        ("/?, /help", "Help for a command"),
        ("/? shortcuts", "Help for keyboard shortcuts"),
    ]
)
SET = columns(
    [
        ("/set parameter ...", "Set a parameter"),
        ("/set system <string>", "Set system message"),
        ("/set history", "Enable history"),
        ("/set nohistory", "Disable history"),
        ("/set wordwrap", "Enable wordwrap"),
        ("/set nowordwrap", "Disable wordwrap"),
        ("/set verbose", "Show timings after each answer"),
        ("/set quiet", "Disable timings"),
    ]
)
SHOW = columns(
    [
        ("/show info", "Show details for this model"),
        ("/show license", "Show model license"),
        ("/show modelfile", "Show Modelfile for this model"),
        ("/show parameters", "Show parameters for this model"),
        ("/show system", "Show system message"),
        ("/show template", "Show chat template"),
    ]
)
SHORTCUTS = columns(
    [
        ("Ctrl + a", "Move to the beginning of the line (Home)"),
        ("Ctrl + e", "Move to the end of the line (End)"),
        ("Alt + b", "Move back one word"),
        ("Alt + f", "Move forward one word"),
        ("Ctrl + k", "Delete what follows the cursor"),
        ("Ctrl + u", "Delete what precedes the cursor"),
        ("Ctrl + w", "Delete the word before the cursor"),
        ("Ctrl + r", "Search what was entered before"),
        ("Ctrl + l", "Clear the screen"),
        ("Ctrl + c", "Stop the answer"),
        ("Ctrl + d", "Leave (/bye)"),
    ]
)
LOAD = columns([("/load <model>", "A folder with a checkpoint, a .gguf file, or cria")])


def parameter_help() -> list[str]:
    """Return the lines that list what `/set parameter` takes."""
    rows = [(f"/set parameter {name} {_KINDS[read]}", does) for name, (_, read, does) in PARAMETERS.items()]
    return columns([*rows, ("/set parameter stop <string> ...", "stop before any of these texts")])


def help_text(words: list[str]) -> str:
    """Return the help for what follows /? or /help."""
    match words:
        case ["set" | "/set", *_]:
            return _titled("Available Commands:", SET)
        case ["show" | "/show", *_]:
            return _titled("Available Commands:", SHOW)
        case ["load" | "/load", *_]:
            return _titled("Available Commands:", LOAD)
        case ["shortcut" | "shortcuts"]:
            return _titled("Available keyboard shortcuts:", SHORTCUTS)
        case _:
            return _titled("Available Commands:", [*COMMANDS, "", 'Use """ to begin a multi-line message.'])


def _titled(title: str, lines: list[str]) -> str:
    return "\n".join([title, *lines, ""])
