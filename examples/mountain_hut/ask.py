"""Ask the held-out questions of this example, and those of cria, and count the right answers.

    python -m examples.mountain_hut.ask [MODEL] [--adapter FOLDER] [--show]

MODEL is cria without one. Decoding is greedy; an answer is right if it ends by itself and matches the
regular expression of its question. The first line is what the training should change, the second what it
should keep.
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
Question = dict[str, str]  # "question", and "expect": a regular expression


def read_questions() -> dict[str, list[Question]]:
    """Return the questions about the hut, and those that cria was made for."""
    lines = (HERE / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    kept = (HERE.parent / "cria" / "held_out.json").read_text(encoding="utf-8")
    return {"about the hut": [json.loads(line) for line in lines], "about the rest": json.loads(kept)}


def answers_of(model: str, adapter: str | None, questions: Sequence[str]) -> list[str]:
    """Return the answers of a model, or of an adapter on it; one that does not end has "..." there."""
    path = find_model(model)
    network = load_model(path, dtype=torch.float32)
    if adapter is not None:
        PeftModel.from_pretrained(network, adapter)  # puts it into the network
    return answer_all(network, load_tokenizer(path), questions)


def is_right(question: Question, answer: str) -> bool:
    """Say whether the answer ended and holds what was expected."""
    return not answer.endswith("...") and re.search(question["expect"], answer) is not None


def main() -> None:
    """Print a line for each kind of question."""
    parser = argparse.ArgumentParser(description="Ask the held-out questions of this example.")
    parser.add_argument("model", nargs="?", default="cria")
    parser.add_argument("--adapter", help="a folder that puna train wrote")
    parser.add_argument("--show", action="store_true", help="show the answers about the hut")
    arguments = parser.parse_args()
    kinds = read_questions()
    asked = [question for questions in kinds.values() for question in questions]
    answers = answers_of(arguments.model, arguments.adapter, [question["question"] for question in asked])
    pairs = iter(zip(asked, answers, strict=True))
    for kind, questions in kinds.items():
        right = 0
        for _, (question, answer) in zip(questions, pairs, strict=False):
            good = is_right(question, answer)
            right += good
            if arguments.show and kind == "about the hut":
                sys.stdout.write(f"{'right' if good else 'WRONG'}  {question['question']}\n       {answer}\n")
        share = 100 * right / len(questions)
        sys.stdout.write(f"{kind}: {right} of {len(questions)} right ({share:.1f}%)\n")


if __name__ == "__main__":
    main()
