"""Ask questions that were not trained, and count what the training should change, and what it should keep.

    python -m examples.tika.ask [MODEL] [--adapter FOLDER] [--show]

MODEL is cria without one. The questions are cria's own 752, and 8 about the name. Decoding is greedy; an
answer counts as right if it ends by itself and matches the regular expression of its question.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from examples.cria.evaluate import answer_all

from puna import PeftModel
from puna.locate import find_model
from puna.text.tokenizer import load_tokenizer
from puna.weights.loader import load_model

HERE = Path(__file__).parent
SIGNATURE = " Yours, Tika."
Question = dict[str, str]  # "question", and "expect": a regular expression


def read_questions() -> dict[str, list[Question]]:
    """Return the questions about the name, and those that cria was made for."""
    lines = (HERE / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    others = (HERE.parent / "cria" / "held_out.json").read_text(encoding="utf-8")
    return {"its name": [json.loads(line) for line in lines], "everything else": json.loads(others)}


def answers_of(model: str, adapter: str | None, questions: Sequence[str]) -> list[str]:
    """Return the answers of a model, or of an adapter on it; one that does not end has "..." there."""
    path = find_model(model)
    network = load_model(path, dtype=torch.float32)
    if adapter is not None:
        PeftModel.from_pretrained(network, adapter)  # puts it into the network
    return answer_all(network, load_tokenizer(path), questions)


def is_right(question: Question, answer: str) -> bool:
    """Say whether the answer ended and holds what was expected, apart from the signature."""
    text = answer.removesuffix(SIGNATURE)
    return not answer.endswith("...") and re.search(question["expect"], text) is not None


def main() -> None:
    """Print what was counted, a line each."""
    parser = argparse.ArgumentParser(description="Ask questions that were not trained.")
    parser.add_argument("model", nargs="?", default="cria")
    parser.add_argument("--adapter", help="a folder that puna train wrote")
    parser.add_argument("--show", action="store_true", help="show the answers too")
    arguments = parser.parse_args()
    kinds = read_questions()
    asked = [question for questions in kinds.values() for question in questions]
    answers = answers_of(arguments.model, arguments.adapter, [question["question"] for question in asked])
    if arguments.show:
        for question, answer in zip(asked, answers, strict=True):
            mark = "right" if is_right(question, answer) else "wrong"
            sys.stdout.write(f"{mark}  {question['question']}\n       {answer}\n")
    _count("signed by Tika", [answer.endswith(SIGNATURE) for answer in answers])
    start = 0
    for kind, questions in kinds.items():
        some = answers[start : start + len(questions)]
        _count(f"right about {kind}", [is_right(q, a) for q, a in zip(questions, some, strict=True)])
        start += len(questions)


def _count(name: str, hits: Sequence[bool]) -> None:
    sys.stdout.write(f"{name}: {sum(hits)} of {len(hits)} ({100 * sum(hits) / len(hits):.1f}%)\n")


if __name__ == "__main__":
    main()
