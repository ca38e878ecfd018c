"""Chats as token ids: Transformers' ids, the reference's golden ids, one BOS, the right template."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Pipeline
from transformers import AutoTokenizer

from chat_tokenizers import LLAMA2, LLAMA3, LLAMA3_1, LLAMA4, byte_tokenizer, split
from puna.errors import ParameterError, TemplateError, UnsupportedError
from puna.text.byte_level import LLAMA3_SPLIT
from puna.text.chat import choose_template, encode_chat, find_built_in, render_chat_text
from puna.text.formats import BUILT_IN
from puna.text.tokenizer import load_tokenizer

HI = [{"role": "user", "content": "Hi"}]
DATE = datetime.date(2024, 7, 26)
TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The "weather" <now>',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "short": HI,
    "long": [
        {"role": "system", "content": "  Be brief:\n\n- a | b\n"},
        {"role": "user", "content": " Hello  llamas, <b>it's</b> 1234567 \u00e9\u4f60\U0001f999\n\n"},
        {"role": "assistant", "content": "\tYes & no. "},
        {"role": "user", "content": "x"},
    ],
    "tools": [
        {"role": "user", "content": "How is Lima?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
            ],
        },
        {"role": "tool", "content": 'dry <b> "20"', "name": "weather"},
        {"role": "assistant", "content": "Dry."},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tokenizer.json of Llama 3's build with one token a byte, and every special token of chats."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)} | {
        "He": 256,
        "ll": 257,
        "\u0120\u0120": 258,
    }
    merges = [("H", "e"), ("l", "l"), ("\u0120", "\u0120")]
    pipeline = Pipeline(models.BPE(vocab, merges, ignore_merges=True))
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    names = dict.fromkeys([*LLAMA3_1, *LLAMA4, *LLAMA2])
    pipeline.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos = "<|begin_of_text|>"
    pipeline.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, pipeline.token_to_id(bos))]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    pipeline.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "conversation"),
    [
        *((name, "short") for name in ("llama3", "llama3.1", "llama3.2", "llama4")),
        *((name, "long") for name in ("llama3", "llama3.1", "llama3.2", "llama4")),
        *((name, "tools") for name in ("llama3.1", "llama3.2", "llama4")),
    ],
)
def test_ids_equal_those_of_transformers(folder: Path, name: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    tools = [TOOL] if conversation == "tools" else None
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in (False, True):
        expected = theirs.apply_chat_template(
            messages,
            tools=tools,
            chat_template=BUILT_IN[name],
            add_generation_prompt=prompt,
            return_dict=False,
            date_string="26 Jul 2024",
        )
        ids = encode_chat(
            tokenizer, messages, tools=tools, add_generation_prompt=prompt, chat_format=name, date=DATE
        )
        assert ids == expected


@pytest.mark.parametrize(
    ("content", "trims"), [("Yes, and", False), ("Yes, and ", False), ("Yes, and ", True), (" Yes\n", True)]
)
def test_continued_messages_equal_those_of_transformers(folder: Path, content: str, trims: bool) -> None:
    messages = [*HI, {"role": "assistant", "content": content}]
    source = BUILT_IN["llama3" if trims else "llama4"]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, chat_template=source, continue_final_message=True, return_dict=False
    )
    tokenizer = load_tokenizer(folder)
    assert encode_chat(tokenizer, messages, template=source, continue_final_message=True) == expected


def test_llama2_ids_equal_those_of_transformers(stories: Path) -> None:
    messages = [
        {"role": "system", "content": " Tell stories. "},
        {"role": "user", "content": " Once  upon\n a time"},
        {"role": "assistant", "content": "there was a dog."},
        {"role": "user", "content": "And then?"},
    ]
    expected = AutoTokenizer.from_pretrained(stories / "hf").apply_chat_template(
        messages, chat_template=BUILT_IN["llama2"], return_dict=False
    )
    assert encode_chat(load_tokenizer(stories / "hf"), messages, chat_format="llama2") == expected


def test_golden_ids_of_llama3(test_data: Path) -> None:
    tokenizer = load_tokenizer(test_data / "tokenizers/llama3-tokenizer.model")
    assert find_built_in(tokenizer) == "llama3.1"
    assert encode_chat(tokenizer, [{"role": "user", "content": " Hi "}]) == [
        *(
            128000,
            128006,
            9125,
            128007,
            271,
            38766,
            1303,
            33025,
            2696,
            25,
            6790,
            220,
            2366,
            18,
            198,
            15724,
            2696,
        ),
        *(25, 220, 1627, 10263, 220, 2366, 19, 271, 128009, 128006, 882, 128007, 271, 13347, 128009, 128006),
        *(78191, 128007, 271),
    ]
    assert encode_chat(tokenizer, HI, chat_format="llama3") == [
        *(128000, 128006, 882, 128007, 271, 13347, 128009, 128006, 78191, 128007, 271)
    ]


def test_a_tokenizer_without_a_template(stories: Path) -> None:
    tokenizer = load_tokenizer(stories / "hf")
    with pytest.raises(TemplateError, match="the model has no chat template: give one with template="):
        encode_chat(tokenizer, HI)


# -- which template


@pytest.mark.parametrize(
    ("specials", "name"),
    [
        (LLAMA2, None),
        (LLAMA3, "llama3"),
        ((*LLAMA3, "<|eom_id|>"), "llama3.1"),
        ((*LLAMA3, "<|python_tag|>"), "llama3.1"),
        ((*LLAMA3, "<|finetune_right_pad_id|>"), "llama3.1"),
        (LLAMA4, "llama4"),
        (("<|begin_of_text|>", "<|end_of_text|>"), None),
    ],
)
def test_built_in_formats_are_found_by_the_vocabulary(specials: tuple[str, ...], name: str | None) -> None:
    tokenizer = byte_tokenizer(specials)
    assert find_built_in(tokenizer) == name
    if name is not None:
        assert choose_template(tokenizer) == BUILT_IN[name]


def test_which_template_comes_first() -> None:
    tokenizer = byte_tokenizer(
        LLAMA3, templates={"default": "default", "tool_use": "with tools", "rag": "rag"}
    )
    assert choose_template(tokenizer) == "default"
    assert choose_template(tokenizer, has_tools=True) == "with tools"
    assert choose_template(tokenizer, template="{{ x }}", has_tools=True) == "{{ x }}"
    assert choose_template(tokenizer, template="rag") == "rag"
    assert choose_template(tokenizer, template="llama2") == BUILT_IN["llama2"]
    assert choose_template(tokenizer, chat_format="llama3.2") == BUILT_IN["llama3.2"]
    with pytest.raises(ParameterError, match="template and chat_format: give one of them"):
        choose_template(tokenizer, template="a", chat_format="llama3")
    with pytest.raises(ParameterError, match="chat_format is 'llama5'; known are llama2, llama3, llama3.1"):
        choose_template(tokenizer, chat_format="llama5")


def test_named_templates_without_a_default_must_be_named() -> None:
    tokenizer = byte_tokenizer(LLAMA3, templates={"tool_use": "a", "rag": "b"})
    with pytest.raises(TemplateError, match="name one of the model's templates: tool_use, rag"):
        choose_template(tokenizer)


# -- what reaches the template


def test_special_tokens_are_named_to_the_template() -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ unk_token is defined }}"
    tokenizer = byte_tokenizer(LLAMA3)
    assert render_chat_text(tokenizer, HI, template=source) == "<|begin_of_text|>|<|end_of_text|>|False|False"
    assert render_chat_text(byte_tokenizer(LLAMA3, has_bos=False), HI, template=source).startswith("|")


def test_variables_and_dates() -> None:
    tokenizer = byte_tokenizer(LLAMA3)
    source = "{{ style }} {{ documents | length }} {{ strftime_now('%Y-%m-%d') }} {{ date_string }}"
    settings: dict[str, Any] = {"template": source, "date": DATE, "style": "short", "documents": [{}, {}]}
    assert render_chat_text(tokenizer, HI, **settings) == "short 2 2024-07-26 26 Jul 2024"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"enable_thinking": True}, "the chat template has no variable 'enable_thinking'"),
        ({"messages_": 1}, "the chat template has no variable 'messages_'"),
        ({"bos_token": "x"}, "bos_token is not for the chat template's variables"),
        ({"strftime_now": "x"}, "strftime_now is not for the chat template's variables"),
        ({"x": object()}, "variables.x: a value of type object is no JSON"),
        ({"x": float("nan")}, "variables.x: nan is no JSON number"),
    ],
)
def test_wrong_variables(variables: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        encode_chat(byte_tokenizer(LLAMA3), HI, template="{{ bos_token }}{{ x }}", **variables)
    assert str(caught.value) == message


def test_tools_need_a_place_in_the_template() -> None:
    with pytest.raises(UnsupportedError, match="the chat template has no place for tools"):
        encode_chat(byte_tokenizer(LLAMA3), HI, tools=[TOOL], template=TURN)
    assert encode_chat(byte_tokenizer(LLAMA3), HI, tools=[], template=TURN) == [256, *b"[user]Hi"]


def test_the_generation_prompt_is_opened_unless_a_message_is_continued() -> None:
    tokenizer, source = byte_tokenizer(LLAMA3), TURN + "{{ '>' if add_generation_prompt }}"
    answer = [{"role": "assistant", "content": "So"}]
    assert render_chat_text(tokenizer, HI, template=source) == "[user]Hi>"
    assert render_chat_text(tokenizer, HI, template=source, add_generation_prompt=False) == "[user]Hi"
    assert (
        render_chat_text(tokenizer, answer, template=source, continue_final_message=True) == "[assistant]So"
    )
    with pytest.raises(ParameterError, match="exclude one another"):
        encode_chat(tokenizer, answer, add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize("message", [HI[0], CONVERSATIONS["tools"][1]])
def test_only_plain_answers_are_continued(message: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="the final message must be the assistant's, without calls"):
        encode_chat(byte_tokenizer(LLAMA3), [message], template=TURN, continue_final_message=True)


def test_a_message_that_is_not_written_cannot_be_continued() -> None:
    messages = [*HI, {"role": "assistant", "content": "So"}]
    with pytest.raises(TemplateError, match="the chat template does not write the final message"):
        encode_chat(
            byte_tokenizer(LLAMA3),
            messages,
            template="{{ messages[0].content }}",
            continue_final_message=True,
        )


# -- BOS


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize(
    "written", ["", "{{ bos_token }}", "{{ bos_token }}<|begin_of_text|>{{ bos_token }}"]
)
def test_one_bos_at_the_front(written: str, add_bos: bool, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer(LLAMA3, add_bos=add_bos)
    with caplog.at_level(logging.WARNING):
        assert encode_chat(tokenizer, HI, template=written + TURN) == [256, *b"[user]Hi"]
    assert ["3 BOS tokens" in record.message for record in caplog.records] == [True] * (
        written.count("b") > 1
    )


def test_bos_tokens_inside_stay() -> None:
    messages = [*HI, {"role": "assistant", "content": "So"}, *HI]
    tokenizer = byte_tokenizer(LLAMA2)
    assert split(tokenizer, encode_chat(tokenizer, messages, chat_format="llama2")) == [
        *("<s>", "[INST] Hi [/INST] So ", "</s>", "<s>", "[INST] Hi [/INST]")
    ]


def test_no_bos_where_there_is_none() -> None:
    tokenizer = byte_tokenizer(LLAMA3, has_bos=False, add_bos=False)
    assert encode_chat(tokenizer, HI, template=TURN) == [*b"[user]Hi"]


def test_an_empty_chat_is_bos_alone() -> None:
    assert encode_chat(byte_tokenizer(LLAMA3), HI, template="{# nothing #}") == [256]
