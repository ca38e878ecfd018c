"""Ask cria the held-out questions and count the right answers.

    python -m examples.cria.evaluate [FOLDER] [--wrong]     # without a folder: the embedded model

Decoding is greedy; an answer is right if it matches the question's regular expression and ends by itself.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from examples.cria.corpus import HeldOut, held_out_questions

from puna.cria import FOLDER
from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import SamplingParams
from puna.model import Llama
from puna.text.chat import encode_chat
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.weights.loader import load_model

MAX_TOKENS = 120
_TOGETHER = 32


def answer_all(model: Llama, tokenizer: Tokenizer, questions: Sequence[str]) -> list[str]:
    """Return the greedy answer to each question alone; one that does not end by itself ends with "..."."""
    engine = LLMEngine(model, EngineConfig(max_num_seqs=_TOGETHER), end_ids=tokenizer.eos_token_ids)
    for number, question in enumerate(questions):
        prompt = encode_chat(tokenizer, [{"role": "user", "content": question}])
        engine.add(str(number), prompt, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    answers = [""] * len(questions)
    while engine.has_unfinished:
        for output in engine.step():
            sequence = output.sequence
            if sequence.finish_reason is not None:
                text = tokenizer.decode(sequence.output_ids, skip_special_tokens=True)
                cut = "" if sequence.finish_reason == "stop" else "..."
                answers[int(sequence.request_id)] = text + cut
    return answers


def is_right(item: HeldOut, answer: str) -> bool:
    """Say whether the answer ended and holds what was expected."""
    return not answer.endswith("...") and re.search(item.expect, answer) is not None


def main() -> None:
    """Evaluate and write one line per category as JSON, with the wrong answers if wanted."""
    parser = argparse.ArgumentParser(description="Ask cria the held-out questions.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--wrong", action="store_true", help="show the wrong answers")
    arguments = parser.parse_args()
    items = held_out_questions()
    model = load_model(arguments.folder, dtype=torch.float32)
    tokenizer = load_tokenizer(arguments.folder)
    answers = answer_all(model, tokenizer, [item.question for item in items])
    asked, right = Counter[str](), Counter[str]()
    for item, answer in zip(items, answers, strict=True):
        good = is_right(item, answer)
        for category in (f"{item.source} {item.category}", f"{item.source} all"):
            asked[category] += 1
            right[category] += good
        if arguments.wrong and not good:
            sys.stdout.write(
                f"{item.source} {item.category}: {item.question}\n  {answer}\n  wanted: {item.expect}\n"
            )
    for category in asked:
        accuracy = round(right[category] / asked[category], 4)
        line = {
            "category": category,
            "right": right[category],
            "asked": asked[category],
            "accuracy": accuracy,
        }
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
