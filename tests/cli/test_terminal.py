"""Word wrap over a stream: what is printed, whatever the pieces, and what a terminal gets at the end."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.cli.terminal import Terminal, WordWrap

TEXTS = st.text(alphabet=st.sampled_from("ab \n\tz\u00e9\u6c34\U0001f999e\u0301"), max_size=80)


def wrapped(text: str, width: int | None, size: int = 3) -> str:
    wrap = WordWrap(width)
    pieces = [wrap.push(text[at : at + size]) for at in range(0, len(text), size)]
    return "".join([*pieces, wrap.flush()])


def terminal(columns: int | None) -> tuple[Terminal, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Terminal(out=out, err=err, columns=lambda: columns), out, err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the llama eats grass", "the llama\neats grass"),
        ("one two", "one two"),
        ("  indented text", "  indented\ntext"),
        ("a\n\nb", "a\n\nb"),
        ("kept  spaces", "kept\nspaces"),
        ("two  three", "two  three"),
        ("https://example.org/llama ok", "https://example.org/llama\nok"),
        ("go https://example.org ok", "go\nhttps://example.org\nok"),
        ("\u6c34" * 7, "\u6c34" * 5 + "\n" + "\u6c34" * 2),
        ("ends with space ", "ends with\nspace "),
    ],
)
def test_lines_break_between_words_at_ten_columns(text: str, expected: str) -> None:
    assert wrapped(text, 10) == expected


def test_without_a_width_pieces_pass_at_once() -> None:
    wrap = WordWrap(None)
    assert [wrap.push("half a wo"), wrap.push("rd"), wrap.flush()] == ["half a wo", "rd", ""]


def test_a_word_is_held_back_until_it_has_ended() -> None:
    wrap = WordWrap(20)
    assert [wrap.push("the ll"), wrap.push("ama "), wrap.flush()] == ["the", " llama", " "]


@given(TEXTS, st.integers(1, 9))
def test_pieces_do_not_matter(text: str, size: int) -> None:
    assert wrapped(text, 10, size) == wrapped(text, 10, 1000)


@given(TEXTS)
def test_only_white_space_changes_and_lines_that_fit_do_not(text: str) -> None:
    assert wrapped(text, 10).split() == text.split() or "\u6c34" in text or "\U0001f999" in text
    assert "".join(wrapped(text, 10).split()) == "".join(text.split())
    assert wrapped(text, 1000) == text


def test_a_terminal_gets_a_newline_at_the_end_and_a_pipe_does_not() -> None:
    screen, out, _ = terminal(80)
    screen.stream(["a llama", "\n"], wordwrap=True)
    screen.stream(["a ", "cria"], wordwrap=True)
    assert out.getvalue() == "a llama\na cria\n"
    pipe, out, _ = terminal(None)
    pipe.stream(["a ", "cria " * 40], wordwrap=True)
    assert out.getvalue() == "a " + "cria " * 40


def test_a_cut_answer_is_printed_so_far() -> None:
    def pieces() -> Iterator[str]:
        yield "half a wo"
        raise KeyboardInterrupt

    screen, out, _ = terminal(80)
    with pytest.raises(KeyboardInterrupt):
        screen.stream(pieces(), wordwrap=True)
    assert out.getvalue() == "half a wo\n"


def test_wrapping_can_be_off() -> None:
    screen, out, _ = terminal(20)
    screen.stream(["a long line of words that goes on"], wordwrap=False)
    assert out.getvalue() == "a long line of words that goes on\n"


def test_notices_go_to_the_other_stream() -> None:
    screen, out, err = terminal(80)
    screen.notice("full")
    assert (out.getvalue(), err.getvalue()) == ("", "full\n")
