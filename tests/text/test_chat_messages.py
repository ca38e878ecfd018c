"""Messages and tools are brought into one form, and what is wrong with them is named."""

from __future__ import annotations

from typing import Any

import pytest

from puna.errors import ParameterError, UnsupportedError
from puna.text.chat_messages import check_json, check_messages, check_tools

CALL = {"function": {"name": "f", "arguments": {"x": 1}}}


def test_contents_become_strings() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        {"role": "tool", "content": "", "name": "f", "tool_call_id": "1"},
    ]
    assert check_messages(given) == [
        {"role": "user", "content": "ab"},
        {"role": "tool", "content": "", "name": "f", "tool_call_id": "1"},
    ]


def test_messages_are_copied() -> None:
    arguments = {"x": [1]}
    given = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    checked = check_messages(given)
    checked[0]["tool_calls"][0]["function"]["arguments"]["x"].append(2)
    assert arguments == {"x": [1]}


@pytest.mark.parametrize(
    ("call", "function"),
    [
        (CALL, {"name": "f", "arguments": {"x": 1}}),
        ({"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": {"x": 1}}),
        ({"function": {"name": "f", "arguments": '{"x": 1}'}}, {"name": "f", "arguments": {"x": 1}}),
        ({"function": {"name": "f", "arguments": ""}}, {"name": "f", "arguments": {}}),
    ],
)
def test_arguments_become_a_mapping(call: dict[str, Any], function: dict[str, Any]) -> None:
    for content in ({}, {"content": None}, {"content": ""}):
        message = {"role": "assistant", **content, "tool_calls": [call]}
        (checked,) = check_messages([message])
        assert checked["content"] == ""
        assert checked["tool_calls"][0]["function"] == function


def test_what_a_call_is_given_besides_stays() -> None:
    call = {"id": "1", "type": "function", **CALL}
    assert check_messages([{"role": "assistant", "tool_calls": [call]}])[0]["tool_calls"] == [call]
    without = {"role": "assistant", "content": "a"}
    assert check_messages([{**without, "tool_calls": [], "name": None}]) == [without]


def assistant(function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Hi", "messages[1]: an object is expected, not str"),
        ({}, "messages[1].role is None; roles are system, user, assistant, tool, ipython"),
        (
            {"role": "<|eot_id|>", "content": ""},
            "messages[1].role is '<|eot_id|>'; roles are system, user, assistant, tool, ipython",
        ),
        (
            {"role": "user", "content": "", "foo": 1},
            "messages[1]: unknown key 'foo'; known are role, content, name, tool_calls, tool_call_id",
        ),
        ({"role": "user"}, "messages[1].content is None; a string or a list of text parts is expected"),
        (
            {"role": "user", "content": 5},
            "messages[1].content is 5; a string or a list of text parts is expected",
        ),
        (
            {"role": "user", "content": "a\ud800"},
            "messages[1].content: character 1 is U+D800, half of a surrogate pair",
        ),
        ({"role": "user", "content": ["a"]}, "messages[1].content[0]: an object is expected, not str"),
        ({"role": "user", "content": [{"text": "a"}]}, "messages[1].content[0]: type is missing"),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "messages[1].content[0].text: a string is expected, not NoneType",
        ),
        (
            {"role": "user", "content": "", "name": 5},
            "messages[1].name: a string is expected, not int",
        ),
        (
            {"role": "user", "content": "", "tool_calls": [CALL]},
            "messages[1]: only an assistant message has tool_calls, not one of role 'user'",
        ),
        (
            {"role": "assistant", "tool_calls": CALL},
            "messages[1].tool_calls: a list is expected, not dict",
        ),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "type": "other"}]},
            "messages[1].tool_calls[0].type is 'other'; only 'function' is known",
        ),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "index": 0}]},
            "messages[1].tool_calls[0]: unknown key 'index'; known are id, type, function",
        ),
        (assistant(5), "messages[1].tool_calls[0].function: an object is expected, not int"),
        (
            assistant({"arguments": {}}),
            "messages[1].tool_calls[0].function.name: a string is expected, not NoneType",
        ),
        (
            assistant({"name": "f"}),
            "messages[1].tool_calls[0].function.arguments: an object, or one as a JSON string, is expected",
        ),
        (
            assistant({"name": "f", "arguments": "[1]"}),
            "messages[1].tool_calls[0].function.arguments: an object, or one as a JSON string, is expected",
        ),
        (
            assistant({"name": "f", "arguments": "{"}),
            "messages[1].tool_calls[0].function.arguments: not JSON: "
            "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (
            assistant({"name": "f", "arguments": '{"x": NaN}'}),
            "messages[1].tool_calls[0].function.arguments.x: nan is no JSON number",
        ),
    ],
)
def test_wrong_messages(message: Any, error: str) -> None:
    with pytest.raises(ParameterError) as caught:
        check_messages([{"role": "user", "content": "Hi"}, message])
    assert str(caught.value) == error


def test_images_are_not_supported() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(UnsupportedError) as caught:
        check_messages([{"role": "user", "content": [part]}])
    reason = "parts of type 'image_url' are not supported, only text"
    assert str(caught.value) == f"messages[0].content[0]: {reason}"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("Hi", "messages: a list of messages is expected, not str"),
        ({"role": "user"}, "messages: a list of messages is expected, not dict"),
        (None, "messages: a list of messages is expected, not NoneType"),
        ([], "messages: at least one message is needed"),
    ],
)
def test_no_list_of_messages(messages: Any, error: str) -> None:
    with pytest.raises(ParameterError) as caught:
        check_messages(messages)
    assert str(caught.value) == error


def test_tools_stay_as_they_are() -> None:
    tools: list[dict[str, Any]] = [
        {"name": "f"},
        {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}},
    ]
    checked = check_tools(tools)
    assert checked == tools and checked is not tools
    assert check_tools(None) is None and check_tools([]) is None


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ({"name": "f"}, "tools: a list of functions is expected, not dict"),
        ([len], "tools[0]: an object is expected, not builtin_function_or_method"),
        ([{}], "tools[0]: name is missing"),
        ([{"name": 5}], "tools[0].name: a string is expected, not int"),
        ([{"function": {"name": "f"}}], "tools[0].type is None; only 'function' is known"),
        ([{"type": "function", "function": {}}], "tools[0].function: name is missing"),
        (
            [{"name": "f", "foo": 1}],
            "tools[0]: unknown key 'foo'; known are name, description, parameters, strict, return",
        ),
        ([{"name": "f", "parameters": {1: 2}}], "tools[0].parameters: a string is expected, not int"),
        (
            [{"name": "f", "parameters": {"a": [object()]}}],
            "tools[0].parameters.a[0]: a value of type object is no JSON",
        ),
    ],
)
def test_wrong_tools(tools: Any, error: str) -> None:
    with pytest.raises(ParameterError) as caught:
        check_tools(tools)
    assert str(caught.value) == error


def test_json_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ParameterError, match="nested deeper than 64"):
        check_json(value, "value")
