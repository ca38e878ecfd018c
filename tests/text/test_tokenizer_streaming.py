"""Streams of ids: never half a character, and in sum always what decoding all of them at once gives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import ParameterError
from puna.text.special_split import SpecialSplitter
from puna.text.streaming import StreamDecoder
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.text.vocabulary import BYTEWISE_ERRORS, TokenizerParts


class _BytesEncoder:
    def encode(self, text: str, *, at_start: bool) -> list[int]:
        return list(text.encode())


def _byte_tokenizer() -> Tokenizer:
    """Make a tokenizer of the 256 bytes, longer tokens that cut characters anywhere, and one special."""
    extra = [b"\xf0\x9f", b"\xa6\x99", b"\x99 x", " \u00e9".encode(), b"\xe4\xbd", b"<|end|>"]
    table = [bytes([byte]) for byte in range(256)] + extra
    parts = TokenizerParts(
        tokens=[data.decode("latin-1") for data in table],
        token_bytes=table,
        encoder=_BytesEncoder(),
        special_tokens={"<|end|>": 261},
    )
    return Tokenizer(parts, Path("bytes"))


@pytest.fixture(scope="module")
def all_kinds(stories: Path) -> list[Tokenizer]:
    return [_byte_tokenizer(), load_tokenizer(stories / "hf"), load_tokenizer(stories / "gguf")]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_a_stream_adds_up_to_the_whole(all_kinds: list[Tokenizer], data: st.DataObject, skip: bool) -> None:
    for tokenizer in all_kinds:
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
        stream = tokenizer.stream(skip_special_tokens=skip)
        pieces = [stream.push(token_id) for token_id in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_a_stream_of_real_text_never_shows_half_a_character(all_kinds: list[Tokenizer], text: str) -> None:
    for tokenizer in all_kinds:
        stream = tokenizer.stream()
        pieces = [stream.push(token_id) for token_id in tokenizer.encode(text)]
        assert "\ufffd" not in "".join(pieces)
        assert stream.flush() == ""
        assert "".join(pieces) == text.replace("\u2581", " " if len(tokenizer) == 512 else "\u2581")


def test_characters_come_as_soon_as_they_are_whole() -> None:
    stream = _byte_tokenizer().stream()
    assert [stream.push(token_id) for token_id in (256, 257, 65, 259)] == ["", "\U0001f999", "A", " \u00e9"]
    assert [stream.push(token_id) for token_id in (0xE4, 0xBD)] == ["", ""]
    assert stream.push(0x41) == "\ufffdA"
    assert stream.push(256) == ""
    assert stream.flush() == "\ufffd"


def test_a_byte_that_can_be_nothing_comes_at_once() -> None:
    stream = _byte_tokenizer().stream()
    assert [stream.push(token_id) for token_id in (0xFF, 0x80, 0xC0)] == ["\ufffd", "\ufffd", "\ufffd"]


def test_broken_characters_count_by_byte_or_by_character() -> None:
    def decoded(data: bytes) -> list[str]:
        streams = [
            StreamDecoder(lambda byte: bytes([byte])),
            StreamDecoder(lambda byte: bytes([byte]), utf8_errors=BYTEWISE_ERRORS),
        ]
        return ["".join(map(stream.push, data)) + stream.flush() for stream in streams]

    assert decoded(b"\xe4\xbdA") == ["\ufffdA", "\ufffd\ufffdA"]
    assert decoded(b"\xf0\x9f\xa6") == ["\ufffd", "\ufffd\ufffd\ufffd"]
    assert decoded(b"\xed\xa0\x80") == ["\ufffd" * 3, "\ufffd" * 3]


def test_special_tokens_are_shown_or_not() -> None:
    tokenizer = _byte_tokenizer()
    shown, hidden = tokenizer.stream(skip_special_tokens=False), tokenizer.stream()
    assert [shown.push(token_id) for token_id in (65, 261)] == ["A", "<|end|>"]
    assert [hidden.push(token_id) for token_id in (65, 261)] == ["A", ""]


def test_the_leading_space_goes_once_and_stays_when_text_continues(stories: Path) -> None:
    tokenizer = load_tokenizer(stories / "hf")
    assert [tokenizer.stream().push(261), tokenizer.stream(continues=True).push(261)] == ["a", " a"]
    stream = tokenizer.stream()
    assert [stream.push(token_id) for token_id in (1, 410, 410, 261)] == ["", "", " ", " a"]
    assert tokenizer.stream(skip_special_tokens=False).push(1) == "<s>"


def test_each_push_costs_the_same(stories: Path) -> None:
    stream = load_tokenizer(stories / "hf").stream()
    start = time.process_time()
    for _ in range(200_000):
        stream.push(261)
    assert time.process_time() - start < 2  # 0.1 s


def test_ids_outside_the_vocabulary_are_named(all_kinds: list[Tokenizer]) -> None:
    for tokenizer in all_kinds:
        for token_id in (-1, len(tokenizer), 10**20):
            message = f"token id {token_id} is outside the vocabulary, 0 to {len(tokenizer) - 1}"
            for use in (tokenizer.stream().push, tokenizer.id_to_token, tokenizer.token_bytes):
                with pytest.raises(ParameterError, match=message):
                    use(token_id)
            with pytest.raises(ParameterError, match=message):
                tokenizer.decode([65, token_id])
            with pytest.raises(ParameterError, match=message):
                tokenizer.encode_parts(["a", token_id])


def test_half_a_surrogate_pair_is_named_with_its_place(all_kinds: list[Tokenizer]) -> None:
    for tokenizer in all_kinds:
        for text, place, code in (
            ("\ud800", 0, "D800"),
            ("ab\udfffc", 2, "DFFF"),
            ("\U0001f999\ud83e", 1, "D83E"),
        ):
            with pytest.raises(ParameterError, match=rf"character {place} is U\+{code}"):
                tokenizer.encode(text)
            with pytest.raises(ParameterError, match=rf"U\+{code}"):
                tokenizer.encode(text, parse_special=True)


def test_the_longest_of_the_earliest_special_tokens_is_found() -> None:
    splitter = SpecialSplitter({"<a": 1, "<ab>": 2, "<abc>": 3, "b": 4, ".*": 5})
    assert list(splitter.split("x<ab><abc><ab.*b")) == ["x", 2, 3, 1, 4, 5, 4]
    assert list(splitter.split("")) == []
    assert list(SpecialSplitter({}).split("<a")) == ["<a"]


@settings(deadline=None)
@given(
    tokens=st.lists(st.text("ab<|", min_size=1, max_size=5), min_size=1, unique=True),
    text=st.text("ab<|", max_size=30),
)
def test_splitting_equals_a_search_by_hand(tokens: list[str], text: str) -> None:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    expected: list[str | int] = []
    plain, at = "", 0
    while at < len(text):
        found = [token for token in tokens if text.startswith(token, at)]
        longest = max(found, key=len, default="")
        if longest:
            expected += [plain, ids[longest]] if plain else [ids[longest]]
            plain, at = "", at + len(longest)
        else:
            plain, at = plain + text[at], at + 1
    assert list(SpecialSplitter(ids).split(text)) == expected + ([plain] if plain else [])
