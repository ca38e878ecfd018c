"""The built-in chat formats, byte for byte."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from chat_tokenizers import LLAMA2, LLAMA3, LLAMA3_1, LLAMA4, byte_tokenizer
from puna.errors import TemplateError
from puna.text.chat import render_chat_text
from puna.text.formats import BUILT_IN

SYSTEM: dict[str, Any] = {"role": "system", "content": " Be brief. "}
USER: dict[str, Any] = {"role": "user", "content": " Hi\n"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": " Hello. "}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "Let me see.",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": "<\u00e9>"}}}],
}
SEARCH: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "brave_search", "arguments": {"query": "llamas", "n": "2"}}}],
}
RESULT: dict[str, Any] = {"role": "tool", "content": '4 <b> "q"'}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

TOOL_JSON = """{
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object"
        }
    }
}

"""
ANSWER_FORMAT = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
FOR_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON for a function "
    "call." + ANSWER_FORMAT + TOOL_JSON
)
FOR_USER = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments "
    "that best answers the given prompt.\n\n" + ANSWER_FORMAT + TOOL_JSON
)
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
CALL_JSON = '{"name": "add", "parameters": {"a": 1, "b": "<\u00e9>"}}'
RESULT_JSON = r'"4 <b> \"q\""'


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def header4(role: str) -> str:
    return f"<|header_start|>{role}<|header_end|>\n\n"


def render(name: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    vocabulary = {"llama2": LLAMA2, "llama3": LLAMA3, "llama4": LLAMA4}.get(name, LLAMA3_1)
    return render_chat_text(byte_tokenizer(vocabulary), messages, chat_format=name, **settings)


def test_names() -> None:
    assert list(BUILT_IN) == ["llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"]


def test_llama2() -> None:
    assert render("llama2", [USER]) == "<s>[INST] Hi [/INST]"
    assert render("llama2", [SYSTEM, USER, ANSWER, USER]) == (
        "<s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hi [/INST] Hello. </s><s>[INST] Hi [/INST]"
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, USER], "Conversation roles must alternate user/assistant/user/assistant/..."),
        ([ANSWER], "Conversation roles must alternate user/assistant/user/assistant/..."),
        ([USER, RESULT], "Conversation roles must alternate user/assistant/user/assistant/..."),
        ([USER, CALL], "this chat format has no tool calls"),
        ([SYSTEM], "there is no user message"),
    ],
)
def test_llama2_refuses(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render("llama2", messages)
    assert str(caught.value) == f"the chat template refuses the messages: {reason}"


def test_llama3() -> None:
    assert render("llama3", [SYSTEM, USER, ANSWER], add_generation_prompt=False) == (
        f"<|begin_of_text|>{header('system')}Be brief.<|eot_id|>{header('user')}Hi<|eot_id|>"
        f"{header('assistant')}Hello.<|eot_id|>"
    )
    assert render("llama3", [USER]) == f"<|begin_of_text|>{header('user')}Hi<|eot_id|>{header('assistant')}"


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_formats_without_tools_refuse_them(name: str) -> None:
    with pytest.raises(TemplateError, match="this chat format has no tools"):
        render(name, [USER], tools=[TOOL])


@pytest.mark.parametrize("name", ["llama3.1", "llama3.3"])
def test_llama3_1_always_has_a_system_block(name: str) -> None:
    assert render(name, [USER]) == (
        f"<|begin_of_text|>{header('system')}{DATES}<|eot_id|>{header('user')}Hi<|eot_id|>{header('assistant')}"
    )
    assert render(name, [SYSTEM, USER, ANSWER], add_generation_prompt=False) == (
        f"<|begin_of_text|>{header('system')}{DATES}Be brief.<|eot_id|>{header('user')}Hi<|eot_id|>"
        f"{header('assistant')}Hello.<|eot_id|>"
    )


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2"])
def test_llama3_1_tools_in_the_user_message(name: str) -> None:
    messages = [SYSTEM, USER, CALL, RESULT, ANSWER]
    assert render(name, messages, tools=[TOOL], date_string="26 Jul 2024") == (
        f"<|begin_of_text|>{header('system')}Environment: ipython\n{DATES}Be brief.<|eot_id|>"
        f"{header('user')}{FOR_USER}Hi<|eot_id|>"
        f"{header('assistant')}{CALL_JSON}<|eot_id|>"
        f"{header('ipython')}{RESULT_JSON}<|eot_id|>"
        f"{header('assistant')}Hello.<|eot_id|>{header('assistant')}"
    )


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2"])
def test_llama3_1_tools_in_the_system_message(name: str) -> None:
    settings = {"tools_in_user_message": False, "date_string": "26 Jul 2024"}
    assert render(name, [SYSTEM, USER], tools=[TOOL], **settings) == (
        f"<|begin_of_text|>{header('system')}Environment: ipython\n{DATES}{FOR_SYSTEM}Be brief.<|eot_id|>"
        f"{header('user')}Hi<|eot_id|>{header('assistant')}"
    )


def test_llama3_1_builtin_tools() -> None:
    messages = [USER, SEARCH, RESULT, CALL]
    builtin = ["brave_search", "code_interpreter", "wolfram_alpha"]
    assert render("llama3.1", messages, builtin_tools=builtin, add_generation_prompt=False) == (
        f"<|begin_of_text|>{header('system')}Environment: ipython\nTools: brave_search, wolfram_alpha\n\n"
        f"{DATES}<|eot_id|>{header('user')}Hi<|eot_id|>"
        f'{header("assistant")}<|python_tag|>brave_search.call(query="llamas", n="2")<|eom_id|>'
        f"{header('ipython')}{RESULT_JSON}<|eot_id|>"
        f"{header('assistant')}{CALL_JSON}<|eom_id|>"
    )


def test_custom_tools_come_before_tools() -> None:
    other = {"name": "other"}
    expected = render("llama3.1", [USER], tools=[TOOL])
    assert render("llama3.1", [USER], tools=[other], custom_tools=[TOOL]) == expected


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2", "llama4"])
def test_tools_need_a_user_message(name: str) -> None:
    reason = "Cannot put tools in the first user message when there's no first user message!"
    with pytest.raises(TemplateError, match=reason):
        render(name, [SYSTEM], tools=[TOOL])


def test_llama3_1_calls_one_tool_at_once() -> None:
    twice = {**CALL, "tool_calls": CALL["tool_calls"] * 2}
    with pytest.raises(TemplateError, match="This model only supports single tool-calls at once!"):
        render("llama3.1", [USER, twice])


def test_llama3_2_has_no_builtin_tools() -> None:
    with pytest.raises(TemplateError, match="this chat format has no builtin_tools"):
        render("llama3.2", [USER], builtin_tools=["brave_search"])


def test_dates() -> None:
    date = datetime.date(2025, 3, 9)
    for name in ("llama3.1", "llama3.2", "llama3.3"):
        assert "Today Date: 09 Mar 2025\n\n" in render(name, [USER], date=date)
        assert "Today Date: then\n\n" in render(name, [USER], date=date, date_string="then")
    today = datetime.datetime.now().strftime("%d %b %Y")
    assert f"Today Date: {today}\n\n" in render("llama3.2", [USER])
    assert "Date" not in render("llama4", [SYSTEM, USER], date=date)


def test_llama4() -> None:
    assert render("llama4", [USER]) == f"<|begin_of_text|>{header4('user')} Hi\n<|eot|>{header4('assistant')}"
    assert render("llama4", [SYSTEM, USER, ANSWER], add_generation_prompt=False) == (
        f"<|begin_of_text|>{header4('system')}Be brief.<|eot|>{header4('user')} Hi\n<|eot|>"
        f"{header4('assistant')} Hello. <|eot|>"
    )


def test_llama4_tools() -> None:
    twice = {**CALL, "tool_calls": CALL["tool_calls"] * 2}
    assert render("llama4", [SYSTEM, USER, twice, RESULT], tools=[TOOL]) == (
        f"<|begin_of_text|>{header4('system')}Environment: ipython\nBe brief.<|eot|>"
        f"{header4('user')}{FOR_USER}Hi<|eot|>"
        f"{header4('assistant')}<|python_start|>Let me see.<|python_end|>{CALL_JSON}{CALL_JSON}<|eot|>"
        f"{header4('ipython')}{RESULT_JSON}<|eot|>{header4('assistant')}"
    )
    assert render("llama4", [SYSTEM, USER], tools=[TOOL], tools_in_user_message=False) == (
        f"<|begin_of_text|>{header4('system')}Environment: ipython\n{FOR_SYSTEM}Be brief.<|eot|>"
        f"{header4('user')} Hi\n<|eot|>{header4('assistant')}"
    )


def test_llama4_has_no_place_for_system_tools_without_a_system_message() -> None:
    with pytest.raises(TemplateError, match="tools outside of the user message need a system message"):
        render("llama4", [USER], tools=[TOOL], tools_in_user_message=False)
