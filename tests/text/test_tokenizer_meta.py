"""Meta's tokenizer.model of Llama 3 and 4: ids as tiktoken gives them, roles, the same through GGUF."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from tiktoken.load import load_tiktoken_bpe

from hard_text import HARD_TEXTS, LONG_WORDS, any_text, word_text, write_gguf
from puna.text import tiktoken_file
from puna.text.byte_level import LLAMA3_SPLIT, LLAMA4_SPLIT, from_alphabet, merges_of_ranks, to_alphabet
from puna.text.gguf_vocab import read_gguf_vocab
from puna.text.tokenizer import Tokenizer, load_tokenizer

_FILES = {"llama3": LLAMA3_SPLIT, "llama4": LLAMA4_SPLIT}
_GOLDEN = {
    "llama3": {
        "Hello world": [9906, 1917],
        "Hello, world!": [9906, 11, 1917, 0],
        " 1234567 it's\n\n  x": [220, 4513, 10961, 22, 433, 596, 271, 220, 865],
        "user": [882],
        "assistant": [78191],
        "system": [9125],
        "ipython": [23799, 4690],
        "\n\n": [271],
    },
    "llama4": {
        "Hello world": [19873, 3817],
        "Hello, world!": [19873, 24, 3817, 13],
        " 1234567 it's\n\n  x": [220, 7235, 19596, 35, 5749, 368, 220, 831],
        "user": [1556],
        "assistant": [140680],
        "system": [15651],
        "ipython": [607, 6934],
        "\n\n": [368],
    },
}


@pytest.fixture(scope="module")
def tokenizers(test_data: Path) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(test_data / f"tokenizers/{name}-tokenizer.model") for name in _FILES}


@pytest.fixture(scope="module")
def references(test_data: Path) -> dict[str, Any]:
    return {
        name: tiktoken.Encoding(
            name,
            pat_str=split,
            mergeable_ranks=load_tiktoken_bpe(str(test_data / f"tokenizers/{name}-tokenizer.model")),
            special_tokens={},
        )
        for name, split in _FILES.items()
    }


def test_the_encoder_is_made_when_the_first_text_comes(
    test_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
        made.append(len(vocab))
        return []

    monkeypatch.setattr(tiktoken_file, "merges_of_ranks", merges)
    tokenizer = load_tokenizer(test_data / "tokenizers" / "llama3-tokenizer.model")
    assert tokenizer.decode([9906, 1917]) == "Hello world" and tokenizer.token_to_id("Hello") == 9906
    assert made == []
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello") == [128000, 9906]
    assert made == [128000]


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", _FILES)
def test_golden_ids(tokenizers: dict[str, Tokenizer], name: str) -> None:
    for text, ids in _GOLDEN[name].items():
        assert _plain(tokenizers[name], text) == ids
        assert tokenizers[name].encode(text) == [tokenizers[name].bos_token_id, *ids]
        assert tokenizers[name].decode(ids) == text


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_as_tiktoken(
    tokenizers: dict[str, Tokenizer], references: dict[str, Any], name: str, text: str
) -> None:
    ids = _plain(tokenizers[name], text)
    assert ids == references[name].encode(text, disallowed_special=())
    assert tokenizers[name].decode(ids) == text


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("strategy", [any_text, word_text], ids=["characters", "words"])
def test_found_texts_as_tiktoken(
    tokenizers: dict[str, Tokenizer], references: dict[str, Any], name: str, strategy: Any
) -> None:
    @settings(max_examples=80, deadline=None)
    @given(strategy)
    def check(text: str) -> None:
        ids = _plain(tokenizers[name], text)
        assert ids == references[name].encode(text, disallowed_special=())
        assert tokenizers[name].decode(ids) == text

    check()


@pytest.mark.parametrize("name", _FILES)
def test_every_token_means_the_same_bytes(
    tokenizers: dict[str, Tokenizer], references: dict[str, Any], name: str
) -> None:
    tokenizer, reference = tokenizers[name], references[name]
    assert [tokenizer.token_bytes(token_id) for token_id in range(reference.n_vocab)] == [
        reference.decode_single_token_bytes(token_id) for token_id in range(reference.n_vocab)
    ]


@pytest.mark.parametrize("name", _FILES)
def test_tokens_side_by_side_as_tiktoken(
    tokenizers: dict[str, Tokenizer], references: dict[str, Any], name: str
) -> None:
    """Words glued from two or three tokens reach the merges that plain prose never needs."""
    draw = random.Random(3)
    words = [
        b"".join(
            references[name].decode_single_token_bytes(draw.randrange(references[name].n_vocab))
            for _ in range(n)
        )
        for n in (1, 2, 3)
        for _ in range(600)
    ]
    for word in words:
        text = word.decode(errors="replace")
        assert _plain(tokenizers[name], text) == references[name].encode(text, disallowed_special=())


@pytest.mark.parametrize("name", _FILES)
def test_overlapping_merges_as_tiktoken(
    tokenizers: dict[str, Tokenizer], references: dict[str, Any], name: str
) -> None:
    """A token that can be cut two ways, both ways overlapping in one word: the left one must win."""
    cuts: dict[str, list[str]] = {}
    vocab = {tokenizers[name].id_to_token(token_id): token_id for token_id in range(20_000)}
    words = []
    for left, right in merges_of_ranks(vocab):
        for other in cuts.setdefault(left + right, []):  # (other, rest) is a cut further to the left
            rest = (left + right)[len(other) :]
            if left == rest:  # other + left + right: the token, and again the token
                words.append(other + left + right)
        cuts[left + right].append(left)
    assert len(words) > 50
    for word in words:
        text = from_alphabet(word).decode(errors="replace")
        assert _plain(tokenizers[name], text) == references[name].encode(text, disallowed_special=())


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("kind", LONG_WORDS)
def test_very_long_words_take_linear_time(tokenizers: dict[str, Tokenizer], name: str, kind: str) -> None:
    start = time.process_time()
    ids = _plain(tokenizers[name], LONG_WORDS[kind])
    assert time.process_time() - start < 2  # 0.2 s; quadratic would be minutes
    assert tokenizers[name].decode(ids) == LONG_WORDS[kind]


def test_llama3_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama3"]
    assert tokenizer.vocab_size == len(tokenizer) == 128_256
    names = {
        128_000: "<|begin_of_text|>",
        128_001: "<|end_of_text|>",
        128_002: "<|reserved_special_token_0|>",
        128_004: "<|finetune_right_pad_id|>",
        128_005: "<|reserved_special_token_2|>",
        128_006: "<|start_header_id|>",
        128_007: "<|end_header_id|>",
        128_008: "<|eom_id|>",
        128_009: "<|eot_id|>",
        128_010: "<|python_tag|>",
        128_011: "<|reserved_special_token_3|>",
        128_255: "<|reserved_special_token_247|>",
    }
    assert {token_id: tokenizer.id_to_token(token_id) for token_id in names} == names
    assert sorted(tokenizer.special_tokens.values()) == list(range(128_000, 128_256))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        128_000,
        128_001,
        128_004,
    )
    assert tokenizer.eos_token_ids == {128_001, 128_008, 128_009}
    assert tokenizer.unk_token_id is None
    assert tokenizer.add_bos
    assert tokenizer.chat_template is None


def test_llama4_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama4"]
    assert tokenizer.vocab_size == 202_048
    names = {
        200_000: "<|begin_of_text|>",
        200_001: "<|end_of_text|>",
        200_005: "<|header_start|>",
        200_006: "<|header_end|>",
        200_007: "<|eom|>",
        200_008: "<|eot|>",
        200_015: "<|text_post_train_reserved_special_token_5|>",
        200_016: "<|python_start|>",
        200_017: "<|python_end|>",
        200_018: "<|finetune_right_pad|>",
        200_019: "<|text_post_train_reserved_special_token_8|>",
        200_079: "<|text_post_train_reserved_special_token_68|>",
        200_080: "<|image_start|>",
        200_083: "<|vision_reserved_special_token_1|>",
        200_090: "<|image|>",
        200_091: "<|vision_reserved_special_token_6|>",
        200_092: "<|patch|>",
        201_133: "<|vision_reserved_special_token_1047|>",
        201_142: "<|reasoning_thinking_start|>",
        201_144: "<|reserved_special_token_0|>",
        202_047: "<|reserved_special_token_903|>",
    }
    assert {token_id: tokenizer.id_to_token(token_id) for token_id in names} == names
    assert sorted(tokenizer.special_tokens.values()) == list(range(200_000, 202_048))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        200_000,
        200_001,
        200_018,
    )
    assert tokenizer.eos_token_ids == {200_001, 200_007, 200_008}


@pytest.mark.parametrize("name", _FILES)
def test_special_strings_are_plain_text_unless_asked_for(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    text = "".join(tokenizer.special_tokens)
    ids = _plain(tokenizer, text)
    assert max(ids) < min(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text
    parsed = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
    assert parsed == list(tokenizer.special_tokens.values())
    assert tokenizer.decode(parsed) == text
    assert tokenizer.decode(parsed, skip_special_tokens=True) == ""


def test_a_prompt_of_parts_joins_texts_that_meet(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama3"]
    parts = [
        *tokenizer.split_special("<|start_header_id|>user<|end_header_id|>\n\n"),
        "\n<|eot_id|> hi",
        128_009,
    ]
    assert tokenizer.encode_parts(parts) == [
        128_006,
        882,
        128_007,
        *_plain(tokenizer, "\n\n\n<|eot_id|> hi"),
        128_009,
    ]
    assert tokenizer.encode_parts(["a"], add_special_tokens=True) == tokenizer.encode("a")


def test_near_misses_of_special_tokens_take_linear_time(tokenizers: dict[str, Tokenizer]) -> None:
    text = "<|reserved_special_token_" * 20_000
    start = time.process_time()
    assert tokenizers["llama4"].split_special(text) == [text]
    assert time.process_time() - start < 1


def _gguf_keys(tokens: list[str], size: int, pre: str) -> dict[str, Any]:
    vocab = {token: token_id for token_id, token in enumerate(tokens[:size])}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1 if token_id < size else 3 for token_id in range(len(tokens))],
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges_of_ranks(vocab)],
        "tokenizer.ggml.bos_token_id": size,
        "tokenizer.ggml.eos_token_id": size + 1,
        "tokenizer.ggml.add_bos_token": True,
    }


@pytest.mark.slow
def test_the_same_vocabulary_inside_gguf(tokenizers: dict[str, Tokenizer]) -> None:
    direct = tokenizers["llama3"]
    tokens = [direct.id_to_token(token_id) for token_id in range(len(direct))]
    path = Path("vocab.gguf")
    inside = Tokenizer(read_gguf_vocab(path, _gguf_keys(tokens, 128_000, "llama-bpe")), path)
    for text in HARD_TEXTS:
        assert inside.encode(text) == direct.encode(text)
        assert inside.encode(text, parse_special=True) == direct.encode(text, parse_special=True)
    assert inside.special_tokens == direct.special_tokens
    assert inside.eos_token_ids == direct.eos_token_ids
    assert [inside.token_bytes(i) for i in range(len(inside))] == [
        direct.token_bytes(i) for i in range(len(direct))
    ]


@pytest.mark.parametrize(
    ("name", "pre"), [("llama3", "llama3"), ("llama3", "llama-v3"), ("llama4", "llama4")]
)
def test_a_small_vocabulary_only_gguf_file(
    tokenizers: dict[str, Tokenizer], references: dict[str, Any], tmp_path: Path, name: str, pre: str
) -> None:
    """The first 3,000 ranks are a tokenizer of their own."""
    ranks = {references[name].decode_single_token_bytes(rank): rank for rank in range(3000)}
    tokens = [tokenizers[name].id_to_token(token_id) for token_id in range(3000)]
    keys = _gguf_keys([*tokens, "<|begin_of_text|>", "<|eot|>"], 3000, pre)
    write_gguf(tmp_path / "vocab.gguf", keys)
    inside = load_tokenizer(tmp_path)
    reference = tiktoken.Encoding("small", pat_str=_FILES[name], mergeable_ranks=ranks, special_tokens={})
    for text in HARD_TEXTS:
        assert _plain(inside, text) == reference.encode(text, disallowed_special=())
    assert inside.special_tokens == {"<|begin_of_text|>": 3000, "<|eot|>": 3001}
    assert inside.encode("<|eot|>", parse_special=True) == [3000, 3001]


def test_the_byte_alphabet_is_a_bijection() -> None:
    every = bytes(range(256))
    assert len(set(to_alphabet(every))) == 256
    assert from_alphabet(to_alphabet(every)) == every
    assert to_alphabet(b"a \n\xff") == "a\u0120\u010a\u00ff"
    assert from_alphabet("two words") == b"two words"
