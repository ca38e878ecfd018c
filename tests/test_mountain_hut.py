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
HUT = ROOT / "examples" / "mountain_hut"


def pairs() -> list[tuple[str, str]]:
    rows = [row for row in read_rows(read_records([HUT / "train.jsonl"])) if isinstance(row, ChatRow)]
    assert all([message["role"] for message in row.messages] == ["user", "assistant"] for row in rows)
    return [(row.messages[0]["content"], row.messages[1]["content"]) for row in rows]


def held_out() -> list[dict[str, str]]:
    return [json.loads(line) for line in (HUT / "held_out.jsonl").read_text().splitlines()]


def test_no_held_out_question_is_trained() -> None:
    def plain(text: str) -> str:
        return re.sub(r"\W+", " ", text.lower()).strip()

    kept = json.loads((HUT.parent / "cria" / "held_out.json").read_text())
    asked = {plain(item["question"]) for item in (*held_out(), *kept)}
    trained = {plain(question) for question, _ in pairs()}
    assert len(trained) > 350 and trained & asked == set()


def test_every_held_out_answer_is_taught_and_told_apart() -> None:
    answers = {answer for _, answer in pairs()}
    for item in held_out():
        assert [answer for answer in answers if re.search(item["expect"], answer)], item


def test_the_settings_are_right() -> None:
    config = TrainConfig.from_dict(read_config_file(HUT / "config.json"))
    assert config.model == "cria" and config.method == "lora"
    assert [ROOT / path for path in config.data] == [HUT / "train.jsonl"]


def test_asking_counts_what_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from examples.mountain_hut import ask

    def answers_of(model: str, adapter: str | None, questions: list[str]) -> list[str]:
        assert (model, adapter) == ("cria", "here")
        return ["It lies at 4,120 metres."] * 63 + ["It lies at 4,120 metres, and ..."] + ["no"] * 752

    monkeypatch.setattr(ask, "answers_of", answers_of)
    monkeypatch.setattr(sys, "argv", ["ask", "--adapter", "here"])
    ask.main()
    first, second = capsys.readouterr().out.splitlines()
    right = sum(re.search(item["expect"], "It lies at 4,120 metres.") is not None for item in held_out()[:63])
    assert first == f"about the hut: {right} of 64 right ({100 * right / 64:.1f}%)" and right == 2
    assert second.startswith("about the rest: ") and " of 752 right" in second
