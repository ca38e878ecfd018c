"""Check chat messages and tools before a template sees them, and bring them into one form.

The form is that of OpenAI and Transformers: role, content as one string, name, tool_call_id, and tool_calls
with their arguments as a mapping (a JSON string is parsed: templates would quote it a second time). Whatever
is unknown is an error that names its place. Knows no template and no tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from puna.errors import ParameterError, UnsupportedError

ROLES = ("system", "user", "assistant", "tool", "ipython")
MAX_DEPTH = 64

_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
_CALL_KEYS = ("id", "type", "function")
_FUNCTION_CALL_KEYS = ("name", "arguments")
_TOOL_KEYS = ("type", "function")
_FUNCTION_KEYS = ("name", "description", "parameters", "strict", "return")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return fresh messages with string contents and parsed tool calls.

    Raises `ParameterError` naming message and key for what is unknown, missing or of the wrong type, and
    `UnsupportedError` for parts that are not text.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ParameterError(f"messages: a list of messages is expected, not {type(messages).__name__}")
    if not messages:
        raise ParameterError("messages: at least one message is needed")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return a copy of the tools, each a function or {"type": "function", "function": ...}; None for [].

    Raises `ParameterError` naming the tool that has no name or an unknown key.
    """
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ParameterError(f"tools: a list of functions is expected, not {type(tools).__name__}")
    return [_check_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)] or None


def check_json(value: Any, where: str, depth: int = 0) -> Any:
    """Return a copy of a JSON value; raise `ParameterError` naming what JSON does not know."""
    if depth > MAX_DEPTH:
        raise ParameterError(f"{where}: nested deeper than {MAX_DEPTH}")
    match value:
        case None | bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
        case str():
            return _check_text(value, where)
        case Mapping():
            return {
                _check_text(key, where): check_json(item, f"{where}.{key}", depth + 1)
                for key, item in value.items()
            }
        case list() | tuple():
            return [check_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
        case float():
            raise ParameterError(f"{where}: {value} is no JSON number")
    raise ParameterError(f"{where}: a value of type {type(value).__name__} is no JSON")


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ParameterError(f"{where}: a string is expected, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise ParameterError(
            f"{where}: character {error.start} is U+{code:04X}, half of a surrogate pair"
        ) from None
    return str(value)


def _check_object(value: Any, keys: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ParameterError(f"{where}: an object is expected, not {type(value).__name__}")
    for key in value:
        if key not in keys:
            raise ParameterError(f"{where}: unknown key {key!r}; known are {', '.join(keys)}")
    return value


def _missing(where: str, key: str) -> NoReturn:
    raise ParameterError(f"{where}: {key} is missing")


def _check_message(value: Any, where: str) -> dict[str, Any]:
    message = _check_object(value, _MESSAGE_KEYS, where)
    role = message.get("role")
    if role not in ROLES:
        raise ParameterError(f"{where}.role is {role!r}; roles are {', '.join(ROLES)}")
    calls = _check_calls(message.get("tool_calls"), f"{where}.tool_calls")
    if calls and role != "assistant":
        raise ParameterError(f"{where}: only an assistant message has tool_calls, not one of role {role!r}")
    checked = {"role": role, "content": _check_content(message.get("content"), calls, f"{where}.content")}
    if calls:
        checked["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            checked[key] = _check_text(message[key], f"{where}.{key}")
    return checked


def _check_content(content: Any, calls: list[dict[str, Any]], where: str) -> str:
    if content is None and calls:
        return ""
    if isinstance(content, str):
        return _check_text(content, where)
    if not isinstance(content, Sequence):
        raise ParameterError(f"{where} is {content!r:.40}; a string or a list of text parts is expected")
    return "".join(_check_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _check_part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") not in (None, "text"):
        raise UnsupportedError(f"{where}: parts of type {part['type']!r} are not supported, only text")
    part = _check_object(part, ("type", "text"), where)
    if part.get("type") != "text":
        _missing(where, "type")
    return _check_text(part.get("text"), f"{where}.text")


def _check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise ParameterError(f"{where}: a list is expected, not {type(calls).__name__}")
    return [_check_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _check_call(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, Mapping) and "function" not in value:
        value = {"type": "function", "function": value}
    call = _check_object(value, _CALL_KEYS, where)
    if call.get("type", "function") != "function":
        raise ParameterError(f"{where}.type is {call['type']!r}; only 'function' is known")
    function = _check_object(call["function"], _FUNCTION_CALL_KEYS, f"{where}.function")
    name = _check_text(function.get("name"), f"{where}.function.name")
    arguments = _check_arguments(function.get("arguments"), f"{where}.function.arguments")
    checked = {key: check_json(call[key], f"{where}.{key}") for key in call if key != "function"}
    return {**checked, "function": {"name": name, "arguments": arguments}}


def _check_arguments(arguments: Any, where: str) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ParameterError(f"{where}: not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise ParameterError(f"{where}: an object, or one as a JSON string, is expected")
    checked: dict[str, Any] = check_json(arguments, where)
    return checked


def _check_tool(value: Any, where: str) -> dict[str, Any]:
    tool = value
    if isinstance(tool, Mapping) and "function" in tool:
        tool = _check_object(tool, _TOOL_KEYS, where)
        if tool.get("type") != "function":
            raise ParameterError(f"{where}.type is {tool.get('type')!r}; only 'function' is known")
        tool, where = tool["function"], f"{where}.function"
    function = _check_object(tool, _FUNCTION_KEYS, where)
    if not function.get("name"):
        _missing(where, "name")
    _check_text(function["name"], f"{where}.name")
    checked: dict[str, Any] = check_json(value, where)
    return checked
