"""A tiny chat model with a data set beside it, for tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from puna.train.train_config import TrainConfig
from tiny_chat import save_chat_model

WORDS = "once upon a time llama said hello to the user and assistant why brief".split()  # noqa: SIM905


def write_data(folder: Path, *, rows: int = 12, seed: int = 0) -> Path:
    """Write a JSONL file of chats of several lengths."""
    draw = random.Random(seed)
    path = folder / f"chats-{seed}.jsonl"
    with path.open("w") as file:
        for _ in range(rows):
            messages = []
            for _ in range(draw.randint(1, 2)):
                for role in ("user", "assistant"):
                    words = draw.choices(WORDS, k=draw.randint(1, 9))
                    messages.append({"role": role, "content": " ".join(words)})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_pairs(folder: Path, rows: int = 9) -> Path:
    """Write a JSONL file of pairs of answers."""
    draw = random.Random(1)

    def words() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))

    path = folder / "pairs.jsonl"
    lines = [
        {
            "prompt": [{"role": "user", "content": words()}],
            "chosen": [{"role": "assistant", "content": words() + " llama"}],
            "rejected": [{"role": "assistant", "content": words() + " user"}],
        }
        for _ in range(rows)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    """Make a training of a few steps; the model is written into `folder` unless it is there."""
    model = folder / "model"
    if not model.exists():
        save_chat_model(model)
    values: dict[str, Any] = {
        "model": str(model),
        "data": str(write_data(folder)),
        "output": str(folder / "out"),
        "max_length": 96,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "warmup_steps": 2,
        "device": "cpu",
        "save_steps": 0,
        **changes,
    }
    return TrainConfig(**values)
