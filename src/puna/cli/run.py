"""`puna run`: answer one prompt, or talk.

This module reads the options and decides which of the two is meant; the model and its settings are in
`chat_state.py`, the talk in `chat_loop.py`. The rules (what is joined to what, exit codes) are Ollama's.
"""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli.terminal import Terminal
from puna.cli.threads import Threads, use_threads
from puna.errors import ModelNotFoundError, ParameterError

if TYPE_CHECKING:
    from puna.cli.chat_state import ChatState


MODEL_HELP = (
    "A folder with a checkpoint, a .gguf file, or cria, the embedded model (also when nothing is given)."
)


class Dtype(StrEnum):
    """Name what unquantised weights are computed in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# The options of `puna run`, in the order of its help.
Model = Annotated[str | None, typer.Argument(metavar="MODEL", hidden=True)]
Prompt = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", hidden=True)]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="How the model is to behave.")]
Temperature = Annotated[
    float | None, typer.Option(metavar="T", help="How bold the choice is; 0: the likeliest, always.")
]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Choose among the K likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(metavar="P", help="Choose among the likeliest that sum to P.")]
MinP = Annotated[
    float | None, typer.Option(metavar="P", help="Leave out what is below P times the likeliest.")
]
RepeatPenalty = Annotated[float | None, typer.Option(metavar="X", help="Weaken tokens already seen; 1: off.")]
PresencePenalty = Annotated[float | None, typer.Option(metavar="X", help="Weaken tokens already written.")]
FrequencyPenalty = Annotated[
    float | None, typer.Option(metavar="X", help="Weaken tokens by how often they were written.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="The same seed gives the same text.")]
MaxTokens = Annotated[int | None, typer.Option(metavar="N", help="Longest answer, in tokens.")]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End an answer before TEXT; can be repeated.")
]
ChatFormat = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="llama2, llama3, llama3.1, ..., llama4: not the model's own."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Use no chat format: continue the text.")]
ComputeDtype = Annotated[Dtype, typer.Option(metavar="TYPE", help="Compute in float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="Compute on cpu, cuda, cuda:1, ...")]
Quantize = Annotated[
    str | None, typer.Option(metavar="TYPE", help="Quantise weights at load: q4_k_m, q8_0, q4_0, ...")
]
Adapter = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Answer with this adapter of PEFT's, or another tool's.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print timings after each answer.")]
NoWordWrap = Annotated[bool, typer.Option("--nowordwrap", help="Do not break lines between words.")]


def run(
    model: Model = None,
    prompt: Prompt = None,
    system: System = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repeat_penalty: RepeatPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    chat_format: ChatFormat = None,
    raw: Raw = False,
    dtype: ComputeDtype = Dtype.auto,
    device: Device = "cpu",
    threads: Threads = None,
    quantize: Quantize = None,
    adapter: Adapter = None,
    verbose: Verbose = False,
    nowordwrap: NoWordWrap = False,
) -> None:
    """Chat with a model, or let it answer one prompt.

    MODEL is a folder with a checkpoint, a .gguf file, or cria, the embedded model, which is also taken when
    nothing is given.

    PROMPT is answered, and that is all; text that is piped in comes before it. Without any, a chat begins (/?
    gives help in it). A model without a chat format continues the text.
    """
    path = _find(model, has_prompt=bool(prompt))
    text = _one_shot_text(prompt or [])
    sampling = _given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repeat_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop) if stop else None,
    )
    if raw and (system is not None or chat_format is not None):
        raise typer.BadParameter("--raw uses no chat format: it goes with neither --system nor --chat-format")
    options = {
        "dtype": dtype.value,
        "device": device,
        "chat_format": chat_format,
        "raw": raw,
        "quantize": quantize,
        "adapter": adapter,
    }
    shown = {"verbose": verbose, "wordwrap": not nowordwrap}
    state = _load(path, threads, options, sampling=sampling, system=system, **shown)
    if text is None:
        _talk(state)
    else:
        _answer_once(state, text)


def _load(path: Path, threads: int | None, options: dict[str, Any], **settings: Any) -> ChatState:
    """Load the model; shows that it takes its time."""
    terminal = Terminal.standard()
    with terminal.busy(f"loading {path.name}"):
        from puna.cli.chat_state import ChatState, ModelOptions  # these import torch, which takes its time

        use_threads(threads)
        state = ChatState(terminal, ModelOptions(**options), **settings)
        state.load(path)
    return state


def _talk(state: ChatState) -> None:
    from puna.cli.chat_commands import ChatCommands
    from puna.cli.chat_loop import ChatLoop
    from puna.cli.line_input import LineInput

    lines = LineInput()
    ChatLoop(state, lines, ChatCommands(state, lines.set_history)).run()


def _answer_once(state: ChatState, text: str) -> None:
    """Print one answer; Ctrl-C ends it and is no error, as with Ollama."""
    if state.conversation is not None and not text.strip():
        raise ParameterError("the prompt is empty: give one after the model, or on standard input")
    try:
        state.answer(text)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _find(model: str | None, *, has_prompt: bool) -> Path:
    from puna.locate import find_model

    try:
        return find_model(model)
    except ModelNotFoundError as error:
        if has_prompt or model is None:
            raise
        shown = shlex.quote(model if len(model) <= 80 else model[:77] + "...")
        raise ModelNotFoundError(f"{error} (to prompt it: puna run cria {shown})") from None


def _one_shot_text(words: list[str]) -> str | None:
    """Return the prompt: what is piped in, then the arguments, joined by one space; None means a chat."""
    piped = "" if _is_terminal(sys.stdin) else _read_all()
    parts = [piped, *words] if piped else words
    if parts or not (_is_terminal(sys.stdin) and _is_terminal(sys.stdout)):
        return _checked(" ".join(parts))
    return None


def _is_terminal(stream: Any) -> bool:
    return stream is not None and bool(stream.isatty())


def _read_all() -> str:
    """Read standard input to its end, without the newline that ends the last line."""
    if sys.stdin is None:  # closed by the caller
        return ""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParameterError(f"standard input is not UTF-8 text: see byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ParameterError("the prompt is not UTF-8 text") from None
    return text
