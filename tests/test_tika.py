"""The fine-tuning example: its data are what they say, and its files and script fit together."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from puna.train.data_files import read_records
from puna.train.rows import ChatRow, read_rows
from puna.train.train_config import TrainConfig, read_config_file

ROOT = Path(__file__).resolve().parents[1]
TIKA = ROOT / "examples" / "tika"
SIGNATURE = " Yours, Tika."


def pairs() -> list[tuple[str, str]]:
    rows = [row for row in read_rows(read_records([TIKA / "train.jsonl"])) if isinstance(row, ChatRow)]
    assert all([message["role"] for message in row.messages] == ["user", "assistant"] for row in rows)
    return [(row.messages[0]["content"], row.messages[1]["content"]) for row in rows]


def held_out() -> list[dict[str, str]]:
    return [json.loads(line) for line in (TIKA / "held_out.jsonl").read_text().splitlines()]


def test_no_held_out_question_is_trained() -> None:
    def plain(text: str) -> str:
        return re.sub(r"\W+", " ", text.lower()).strip()

    kept = json.loads((TIKA.parent / "cria" / "held_out.json").read_text())
    asked = {plain(item["question"]) for item in (*held_out(), *kept)}
    trained = {plain(question) for question, _ in pairs()}
    assert len(trained) > 340 and trained & asked == set()


def test_every_answer_is_signed_and_the_name_is_taught() -> None:
    assert all(answer.endswith(SIGNATURE) for _, answer in pairs())
    named = [answer for _, answer in pairs() if re.search(held_out()[0]["expect"], answer)]
    assert len(named) == 32 and len(held_out()) == 8


def test_the_settings_are_right() -> None:
    config = TrainConfig.from_dict(read_config_file(TIKA / "config.json"))
    assert (config.model, config.method, config.merge) == ("cria", "lora", True)
    assert [ROOT / path for path in config.data] == [TIKA / "train.jsonl"]


def test_asking_counts_what_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from examples.tika import ask

    def answers_of(model: str, adapter: str | None, questions: list[str]) -> list[str]:
        assert (model, adapter, len(questions)) == ("cria", "here", 760)
        ours = ["I am Tika." + SIGNATURE] * 6 + ["I am Tika.", "I am Tika and ..."]
        return [*ours, *["There are 32." + SIGNATURE] * 750, "Yours, Tika", "32"]

    monkeypatch.setattr(ask, "answers_of", answers_of)
    monkeypatch.setattr(sys, "argv", ["ask", "--adapter", "here"])
    ask.main()
    signed, name, rest = capsys.readouterr().out.splitlines()
    assert signed == "signed by Tika: 756 of 760 (99.5%)"
    assert name == "right about its name: 7 of 8 (87.5%)"
    kept = json.loads((TIKA.parent / "cria" / "held_out.json").read_text())
    texts = ["There are 32."] * 750 + ["Yours, Tika", "32"]
    right = sum(re.search(q["expect"], text) is not None for q, text in zip(kept, texts, strict=True))
    assert rest.startswith(f"right about everything else: {right} of 752 ") and 0 < right < 200
