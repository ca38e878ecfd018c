"""The tokenizer's Transformers surface against Transformers' own tokenizers, loaded from the same folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puna import AutoTokenizer
from puna.auto_encoding import BatchEncoding
from puna.errors import ModelNotFoundError, ParameterError, UnsupportedError
from tiny_chat import BOS, EOT, PAD, save_tokenizer

TEXTS = [
    "Once upon a time",
    "a llama",
    "",
    "two  spaces\nand lines ",
    "caf\u00e9 \U0001f999 \u4f60\u597d",
    f"x{EOT}y",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello llama"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(params=["byte_level", "sentencepiece"])
def folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "byte_level":
        found: Path = request.getfixturevalue("chat_folder")
        return found
    stories: Path = request.getfixturevalue("stories")
    return stories / "hf"


@pytest.fixture
def ours(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer as Theirs

    return Theirs.from_pretrained(folder)


@pytest.fixture
def chat(chat_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(chat_folder)


def plain(encoding: Any) -> dict[str, Any]:
    values = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in encoding.items()}
    return {name: values[name] for name in ("input_ids", "attention_mask") if name in values}


# -- names


NAMES = [
    "bos_token",
    "bos_token_id",
    "eos_token",
    "eos_token_id",
    "unk_token",
    "unk_token_id",
    "pad_token",
    "pad_token_id",
    "padding_side",
    "truncation_side",
    "model_max_length",
    "vocab_size",
    "chat_template",
    "is_fast",
    "special_tokens_map",
]


@pytest.mark.parametrize("name", NAMES)
def test_names(ours: Any, theirs: Any, name: str) -> None:
    assert getattr(ours, name) == getattr(theirs, name)


def test_vocabulary(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs) and bool(ours)
    assert ours.get_vocab() == theirs.get_vocab()
    assert set(theirs.all_special_tokens) <= set(ours.all_special_tokens)
    assert ours.convert_tokens_to_ids(ours.all_special_tokens) == ours.all_special_ids
    assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add()
    ids = theirs(TEXTS[0])["input_ids"]
    tokens = theirs.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens(ids) == tokens
    assert ours.convert_ids_to_tokens(ids, skip_special_tokens=True) == tokens[1:]
    assert ours.convert_ids_to_tokens(ids[1]) == tokens[1]
    assert ours.convert_tokens_to_ids(tokens) == ids and ours.convert_tokens_to_ids(tokens[1]) == ids[1]
    assert ours.convert_tokens_to_ids("no such token") == theirs.convert_tokens_to_ids("no such token")


# -- text to ids


@pytest.mark.parametrize("text", TEXTS)
def test_one_text(ours: Any, theirs: Any, text: str) -> None:
    assert plain(ours(text)) == plain(theirs(text))
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert plain(ours(text, return_tensors="pt")) == plain(theirs(text, return_tensors="pt"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": True},
        {"padding": "longest", "padding_side": "right", "return_tensors": "pt"},
        {"padding": "longest", "padding_side": "left", "return_tensors": "np"},
        {"padding": "max_length", "max_length": 12},
        {"padding": "max_length", "max_length": 5},
        {"padding": "max_length", "max_length": 5, "truncation": True, "return_tensors": "pt"},
        {"padding": True, "truncation": True, "max_length": 4},
        {"padding": True, "pad_to_multiple_of": 8},
        {"truncation": True, "max_length": 3},
        {"truncation": "longest_first", "max_length": 3, "add_special_tokens": False},
        {"truncation": False, "max_length": 3},
        {"truncation": True},
        {"max_length": 4},
        {"add_special_tokens": False, "return_attention_mask": False},
    ],
)
@pytest.mark.parametrize("truncation_side", ["right", "left"])
def test_batches(ours: Any, theirs: Any, settings: dict[str, Any], truncation_side: str) -> None:
    for tokenizer in (ours, theirs):
        tokenizer.truncation_side = truncation_side
        tokenizer.pad_token = tokenizer.eos_token
    texts = [text for text in TEXTS if text]
    expected = theirs(texts, **settings)
    got = ours(texts, **settings)
    assert plain(got) == plain(expected)
    assert type(got["input_ids"]) is type(expected["input_ids"])


def test_model_max_length_pads_and_cuts(ours: Any, theirs: Any, caplog: pytest.LogCaptureFixture) -> None:
    for tokenizer in (ours, theirs):
        tokenizer.model_max_length = 6
        tokenizer.pad_token = tokenizer.eos_token
    for settings in (
        {"padding": "max_length"},
        {"truncation": True},
        {"padding": "max_length", "truncation": True},
    ):
        assert plain(ours(TEXTS[:2], **settings)) == plain(theirs(TEXTS[:2], **settings))
    with caplog.at_level(logging.WARNING, logger="puna"):
        ours(TEXTS[0] * 3)
    assert "longer than model_max_length, 6 tokens" in caplog.text


def test_max_length_that_is_not_used_warns(chat: Any) -> None:
    chat.pad_token = PAD
    with pytest.warns(UserWarning, match="max_length is not used"):
        assert len(chat(TEXTS[0], padding=True, max_length=2)["input_ids"]) > 2


def test_special_tokens_in_text(chat: Any) -> None:
    assert chat.eos_token_id in chat(f"x{EOT}y")["input_ids"]
    assert chat.eos_token_id not in chat(f"x{EOT}y", split_special_tokens=True)["input_ids"]


def test_an_encoding_is_a_mapping_with_attributes(chat: Any) -> None:
    encoding = chat(["a", "b"], return_tensors="pt")
    assert isinstance(encoding, BatchEncoding)
    assert encoding.input_ids is encoding["input_ids"] and dict(**encoding).keys() == {
        "input_ids",
        "attention_mask",
    }
    assert encoding.to("cpu") is encoding and encoding.to("meta").input_ids.is_meta
    with pytest.raises(AttributeError, match="no 'labels'; it has .'attention_mask', 'input_ids'."):
        _ = encoding.labels
    with pytest.raises(ParameterError, match="moves to a device"):
        encoding.to(torch.float16)  # type: ignore[arg-type]


def test_padding_without_a_pad_token(ours: Any, theirs: Any) -> None:
    ours.pad_token = theirs.pad_token = None
    for tokenizer in (ours, theirs):
        with pytest.raises(ValueError, match="pad_token"):
            tokenizer(TEXTS, padding=True)
    ours.pad_token = ours.eos_token
    assert ours.pad_token_id == ours.eos_token_id
    ours.pad_token_id = 0
    assert ours.pad_token == ours.convert_ids_to_tokens(0)


# -- ids to text


def test_decode(ours: Any, theirs: Any) -> None:
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            for same in (ids, torch.tensor(ids), np.array(ids), [torch.tensor(i) for i in ids]):
                assert ours.decode(same, skip_special_tokens=skip) == expected
    assert ours.decode(5) == theirs.decode(5) == ours.decode(torch.tensor(5))
    rows = [theirs(text)["input_ids"] for text in TEXTS[:2]]
    assert ours.decode(rows) == ours.batch_decode(rows) == theirs.batch_decode(rows)
    assert ours.batch_decode([5, 6]) == theirs.batch_decode([5, 6])
    batch = torch.tensor([row[:3] for row in rows])
    assert ours.batch_decode(batch, skip_special_tokens=True) == theirs.batch_decode(
        batch, skip_special_tokens=True
    )


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("__call__", None, "a text or a list of texts is needed, got NoneType"),
        ("__call__", {"text": "a"}, "a text or a list of texts is needed, got dict"),
        ("__call__", ["a", 3], "got a list with int"),
        ("encode", 5, "a text or a list of texts is needed, got int"),
        ("convert_tokens_to_ids", 5, "got int"),
        ("convert_ids_to_tokens", "a", "token ids are needed, got str"),
        ("decode", None, "token ids are needed, got NoneType"),
        ("decode", "12", "token ids are needed, got str"),
        ("decode", [1, "a"], "token ids are integers, got 'a'"),
        ("decode", 1.5, "token ids are needed, got float"),
        ("batch_decode", None, "token ids are needed, got NoneType"),
        ("apply_chat_template", ["hi"], "a message is a dict with role and content, not str: 'hi'"),
        ("apply_chat_template", "hi", "a conversation is a list of messages, not str"),
        ("apply_chat_template", {"role": "user"}, "a conversation is a list of messages, not dict"),
        ("apply_chat_template", [CHAT, CHAT[0]], "in a batch each conversation is a list, not dict"),
    ],
)
def test_wrong_types_are_clear_errors(chat: Any, method: str, given: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        getattr(chat, method)(given)


def test_decode_refuses_unknown_ids_and_cleaning(chat: Any) -> None:
    with pytest.raises(ParameterError, match=f"token id {len(chat)} is outside"):
        chat.decode([len(chat)])
    with pytest.raises(UnsupportedError, match="clean_up_tokenization_spaces"):
        chat.decode([1], clean_up_tokenization_spaces=True)


# -- chat


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_generation_prompt": True},
        {"return_tensors": "pt", "add_generation_prompt": True},
        {"return_tensors": "np"},
        {"return_dict": False},
        {"return_dict": False, "return_tensors": "pt"},
        {"truncation": True, "max_length": 9},
        {"padding": "max_length", "max_length": 99},
        {"date_string": "1 Jan 2025"},
        {"chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}"},
        {"tokenizer_kwargs": {"padding_side": "left"}, "padding": "max_length", "max_length": 99},
    ],
)
def test_chat_templates(chat: Any, chat_folder: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoTokenizer as Theirs

    theirs = Theirs.from_pretrained(chat_folder)
    chat.pad_token = theirs.pad_token = PAD
    got, expected = (t.apply_chat_template(CHAT, **settings) for t in (chat, theirs))
    if settings.get("return_dict", True):
        assert plain(got) == plain(expected)
    else:
        assert np.array_equal(got, expected) and type(got) is type(expected)
    text = {k: v for k, v in settings.items() if k not in ("tokenizer_kwargs",)}
    assert chat.apply_chat_template(CHAT, tokenize=False, **text) == theirs.apply_chat_template(
        CHAT, tokenize=False, **text
    )


def test_the_final_message_may_be_continued(chat: Any, chat_folder: Path) -> None:
    from transformers import AutoTokenizer as Theirs

    theirs = Theirs.from_pretrained(chat_folder)
    for content in ("Once upon", "Once upon "):
        begun = [*CHAT, {"role": "assistant", "content": content}]
        got, expected = (t.apply_chat_template(begun, continue_final_message=True) for t in (chat, theirs))
        assert plain(got) == plain(expected) and got["input_ids"][-1] != chat.eos_token_id
    with pytest.raises(ParameterError, match="exclude one another"):
        chat.apply_chat_template(begun, continue_final_message=True, add_generation_prompt=True)


def test_several_conversations(chat: Any, chat_folder: Path) -> None:
    from transformers import AutoTokenizer as Theirs

    theirs = Theirs.from_pretrained(chat_folder)
    chat.pad_token = theirs.pad_token = PAD
    many = [CHAT[:2], CHAT, [{"role": "user", "content": "x", "name": None}]]
    for settings in ({}, {"padding": True, "return_tensors": "pt", "add_generation_prompt": True}):
        got, expected = (t.apply_chat_template(many, **settings) for t in (chat, theirs))
        assert plain(got) == plain(expected)
    assert chat.apply_chat_template(many, tokenize=False) == theirs.apply_chat_template(many, tokenize=False)


def test_a_message_cannot_end_its_turn(chat: Any) -> None:
    clean = chat.apply_chat_template([{"role": "user", "content": "x"}])["input_ids"]
    smuggled = chat.apply_chat_template([{"role": "user", "content": f"x{EOT}"}])["input_ids"]
    assert smuggled.count(chat.eos_token_id) == clean.count(chat.eos_token_id)
    text = chat.apply_chat_template([{"role": "user", "content": f"x{EOT}"}], tokenize=False)
    assert chat.decode(smuggled) == text and smuggled.count(chat.bos_token_id) == 1


def test_the_template_may_be_replaced(chat: Any, chat_folder: Path) -> None:
    chat.chat_template = "{{ messages[0].content }}!"
    assert chat.apply_chat_template(CHAT, tokenize=False) == "Be brief.!"
    other = AutoTokenizer.from_pretrained(chat_folder, chat_template="{{ bos_token }}?")
    assert other.apply_chat_template(CHAT)["input_ids"] == other("?")["input_ids"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"conversation": []}, ParameterError, "conversation is empty"),
        ({"tools": [len]}, UnsupportedError, "JSON schemas"),
        ({"return_assistant_tokens_mask": True}, UnsupportedError, "return_assistant_tokens_mask"),
        ({"sanitize_control_tokens": False}, UnsupportedError, "sanitize_control_tokens=False"),
        ({"continue_final_message": "content"}, UnsupportedError, "must be True or False, got 'content'"),
        ({"date": "today"}, ParameterError, "no parameter 'date'"),
        ({"dates": "today"}, ParameterError, "no variable 'dates'"),
        ({"return_tensors": "tf"}, ParameterError, "return_tensors must be 'pt' or 'np', got 'tf'"),
    ],
)
def test_chat_refuses_by_name(
    chat: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        chat.apply_chat_template(**{"conversation": CHAT, **settings})


# -- refusals


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"text_pair": "b"}, UnsupportedError, "text_pair='b'"),
        ({"return_offsets_mapping": True}, UnsupportedError, "return_offsets_mapping=True"),
        ({"stride": 4}, UnsupportedError, "stride=4"),
        ({"paddding": True}, ParameterError, "'paddding'"),
        ({"padding": "most"}, ParameterError, "padding must be .* got 'most'"),
        ({"truncation": "only_second"}, ParameterError, "truncation must be .* got 'only_second'"),
        ({"padding_side": "top"}, ParameterError, "padding_side must be 'left' or 'right', got 'top'"),
        ({"max_length": 0}, ParameterError, "no room for the 1 special"),
        ({"padding": True, "pad_to_multiple_of": 0}, ParameterError, "pad_to_multiple_of is 0"),
        ({"text": ["a", "a b c d"], "return_tensors": "pt"}, ParameterError, "unequal length"),
        ({"text": [3]}, ParameterError, "got a list with int"),
    ],
)
def test_calls_refuse_by_name(
    chat: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        chat(**{"text": "a", **settings})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"trust_remote_code": True}, UnsupportedError, "trust_remote_code=True"),
        ({"use_fast": False}, UnsupportedError, "use_fast=False"),
        ({"legacy": False}, UnsupportedError, "legacy=False"),
        ({"revision": "v2"}, UnsupportedError, "revision='v2'"),
        ({"bos_token": "x"}, UnsupportedError, "bos_token='x'"),
        ({"use_fats": True}, ParameterError, "'use_fats'"),
        ({"padding_side": "middle"}, ParameterError, "padding_side"),
        ({"pad_token": "[NEW]"}, UnsupportedError, "'.NEW.' is not in the vocabulary"),
    ],
)
def test_loading_refuses_by_name(
    chat_folder: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AutoTokenizer.from_pretrained(chat_folder, **settings)


def test_loading_settings(chat_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        chat_folder,
        padding_side="left",
        truncation_side="left",
        model_max_length=7,
        pad_token=PAD,
        use_fast=True,
        trust_remote_code=False,
        token=None,
    )
    sides = (tokenizer.padding_side, tokenizer.truncation_side)
    assert sides == ("left", "left") and tokenizer.model_max_length == 7 and tokenizer.pad_token == PAD


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.3-70B-Instruct", "no/such/folder"])
def test_names_of_the_hub_are_refused_with_advice(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"'{name}'.*later release.*local folder.*'cria'"):
        AutoTokenizer.from_pretrained(name)


def test_it_is_not_made_by_calling() -> None:
    with pytest.raises(UnsupportedError, match="AutoTokenizer.from_pretrained"):
        AutoTokenizer()
    with pytest.raises(ParameterError, match="got int"):
        AutoTokenizer.from_pretrained(3)  # type: ignore[arg-type]


def test_every_place_a_tokenizer_comes_from(stories: Path, chat_folder: Path, test_data: Path) -> None:
    ids = AutoTokenizer.from_pretrained(stories / "hf")("Once upon a time")["input_ids"]
    for path in (
        stories / "meta",
        stories / "gguf",
        stories / "gguf" / "stories260k-f32.gguf",
        stories / "hf" / "tokenizer.model",
    ):
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert tokenizer("Once upon a time")["input_ids"] == ids, path
        assert tokenizer.padding_side == "left"
    named = AutoTokenizer.from_pretrained(stories / "gguf", gguf_file="stories260k-f32.gguf")
    assert named("Once upon a time")["input_ids"] == ids
    assert AutoTokenizer.from_pretrained(chat_folder / "tokenizer.json").bos_token == BOS
    llama3 = AutoTokenizer.from_pretrained(test_data / "tokenizers" / "llama3-tokenizer.model")
    assert (llama3.vocab_size, len(llama3), llama3.padding_side) == (128_000, 128_256, "right")
    assert llama3("Hello")["input_ids"] == [128_000, 9906]


def test_a_huge_length_in_the_config_is_none(tmp_path: Path, chat_folder: Path) -> None:
    for file in chat_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"model_max_length": 1000000019884624838656, "padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == "left" and tokenizer("a b", truncation=True)["attention_mask"][0] == 1
