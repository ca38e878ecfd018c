"""Say what a record means: a chat, a prompt with its completion, or plain text.

The kind is seen from the keys: OpenAI's `messages` (with a `weight` of 0 or 1 on assistant messages), TRL's
`prompt` and `completion`, `text`, Alpaca's `instruction` and `output`, ShareGPT's `conversations`. What
belongs to methods that are not there is refused by name; other columns are named once in a warning. Knows no
tokenizer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from puna.errors import ParameterError, UnsupportedError
from puna.train.data_files import Record

logger = logging.getLogger(__name__)

DataFormat = Literal[
    "messages", "prompt-completion", "text", "alpaca", "sharegpt", "preference", "unpaired-preference"
]
FORMATS: tuple[str, ...] = get_args(DataFormat)

_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what a row must have, what it may have
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "unpaired-preference": (("prompt", "completion", "label"), ("tools",)),
    "prompt-completion": (("prompt", "completion"), ("tools",)),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "preference": (("chosen", "rejected"), ("prompt", "tools")),
    "text": (("text",), ()),
}
_OTHER_METHODS = {
    "kto_tag": "a kto_tag on messages is not read: give prompt, completion and label",
    "completions": "judged steps are for reward models, which are not there yet",
}
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """Hold messages, and which of them are trained: those that are the assistant's, unless told otherwise."""

    place: str
    messages: Sequence[Mapping[str, Any]]
    trained: Sequence[bool]
    tools: Sequence[Mapping[str, Any]] | None = None
    label: bool | None = None  # whether the answer is desirable, where rows say so


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """Hold a text that is trained whole, or, behind a prompt, the part that is."""

    place: str
    text: str
    prompt: str = ""
    label: bool | None = None


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """Hold two answers to the same prompt; only what follows the prompt is compared."""

    place: str
    chosen: ChatRow | TextRow
    rejected: ChatRow | TextRow


Row = ChatRow | TextRow | PairRow


def read_rows(records: Iterable[Record], data_format: DataFormat | None = None) -> list[Row]:
    """Turn records into rows; `data_format` is seen from each record's keys where it is None.

    Raises ParameterError naming the place for a row that is of no kind or wrong in itself, UnsupportedError
    for one that belongs to another way of training.
    """
    if data_format is not None and data_format not in FORMATS:
        raise ParameterError(f"data_format is {data_format!r}; known are {', '.join(FORMATS)}")
    rows: list[Row] = []
    unused: dict[str, str] = {}
    for record in records:
        kind = _kind(record) if data_format is None else data_format
        needed, optional = _KEYS[kind]
        missing = [key for key in needed if record.values.get(key) is None]
        if missing:
            raise ParameterError(f"{record.place}: {missing[0]} is missing")
        for key in record.values:
            if key not in needed and key not in optional:
                unused.setdefault(key, record.place)
        rows.append(_READERS[kind](record))
    if unused:
        place = next(iter(unused.values()))
        logger.warning("%s: columns that are not used: %s", place, ", ".join(unused))
    return rows


def _kind(record: Record) -> str:
    keys = {key for key, value in record.values.items() if value is not None}
    for key, reason in _OTHER_METHODS.items():
        if key in keys:
            raise UnsupportedError(f"{record.place}: {reason}")
    for kind, (needed, _) in _KEYS.items():
        if keys.issuperset(needed):
            return kind
    wanted = "; ".join(" and ".join(needed) for needed, _ in _KEYS.values())
    raise ParameterError(f"{record.place}: no known kind of row: it has {_listed(keys)}, and needs {wanted}")


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)) or "no values"


def _messages_row(record: Record) -> ChatRow:
    messages, trained = _weighed(record.values["messages"], f"{record.place}: messages")
    return ChatRow(place=record.place, messages=messages, trained=trained, tools=_tools(record))


def _weighed(messages: Any, where: str) -> tuple[list[Mapping[str, Any]], list[bool]]:
    """Return the messages without their weights, and which are trained."""
    if not isinstance(messages, list) or not messages:
        raise ParameterError(f"{where}: a list of messages is needed")
    plain: list[Mapping[str, Any]] = []
    trained: list[bool] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ParameterError(f"{where}[{index}]: a message is an object, not {type(message).__name__}")
        weight = message.get("weight")
        is_answer = message.get("role") == "assistant"
        if weight is not None and not is_answer:
            raise ParameterError(f"{where}[{index}]: only an assistant message has a weight")
        if weight not in (None, 0, 1) or isinstance(weight, bool):
            raise ParameterError(f"{where}[{index}]: weight is {weight!r}, and must be 0 or 1")
        plain.append({key: value for key, value in message.items() if key != "weight"})
        trained.append(is_answer and weight != 0)
    return plain, trained


def _tools(record: Record) -> Any:
    tools = record.values.get("tools")
    if isinstance(tools, str):  # some data sets keep them as JSON
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ParameterError(f"{record.place}: tools: not JSON: {error}") from None
    return tools


def _prompt_row(record: Record) -> ChatRow | TextRow:
    prompt, completion = record.values["prompt"], record.values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, _ = _weighed(prompt, f"{record.place}: prompt")
        after, trained = _weighed(completion, f"{record.place}: completion")
        marks = [False] * len(before) + trained
        return ChatRow(place=record.place, messages=[*before, *after], trained=marks, tools=_tools(record))
    if _tools(record) is not None:
        raise ParameterError(f"{record.place}: tools need prompt and completion as lists of messages")
    return TextRow(
        place=record.place, prompt=_string(record, "prompt"), text=_string(record, "completion", filled=True)
    )


def _labelled_row(record: Record) -> ChatRow | TextRow:
    label = record.values["label"]
    if isinstance(label, str):  # of CSV
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.lower())
    if label not in (True, False):
        found = record.values["label"]
        raise ParameterError(f"{record.place}: label is {found!r:.40}; true or false is expected")
    return replace(_prompt_row(record), label=bool(label))


def _text_row(record: Record) -> TextRow:
    return TextRow(place=record.place, text=_string(record, "text", filled=True))


def _preference_row(record: Record) -> PairRow:
    parts = {key: record.values[key] for key in ("chosen", "rejected")}
    prompt = record.values.get("prompt")
    if all(isinstance(part, list) for part in parts.values()) and isinstance(prompt, list | None):
        if prompt is None:  # both are whole conversations, which begin alike
            prompt = _common_messages(*parts.values())
            parts = {key: part[len(prompt) :] for key, part in parts.items()}
        answers = (Record(values={**record.values, "prompt": prompt, "completion": p}, place=record.place)
                   for p in parts.values())  # fmt: skip
    elif isinstance(prompt, str) and all(isinstance(part, str) for part in parts.values()):
        answers = (
            Record(values={"prompt": prompt, "completion": p}, place=record.place) for p in parts.values()
        )
    else:
        raise ParameterError(
            f"{record.place}: chosen and rejected are two texts behind a prompt, or two lists of messages"
        )
    chosen, rejected = (_prompt_row(answer) for answer in answers)
    return PairRow(place=record.place, chosen=chosen, rejected=rejected)


def _common_messages(chosen: Sequence[Any], rejected: Sequence[Any]) -> list[Any]:
    """Return the messages that two conversations begin with, but never all of one."""
    count = 0
    while count + 1 < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    return list(chosen[:count])


def _alpaca_row(record: Record) -> ChatRow:
    question = _string(record, "instruction", filled=True)
    if record.values.get("input"):
        question += "\n" + _string(record, "input")
    messages = []
    if record.values.get("system"):
        messages.append({"role": "system", "content": _string(record, "system")})
    for index, turn in enumerate(record.values.get("history") or ()):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(t, str) for t in turn):
            raise ParameterError(f"{record.place}: history[{index}]: a question and an answer are needed")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _string(record, "output", filled=True)},
    ]
    return _all_answers(record, messages)


def _sharegpt_row(record: Record) -> ChatRow:
    turns = record.values["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ParameterError(f"{record.place}: conversations: a list of turns is needed")
    messages: list[dict[str, Any]] = []
    if record.values.get("system"):
        messages.append({"role": "system", "content": _string(record, "system")})
    messages += [_turn(turn, f"{record.place}: conversations[{i}]") for i, turn in enumerate(turns)]
    return _all_answers(record, messages)


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
        raise ParameterError(f"{where}: a turn has from and value")
    unknown = sorted(turn.keys() - {"from", "value"})
    if unknown:
        raise ParameterError(f"{where}: unknown key {unknown[0]!r}; known are from, value")
    speaker, value = turn["from"], turn["value"]
    if speaker not in _SPEAKERS:
        raise ParameterError(f"{where}: from is {speaker!r}; known are {', '.join(_SPEAKERS)}")
    if not isinstance(value, str):
        raise ParameterError(f"{where}: value is {value!r:.40}; a string is expected")
    if speaker != "function_call":
        return {"role": _SPEAKERS[speaker], "content": value}
    try:
        call = json.loads(value)
        function = {"name": call["name"], "arguments": call["arguments"]}
    except (ValueError, TypeError, KeyError):
        raise ParameterError(f"{where}: a function_call is JSON with name and arguments") from None
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _all_answers(record: Record, messages: Sequence[Mapping[str, Any]]) -> ChatRow:
    trained = [message["role"] == "assistant" for message in messages]
    return ChatRow(place=record.place, messages=messages, trained=trained, tools=_tools(record))


def _string(record: Record, key: str, *, filled: bool = False) -> str:
    value = record.values[key]
    if not isinstance(value, str):
        raise ParameterError(f"{record.place}: {key} is {value!r:.40}; a string is expected")
    if filled and not value:
        raise ParameterError(f"{record.place}: {key} is empty: nothing would be trained")
    return value


_READERS: Mapping[str, Callable[[Record], Row]] = {
    "messages": _messages_row,
    "sharegpt": _sharegpt_row,
    "prompt-completion": _prompt_row,
    "alpaca": _alpaca_row,
    "preference": _preference_row,
    "unpaired-preference": _labelled_row,
    "text": _text_row,
}
