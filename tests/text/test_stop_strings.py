"""Stop strings across piece borders, and nothing lost where there are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.text.stop_strings import StopStrings


def run(strings: list[str], pieces: list[str], *, include: bool = False) -> tuple[str, str | None]:
    stop = StopStrings(strings, include=include)
    text = "".join(stop.push(piece) for piece in pieces) + stop.flush()
    return text, stop.found


@pytest.mark.parametrize(
    ("strings", "pieces", "expected"),
    [
        (["END"], ["one EN", "D two"], ("one ", "END")),
        (["END"], ["E", "N", "E", "N", "D"], ("EN", "END")),
        (["END"], ["one EN"], ("one EN", None)),
        (["ab", "b"], ["xab"], ("x", "ab")),
        (["abcd", "c"], ["xabcd"], ("xab", "c")),
        (["\n\n"], ["a\n", "b\n", "\nc"], ("a\nb", "\n\n")),
        ([], ["any", "thing"], ("anything", None)),
    ],
)
def test_known_cases(strings: list[str], pieces: list[str], expected: tuple[str, str | None]) -> None:
    assert run(strings, pieces) == expected


def test_the_stop_string_can_be_included() -> None:
    assert run(["END"], ["one E", "ND two"], include=True) == ("one END", "END")


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_is_cut_at_the_first_match_however_it_is_split(pieces: list[str], strings: list[str]) -> None:
    whole = "".join(pieces)
    text, found = run(strings, pieces)
    ends = [(whole.find(s) + len(s), strings.index(s), s) for s in strings if s in whole]
    if found is None:
        assert text == whole and not ends
    else:
        end, _, first = min(ends)
        assert found == first and text == whole[: end - len(first)]


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=4))
def test_one_string_is_cut_at_its_first_place(whole: str, stop: str) -> None:
    text, _ = run([stop], list(whole))
    assert text == whole.split(stop)[0]


@pytest.mark.parametrize(
    ("strings", "early", "late", "expected"),
    [
        (["END"], ["EN", "D a "], ["END"], ("END a ", "END")),  # one that ended before does not count
        (["END"], ["a EN"], ["D b"], ("a ", "END")),  # one that began before does
        (["aa"], ["aaa"], ["a"], ("aa", "aa")),
        (["abcd", "bc"], ["abc"], ["x"], ("abcx", None)),
        (["abcd", "bc"], ["abc"], ["d"], ("", "abcd")),
    ],
)
def test_what_ends_in_a_piece_that_does_not_count_is_no_stop_string(
    strings: list[str], early: list[str], late: list[str], expected: tuple[str, str | None]
) -> None:
    stop = StopStrings(strings)
    text = "".join(stop.push(piece, counts=False) for piece in early)
    text += "".join(stop.push(piece) for piece in late) + stop.flush()
    assert (text, stop.found) == expected
