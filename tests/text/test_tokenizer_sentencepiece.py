"""SentencePiece vocabularies, from tokenizer.model and GGUF: ids as the sentencepiece library gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from hard_text import HARD_TEXTS, LONG_WORDS, any_text, word_text, write_gguf
from puna.errors import TokenizerError
from puna.gguf_header import read_metadata
from puna.text.sentencepiece_model import PieceType, parse_model
from puna.text.tokenizer import Tokenizer, load_tokenizer

MakeFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def reference(stories: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(stories / "hf/tokenizer.model"))


@pytest.fixture(scope="module")
def three_formats(stories: Path) -> list[Tokenizer]:
    return [load_tokenizer(stories / name) for name in ("hf", "meta", "gguf")]


@pytest.fixture
def make_folder(stories: Path, tmp_path: Path) -> MakeFolder:
    """Return a function that makes a folder with the stories' tokenizer.model and a tokenizer_config.json."""

    def make(**config: Any) -> Path:
        shutil.copy(stories / "hf/tokenizer.model", tmp_path)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        text = json.dumps({"tokenizer_class": "LlamaTokenizer", **names, **config})
        (tmp_path / "tokenizer_config.json").write_text(text)
        return tmp_path

    return make


def test_the_three_formats_write_the_golden_story(stories: Path, three_formats: list[Tokenizer]) -> None:
    ids = json.loads((stories / "golden_ids.json").read_text())
    story = (stories / "golden.txt").read_text()
    for tokenizer in three_formats:
        assert tokenizer.decode(ids, skip_special_tokens=True) == story
        assert tokenizer.decode(ids) == "<s> " + story
        assert tokenizer.encode(story) == ids[: len(tokenizer.encode(story))]
        assert tokenizer.encode("") == [1]


def test_roles_of_the_three_formats(three_formats: list[Tokenizer]) -> None:
    for tokenizer in three_formats:
        assert tokenizer.vocab_size == 512
        assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert tokenizer.pad_token_id is None
        assert tokenizer.eos_token_ids == {2}
        assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
        assert tokenizer.add_bos
        assert tokenizer.id_to_token(261) == "\u2581a"
        assert tokenizer.token_to_id("\u2581a") == 261
        assert tokenizer.token_to_id("no such token") is None
        assert tokenizer.token_bytes(261) == b" a"
        assert tokenizer.token_bytes(3 + 0xE9) == b"\xe9"


@pytest.mark.parametrize("text", [*HARD_TEXTS, *LONG_WORDS.values()], ids=lambda text: ascii(text[:12]))
def test_hard_texts_as_sentencepiece(three_formats: list[Tokenizer], reference: Any, text: str) -> None:
    expected = reference.encode(text)
    for tokenizer in three_formats:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == expected
        assert tokenizer.decode(ids) == reference.decode(expected) == text.replace("\u2581", " ")


@settings(max_examples=80, deadline=None)
@given(text=st.one_of(any_text, word_text))
def test_found_texts_as_sentencepiece(three_formats: list[Tokenizer], reference: Any, text: str) -> None:
    expected = reference.encode(text)
    for tokenizer in three_formats:
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(expected) == text.replace("\u2581", " ")


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(3, 258), st.integers(259, 511)), max_size=20))
def test_broken_bytes_as_sentencepiece(
    three_formats: list[Tokenizer], reference: Any, ids: list[int]
) -> None:
    if ids[:1] == [3 + 0x20]:  # a space that is no U+2581: only sentencepiece keeps it
        ids = ids[1:]
    for tokenizer in three_formats:
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_every_piece_decodes_as_sentencepiece(three_formats: list[Tokenizer], reference: Any) -> None:
    for tokenizer in three_formats:
        for token_id in range(3, 512):
            assert tokenizer.decode([261, token_id]) == reference.decode([261, token_id])


@pytest.mark.parametrize("legacy", [True, False])
def test_a_folder_as_transformers(make_folder: MakeFolder, legacy: bool) -> None:
    """All but texts that begin with a space, to which Transformers 5 alone adds none."""
    folder = make_folder(legacy=legacy)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    specials = ["Hello <s>.", "a</s>b", "<s>[INST] x [/INST] y </s><s>[INST] z", "</s>", "x<s><s>"]
    for text in (*HARD_TEXTS, *specials):
        if not text.startswith((" ", "\u2581", "<s> ")) and "<s> " not in text:
            assert ours.encode(text, parse_special=True) == theirs.encode(text)
            assert ours.decode(ours.encode(text)) == theirs.decode(
                theirs.encode(text, split_special_tokens=True)
            )
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_the_space_after_a_special_token(make_folder: MakeFolder, three_formats: list[Tokenizer]) -> None:
    """Legacy, GGUF and Meta put U+2581 in front of each text; without legacy only the first gets one."""
    hf, meta, gguf = three_formats
    for tokenizer in (hf, meta, gguf, load_tokenizer(make_folder(legacy=True))):
        tokens = [tokenizer.id_to_token(i) for i in tokenizer.encode("Hello<s>a", parse_special=True)]
        assert tokens == ["<s>", "\u2581He", "ll", "o", "<s>", "\u2581a"]
    modern = load_tokenizer(make_folder(legacy=False))
    assert modern.encode("Hello<s>a", parse_special=True)[-2:] == [1, modern.token_to_id("a")]
    assert modern.encode("<s>a", parse_special=True, add_special_tokens=False) == [1, modern.token_to_id("a")]
    assert modern.encode("a", add_special_tokens=False) == [modern.token_to_id("\u2581a")]
    assert load_tokenizer(make_folder()).encode("<s>a", parse_special=True)[-1] == modern.token_to_id("a")


def test_no_prefix_where_the_config_says_so(make_folder: MakeFolder) -> None:
    tokenizer = load_tokenizer(make_folder(add_prefix_space=False))
    assert tokenizer.encode("a") == [1, tokenizer.token_to_id("a")]
    assert tokenizer.decode(tokenizer.encode(" a"), skip_special_tokens=True) == " a"


def test_bos_and_eos_where_the_config_says_so(make_folder: MakeFolder) -> None:
    assert load_tokenizer(make_folder(add_bos_token=False, add_eos_token=True)).encode("a") == [261, 2]
    assert load_tokenizer(make_folder(add_bos_token=None)).encode("a") == [1, 261]


def test_added_tokens_are_matched_and_special_ones_only_when_asked_for(make_folder: MakeFolder) -> None:
    folder = make_folder(
        added_tokens_decoder={"512": {"content": "<|im_start|>", "special": True}, "513": {"content": "wow"}},
        pad_token="<pad>",
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 515
    assert tokenizer.pad_token_id == tokenizer.token_to_id("<pad>") == 514
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 512, "<pad>": 514}
    assert 512 not in tokenizer.encode("<|im_start|>")
    assert tokenizer.encode("<|im_start|>", parse_special=True) == [1, 512]
    assert tokenizer.encode("wow", add_special_tokens=False) == [513]
    assert tokenizer.decode([1, 512, 513, 514], skip_special_tokens=True) == "wow"


def test_a_piece_that_the_config_calls_special_is_out_of_reach(make_folder: MakeFolder) -> None:
    tokenizer = load_tokenizer(make_folder(additional_special_tokens=["\u2581the"]))
    assert tokenizer.special_tokens["\u2581the"] == tokenizer.token_to_id("\u2581the")
    assert tokenizer.token_to_id("\u2581the") not in tokenizer.encode("the")


def test_added_tokens_out_of_place_are_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(TokenizerError, match=r"'x<' has the id 600 in the files beside it, not 512"):
        load_tokenizer(make_folder(added_tokens_decoder={"600": {"content": "x<"}}))


def test_a_model_survives_writing(stories: Path) -> None:
    path = stories / "hf/tokenizer.model"
    model = parse_model(path, path.read_bytes())
    assert parse_model(path, model.to_bytes()) == model
    assert len(model.pieces) == 512
    assert model.pieces[0].type is PieceType.UNKNOWN
    assert (model.byte_fallback, model.add_dummy_prefix, model.remove_extra_whitespaces) == (
        True,
        True,
        False,
    )


def test_pieces_of_equal_score_merge_from_the_left(stories: Path, tmp_path: Path) -> None:
    path = stories / "hf/tokenizer.model"
    model = parse_model(path, path.read_bytes())
    flat = replace(model, pieces=tuple(replace(piece, score=0.0) for piece in model.pieces), pad_id=7)
    (tmp_path / "tokenizer.model").write_bytes(flat.to_bytes())
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_proto=flat.to_bytes())
    for text in HARD_TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
    assert tokenizer.pad_token_id == 7


def test_our_fields_are_those_of_the_real_schema(stories: Path) -> None:
    path = stories / "hf/tokenizer.model"
    model = replace(
        parse_model(path, path.read_bytes()), charsmap=b"abc", remove_extra_whitespaces=True, bos_id=-1
    )
    theirs = sentencepiece_model_pb2.ModelProto()
    theirs.ParseFromString(model.to_bytes())
    assert [(p.piece, p.score, p.type) for p in theirs.pieces] == [
        (p.token, p.score, p.type) for p in model.pieces
    ]
    assert theirs.trainer_spec.model_type == theirs.trainer_spec.BPE
    assert theirs.trainer_spec.byte_fallback
    assert (theirs.trainer_spec.bos_id, theirs.trainer_spec.eos_id, theirs.trainer_spec.pad_id) == (-1, 2, -1)
    assert theirs.normalizer_spec.precompiled_charsmap == b"abc"
    assert theirs.normalizer_spec.remove_extra_whitespaces
    assert parse_model(path, theirs.SerializeToString()) == model


def _stories_keys(stories: Path) -> dict[str, Any]:
    keys = read_metadata(stories / "gguf/stories260k-f32.gguf")
    return {key: value for key, value in keys.items() if key.startswith("tokenizer.")}


def test_gguf_user_defined_tokens_are_always_matched(stories: Path, tmp_path: Path) -> None:
    """As llama.cpp: they are cut out of any text, and the text after one gets the space in front."""
    keys: dict[str, Any] = _stories_keys(stories)
    keys["tokenizer.ggml.tokens"] += ["<|x|>", "<|im_end|>"]
    keys["tokenizer.ggml.scores"] += [-1000.0, -1000.0]
    keys["tokenizer.ggml.token_type"] += [4, 4]
    keys["tokenizer.ggml.add_eos_token"] = True
    keys["tokenizer.chat_template"] = "default one"
    keys["tokenizer.chat_template.tool_use"] = "another"
    write_gguf(tmp_path / "v.gguf", keys)
    tokenizer = load_tokenizer(tmp_path / "v.gguf")
    assert tokenizer.encode("a<|x|>a<|im_end|>")[:5] == [1, 261, 512, 261, tokenizer.token_to_id("<")]
    assert tokenizer.encode("a<|x|>a<|im_end|>", parse_special=True) == [1, 261, 512, 261, 513, 2]
    assert tokenizer.decode([512, 261]) == "<|x|> a"
    assert tokenizer.eos_token_ids == {2, 513}
    assert tokenizer.chat_template == "default one"
    assert tokenizer.chat_templates == {"default": "default one", "tool_use": "another"}


def test_gguf_without_types_scores_and_roles_takes_the_defaults(stories: Path, tmp_path: Path) -> None:
    names = ("model", "tokens")
    keys = {f"tokenizer.ggml.{name}": _stories_keys(stories)[f"tokenizer.ggml.{name}"] for name in names}
    write_gguf(tmp_path / "v.gguf", keys)
    tokenizer = load_tokenizer(tmp_path / "v.gguf")
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.decode(tokenizer.encode("\u4f60 a"), skip_special_tokens=True) == "\u4f60 a"


def test_gguf_tokens_that_are_raw_bytes(stories: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = _stories_keys(stories)
    keys["tokenizer.ggml.tokens"] = [token.encode() for token in keys["tokenizer.ggml.tokens"]] + [
        b"\xff\xfe"
    ]
    keys["tokenizer.ggml.scores"] += [0.0]
    keys["tokenizer.ggml.token_type"] += [1]
    write_gguf(tmp_path / "v.gguf", keys)
    tokenizer = load_tokenizer(tmp_path / "v.gguf")
    assert tokenizer.token_bytes(512) == b"\xff\xfe"
    assert tokenizer.id_to_token(512) == "\ufffd\ufffd"
    assert tokenizer.decode([261, 512]) == "a\ufffd\ufffd"
