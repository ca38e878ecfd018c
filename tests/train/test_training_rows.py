"""Kinds of rows, seen from their keys, and errors that name file and line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from puna.errors import ModelNotFoundError, ParameterError, UnsupportedError
from puna.train.data_files import Record, read_records
from puna.train.rows import ChatRow, PairRow, Row, TextRow, read_rows

ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def rows_of(*values: dict[str, Any]) -> list[Row]:
    return read_rows([Record(values=v, place=f"d.jsonl:{n}") for n, v in enumerate(values, start=1)])


def test_weights_of_messages() -> None:
    messages = [ASK, {**ANSWER, "weight": 0}, ASK, {**ANSWER, "weight": 1}, ASK, ANSWER]
    (row,) = rows_of({"messages": messages})
    assert isinstance(row, ChatRow)
    assert row.trained == [False, False, False, True, False, True]
    assert row.messages == [ASK, ANSWER] * 3
    for wrong in ({**ANSWER, "weight": 0.5}, {**ANSWER, "weight": True}, {**ASK, "weight": 1}):
        with pytest.raises(ParameterError, match=r"d.jsonl:2: messages\[1\].*weight"):
            rows_of({"messages": [ASK, ANSWER]}, {"messages": [ASK, wrong]})


def test_prompt_and_completion() -> None:
    text, chat = rows_of({"prompt": "1+1=", "completion": "2"}, {"prompt": [ASK], "completion": [ANSWER]})
    assert text == TextRow(place="d.jsonl:1", prompt="1+1=", text="2")
    assert isinstance(chat, ChatRow) and chat.trained == [False, True]
    # An answer in the prompt is not trained.
    (row,) = rows_of({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]})
    assert isinstance(row, ChatRow) and row.trained == [False, False, False, True]


def test_alpaca() -> None:
    values = {
        "instruction": "Sum",
        "input": "1 2",
        "output": "3",
        "system": "Be brief",
        "history": [["a", "b"]],
    }
    (row,) = rows_of(values)
    assert isinstance(row, ChatRow)
    assert [(m["role"], m["content"]) for m in row.messages] == [
        ("system", "Be brief"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Sum\n1 2"),
        ("assistant", "3"),
    ]
    assert row.trained == [False, False, True, False, True]
    (plain,) = rows_of({"instruction": "Sum", "input": "", "output": "3"})
    assert isinstance(plain, ChatRow) and plain.messages[0]["content"] == "Sum"


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Puno"}}'},
        {"from": "observation", "value": "cold"},
        {"from": "gpt", "value": "Cold."},
    ]
    (row,) = rows_of({"conversations": turns, "system": "s", "tools": '[{"name": "weather"}]'})
    assert isinstance(row, ChatRow)
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Puno"}}
    assert row.trained == [False, False, True, False, True]
    assert row.tools == [{"name": "weather"}]
    with pytest.raises(ParameterError, match=r"d.jsonl:1: conversations\[0\]: from is 'robot'"):
        rows_of({"conversations": [{"from": "robot", "value": "x"}]})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"messages": [], "kto_tag": True}, "give prompt, completion and label"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "reward"),
    ],
)
def test_rows_of_other_methods_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"d.jsonl:1: .*{reason}"):
        rows_of(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "a"}, "no known kind of row: it has question"),
        ({"prompt": "a"}, "no known kind of row"),
        ({"text": ""}, "text is empty"),
        ({"text": 3}, "text is 3; a string is expected"),
        ({"messages": "hi"}, "messages: a list of messages is needed"),
        ({"messages": ["hi"]}, r"messages\[0\]: a message is an object"),
        ({"instruction": "a", "output": "b", "history": [["only one"]]}, r"history\[0\]"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
    ],
)
def test_wrong_rows_name_their_place(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=f"^d.jsonl:1: {message}"):
        rows_of(values)


def test_pairs_of_answers() -> None:
    other = {"role": "assistant", "content": "no"}
    for values in (
        {"chosen": [ASK, ANSWER], "rejected": [ASK, other]},
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [other]},
    ):
        (row,) = rows_of(values)
        assert (
            isinstance(row, PairRow) and isinstance(row.chosen, ChatRow) and isinstance(row.rejected, ChatRow)
        )
        assert (list(row.chosen.messages), row.chosen.trained) == ([ASK, ANSWER], [False, True])
        assert (list(row.rejected.messages), row.rejected.trained) == ([ASK, other], [False, True])
    (row,) = rows_of({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert isinstance(row, PairRow) and row.rejected == TextRow(place="d.jsonl:1", prompt="a", text="c")
    with pytest.raises(ParameterError, match="d.jsonl:1: chosen and rejected are two texts behind a prompt"):
        rows_of({"chosen": "b", "rejected": "c"})


def test_unused_columns_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows_of({"text": "a", "id": 1}, {"text": "b", "id": 2, "source": "x"})
    assert [r.getMessage() for r in caplog.records] == ["d.jsonl:1: columns that are not used: id, source"]


def test_files(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one"}\n\n{"text": "two\u2028three"}\n', encoding="utf-8")
    whole = tmp_path / "b.json"
    whole.write_text(json.dumps([{"text": "four"}]))
    table = tmp_path / "c.csv"
    table.write_text('prompt,completion\n"a\nb",c\nd,e\n')
    records = read_records([lines, whole, table])
    assert [r.place.rpartition("/")[2] for r in records] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "b.json: row 1",
        "c.csv:2",
        "c.csv:4",
    ]
    assert records[1].values == {"text": "two\u2028three"}
    assert records[3].values == {"prompt": "a\nb", "completion": "c"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text":\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: a row is an object, not list"),
        ("a.json", '{"text": "x"}', "must hold a list of rows"),
        ("a.json", "[3]", "a.json: row 1: a row is an object"),
        ("a.csv", "a,b\n1\n", "a.csv:2: 1 values for 2 columns"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: columns need names"),
        ("a.jsonl", "\n", "no rows"),
    ],
)
def test_wrong_files_name_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ParameterError, match=message):
        read_records([tmp_path / name])


def test_files_that_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        read_records([tmp_path / "a.jsonl"])
    with pytest.raises(UnsupportedError, match=r"\.txt files are not read: \.jsonl, "):
        read_records([tmp_path / "a.txt"])
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ParameterError, match="byte 10 is not UTF-8"):
        read_records([tmp_path / "b.jsonl"])
