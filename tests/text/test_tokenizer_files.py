"""Finding the tokenizer in a folder, and damaged files of every kind: an error that names file and place."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import CheckpointError, ModelNotFoundError, TokenizerError
from puna.gguf_header import read_metadata
from puna.text.byte_level import BYTE_ALPHABET
from puna.text.gguf_vocab import read_gguf_vocab
from puna.text.sentencepiece_model import Piece, PieceType, SentencePieceModel, parse_model
from puna.text.tokenizer import load_tokenizer

_ALPHABET = [bytes([byte]) for byte in range(256)]


def _tiktoken_lines(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def test_a_folder_prefers_tokenizer_json(stories: Path, tmp_path: Path) -> None:
    shutil.copy(stories / "gguf/stories260k-f32.gguf", tmp_path)
    assert load_tokenizer(tmp_path).path.suffix == ".gguf"
    shutil.copy(stories / "hf/tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path).path.name == "tokenizer.model"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_metas_sizes_may_share_one_tokenizer(stories: Path, tmp_path: Path) -> None:
    shutil.copy(stories / "meta/tokenizer.model", tmp_path)
    (tmp_path / "llama-2-7b").mkdir()
    (tmp_path / "llama-2-7b/params.json").write_text("{}")
    assert load_tokenizer(tmp_path / "llama-2-7b").path == tmp_path / "tokenizer.model"


def test_a_split_gguf_is_read_from_its_first_part(stories: Path, tmp_path: Path) -> None:
    shutil.copy(stories / "gguf/stories260k-f32.gguf", tmp_path / "x-00001-of-00002.gguf")
    (tmp_path / "x-00002-of-00002.gguf").write_bytes(b"")
    assert load_tokenizer(str(tmp_path)).vocab_size == 512
    (tmp_path / "y.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"several .gguf files.*x-00001-of-00002.gguf, y.gguf"):
        load_tokenizer(tmp_path)


def test_a_gguf_file_needs_no_suffix(stories: Path, tmp_path: Path) -> None:
    """Ollama names its files by their digests."""
    shutil.copy(stories / "gguf/stories260k-f32.gguf", tmp_path / "sha256-0123")
    assert load_tokenizer(tmp_path / "sha256-0123").encode("a") == [1, 261]


@pytest.mark.parametrize("key", ["normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens"])
def test_deep_nesting_is_refused(tmp_path: Path, key: str) -> None:
    kinds = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    inner = kinds.get(key, "processors")
    depth = 480
    nested = f'{{"type": "Sequence", "{inner}": [' * depth + "]}" * depth
    vocab = json.dumps({character: byte for byte, character in enumerate(BYTE_ALPHABET)})
    model = f'{{"type": "BPE", "merges": [], "vocab": {vocab}}}'
    (tmp_path / "tokenizer.json").write_text(f'{{"model": {model}, "{key}": {nested}}}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        load_tokenizer(tmp_path)


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer.json, no tokenizer.model and no .gguf file"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_reading_tokenizers_needs_no_torch() -> None:
    code = "import sys, puna.text.tokenizer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 tokens; Llama 3's file has 128000, Llama 4's 200000"),
        (_tiktoken_lines(_ALPHABET), "256 tokens; Llama 3's file"),
        (b"IQ== 0\nIg= 1\n", "line 2: not base64"),
        (b"IQ== 0\nI!g== 1\n", "line 2: not base64"),
        (b"IQ== 0\nIg== 2\n", "line 2: rank '2' where 1 is expected"),
        (b"IQ== 0\nIg== one\n", "line 2: rank 'one' where 1 is expected"),
        (b"IQ== 0\nIg==\n", "line 2: rank '' where 1 is expected"),
        (b"IQ== 0\nIQ== 1\n", "line 2 repeats the token of line 1"),
        (b" 0\n", "line 1: a token has 1 to 65536 characters, this one 0"),
        (
            base64.b64encode(b"x" * 70_000) + b" 0\n",
            "line 1: a token has 1 to 65536 characters, this one 70000",
        ),
        (b"IQ== 0\n\nIg== 1\n", "line 2: rank '' where 1 is expected"),
        (b"\xff\xfe\x00", "line 1: not base64"),
        (b"version https://git-lfs.github.com/spec/v1\n", "line 1: not base64"),
        (b"<html>", "line 1: not base64"),
    ],
)
def test_damaged_tiktoken_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(caught.value)


def _model(**changes: Any) -> SentencePieceModel:
    pieces = [Piece(text=b"<unk>", score=0, type=PieceType.UNKNOWN)]
    pieces += [Piece(text=name, score=0, type=PieceType.CONTROL) for name in (b"<s>", b"</s>")]
    pieces += [Piece(text=b"<0x%02X>" % byte, score=0, type=PieceType.BYTE) for byte in range(256)]
    pieces += [
        Piece(text=b"a", score=-1, type=PieceType.NORMAL),
        Piece(text=b"aa", score=0, type=PieceType.NORMAL),
    ]
    model = SentencePieceModel(
        pieces=tuple(pieces),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        byte_fallback=True,
        add_dummy_prefix=True,
    )
    return replace(model, **changes)


def _with_piece(**changes: Any) -> SentencePieceModel:
    model = _model()
    return replace(model, pieces=(*model.pieces[:-1], replace(model.pieces[-1], **changes)))


def test_a_minimal_model_is_fine(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(_model().to_bytes())
    assert load_tokenizer(tmp_path).encode("aaa") == [1, 3 + 0xE2, 3 + 0x96, 3 + 0x81, 260, 259]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n", "a number that does not end at byte 1"),
        (b"\n\x7f", "a field of 127 bytes where 0 are left at byte 0"),
        (
            b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            "a field of 18446744073709551615 bytes where 0",
        ),
        (b"\n" + b"\xff" * 20, "a number that does not end at byte 1"),
        (b"\n\x00\x0f", "the unknown wire type 7 at byte 2"),
        (b"\n\x02\x18\x09", "a SentencePiece model of type 1; every Llama has BPE"),
        (_model().to_bytes() + b"\x12\x02\x18\x01", "a SentencePiece model of type 1"),
        (_model().to_bytes()[:-3], "at byte "),
        (_model().to_bytes() + b"\x12\x05\x18\x02\xc0\x01\x01", "spaces as suffixes"),
        (_model().to_bytes() + b"\x1a\x02\x28\x00", "spaces as suffixes, or not escaped"),
        (_model().to_bytes() + b"\x08\x05", "field 1 is no message"),
        (_model().to_bytes() + b"\x0a\x02\x18\x09", "piece 261 is of the unknown type 9"),
        (_model().to_bytes() + b"\x0a\x02\x0a\x00", "piece 261: a token has 1 to 65536"),
        (_model(pieces=()).to_bytes(), "."),
        (_with_piece(text=b"a").to_bytes(), "piece 260 repeats piece 259, 'a'"),
        (_with_piece(score=float("nan")).to_bytes(), "the score of piece 260 is nan"),
        (_with_piece(type=PieceType.UNKNOWN).to_bytes(), "SentencePiece refuses the model"),
        (_with_piece(type=PieceType.BYTE).to_bytes(), "SentencePiece refuses the model"),
        (_model(byte_fallback=False).to_bytes(), "SentencePiece refuses the model"),
        (_model(bos_id=999).to_bytes(), "bos_token_id is 999; the vocabulary has ids 0 to 260"),
        (_model(eos_id=261).to_bytes(), "eos_token_id is 261; the vocabulary has ids 0 to 260"),
    ],
)
def test_damaged_sentencepiece_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(caught.value)


_SERIALISED = replace(_model(), pieces=_model().pieces[-4:]).to_bytes()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error_or_a_model(data: st.DataObject) -> None:
    content = bytearray(_SERIALISED)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    for damaged in (bytes(content), bytes(content[:cut])):
        try:
            assert len(parse_model(Path("x"), damaged).pieces) > 0
        except TokenizerError as error:
            assert str(error).startswith("x: ")


Keys = dict[str, Any]


@pytest.fixture
def spm_keys(stories: Path) -> Keys:
    return dict(read_metadata(stories / "gguf/stories260k-f32.gguf"))


def _bpe_keys() -> Keys:
    tokens = [*BYTE_ALPHABET, "ab", "abc", "<|begin_of_text|>", "<|eot_id|>", "[PAD260]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3, 3, 5],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 259,
    }


def _load_bpe(**changes: Any) -> Any:
    keys = _bpe_keys() | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return read_gguf_vocab(Path("v.gguf"), {key: value for key, value in keys.items() if value is not None})


def test_a_small_bpe_vocabulary() -> None:
    parts = _load_bpe()
    a, space = BYTE_ALPHABET.index("a"), BYTE_ALPHABET.index("\u0120")
    assert parts.encoder.encode("abcab a", at_start=True) == [257, 256, space, a]
    assert parts.encoder.encode("[PAD260]", at_start=True)[-1] == ord("]")
    assert (parts.prefix_ids, parts.suffix_ids) == ((258,), ())
    assert parts.eos_token_ids == {259}
    assert parts.pad_token_id is None
    assert parts.token_bytes[258] == b"<|begin_of_text|>"
    assert _load_bpe(pre="llama4").prefix_ids == ()
    assert _load_bpe(pre="gpt-2", add_eos_token=True).suffix_ids == (259,)
    assert _load_bpe(eot_token_id=3, eom_token_id=4, padding_token_id=260).eos_token_ids == {3, 4, 259}


def test_a_bpe_vocabulary_without_types() -> None:
    assert _load_bpe(token_type=None).special_tokens == {"<|begin_of_text|>": 258, "<|eot_id|>": 259}


@pytest.mark.parametrize(
    ("pre", "text", "parts"),
    [
        ("llama-bpe", "1234 it's", ["123", "4", " it", "'s"]),
        ("smaug-bpe", "1234 it's", ["123", "4", " it", "'s"]),
        ("gpt-2", "1234 it's", ["1234", " it", "'s"]),
        ("smollm", "1234 it's", ["1", "2", "3", "4", " it", "'s"]),
        ("default", "1234 it's", ["123", "4", " it", "'", "s"]),
        (None, "12a", ["12", "a"]),
        ("llama4", "HTTPServer it's", ["HTTPServer", " it's"]),
        ("gpt-4o", "fooBar", ["foo", "Bar"]),
    ],
)
def test_names_of_split_patterns(pre: str | None, text: str, parts: list[str]) -> None:
    """With every merge known, the ids that come out are the parts that the pattern cut."""
    words = {part.replace(" ", "\u0120") for part in parts}
    tokens = [*BYTE_ALPHABET]
    merges = []
    for word in sorted(
        {whole[:n] for whole in (*words, text.replace(" ", "\u0120")) for n in range(2, 20)}, key=len
    ):
        if len(word) > 1 and word not in tokens:
            tokens.append(word)
            merges.append(f"{word[:-1]} {word[-1]}")
    vocabulary = _load_bpe(
        pre=pre, tokens=tokens, merges=merges, token_type=None, bos_token_id=None, eos_token_id=None
    )
    ids = vocabulary.encoder.encode(text, at_start=True)
    assert [vocabulary.token_bytes[token_id].decode() for token_id in ids] == parts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'; known for Llama models: llama-bpe"),
        ({"tokens": []}, "tokenizer.ggml.tokens is missing or empty"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing or empty"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is no list of the right kind"),
        ({"tokens": [1] * 261}, "tokenizer.ggml.tokens is no list of the right kind"),
        ({"token_type": [1] * 5}, "tokenizer.ggml.token_type has 5 values for 261 tokens"),
        ({"token_type": [9] * 261}, "tokenizer.ggml.token_type of token 0 is 9"),
        ({"token_type": [-1] * 261}, "tokenizer.ggml.token_type of token 0 is -1"),
        ({"token_type": [1.0] * 261}, "tokenizer.ggml.token_type is no list of the right kind"),
        ({"merges": None}, "tokenizer.ggml.merges is missing or empty"),
        ({"merges": ["ab"]}, r"tokenizer.ggml.merges\[0\] is 'ab'"),
        ({"merges": ["a b", "a "]}, r"tokenizer.ggml.merges\[1\] is 'a '"),
        ({"merges": ["a c"]}, "merge 0, 'a' 'c': not three known tokens"),
        ({"merges": [5]}, "tokenizer.ggml.merges is no list of the right kind"),
        ({"bos_token_id": 261}, "tokenizer.ggml.bos_token_id is 261; ids are 0 to 260"),
        ({"eos_token_id": -1}, "tokenizer.ggml.eos_token_id is -1"),
        ({"eot_token_id": True}, "tokenizer.ggml.eot_token_id is True"),
        ({"padding_token_id": 10**9}, "tokenizer.ggml.padding_token_id is 1000000000"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is 1; true or false"),
        (
            {"tokens": [*BYTE_ALPHABET, "ab", "ab", "x1", "x2", "x3"]},
            r"tokens\[257\] repeats token 256, 'ab'",
        ),
        ({"tokens": [*BYTE_ALPHABET, "ab", "", "x1", "x2", "x3"]}, r"tokens\[257\]: a token has 1 to 65536"),
        (
            {"tokens": [*BYTE_ALPHABET[1:], *["ab", "abc", "1x", "2x", "3x", "4x"]]},
            "no token for the single byte 0x00",
        ),
        (
            {"tokens": [*BYTE_ALPHABET, "ab", "\udcff", "1x", "2x", "3x"], "merges": ["a b"]},
            "token 257 is not UTF-8",
        ),
    ],
)
def test_damaged_bpe_vocabularies_in_gguf(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        _load_bpe(**changes)
    assert str(caught.value).startswith("v.gguf: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys["tokenizer.ggml.scores"].pop(), "scores has 511 values for 512 tokens"),
        (
            lambda keys: keys["tokenizer.ggml.token_type"].append(1),
            "token_type has 513 values for 512 tokens",
        ),
        (
            lambda keys: keys["tokenizer.ggml.scores"].__setitem__(300, float("inf")),
            "score of piece 300 is inf",
        ),
        (lambda keys: keys["tokenizer.ggml.tokens"].__setitem__(300, ""), "piece 300: a token has 1"),
        (lambda keys: keys["tokenizer.ggml.tokens"].__setitem__(300, "he"), "piece 300 repeats piece 260"),
        (lambda keys: keys["tokenizer.ggml.token_type"].__setitem__(9, 1), "SentencePiece refuses the model"),
        (lambda keys: keys.update({"tokenizer.chat_template": 5}), "tokenizer.chat_template is no string"),
        (
            lambda keys: keys.update({"tokenizer.ggml.bos_token_id": 512}),
            "bos_token_id is 512; ids are 0 to 511",
        ),
    ],
)
def test_damaged_sentencepiece_vocabularies_in_gguf(
    spm_keys: Keys, change: Callable[[Keys], Any], message: str
) -> None:
    change(spm_keys)
    with pytest.raises(TokenizerError, match=message) as caught:
        read_gguf_vocab(Path("v.gguf"), spm_keys)
    assert str(caught.value).startswith("v.gguf: ")


def test_a_damaged_gguf_container(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        load_tokenizer(tmp_path / "x.gguf")


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    key=st.sampled_from(
        ["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"]
    ),
)
def test_any_value_in_tokenizer_json_is_an_error_or_fine(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    vocab = {character: byte for byte, character in enumerate(BYTE_ALPHABET)}
    data = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "decoder": {"type": "ByteLevel"}}
    path = tmp_path_factory.mktemp("any") / "tokenizer.json"
    path.write_text(json.dumps(data | {key: value}))
    try:
        assert load_tokenizer(path).vocab_size >= 256
    except TokenizerError as error:
        assert str(error).startswith(str(path))
