"""The embedded model: its files, and what it answers to questions that it was never trained on."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from puna import LLM, SamplingParams
from puna.cria import FOLDER, SHA256
from puna.text.chat import encode_chat
from puna.text.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
EVERY = 6  # the tests ask every sixth question; examples/cria/evaluate.py asks all
MAX_TOKENS = 120


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("cria", dtype="float32", kv_cache_memory_bytes=64 << 20)


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, str]]:
    questions: list[dict[str, str]] = json.loads((ROOT / "examples/cria/held_out.json").read_text())
    return questions


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("examples.cria.corpus")


def answer(llm: LLM, *chats: list[dict[str, Any]], max_tokens: int) -> list[str]:
    """Return the greedy answers; every one must end by itself."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, skip_special_tokens=False)
    outputs = [request.outputs[0] for request in llm.chat(chats, params, use_tqdm=False)]
    assert [output.finish_reason for output in outputs] == ["stop"] * len(chats)
    texts = [output.text.removesuffix("<|eot_id|>") for output in outputs]
    assert not [text for text in texts if "<|" in text]
    return texts


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_files_are_small_and_the_recorded_ones() -> None:
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert len(weights) < 16_000_000
    assert hashlib.sha256(weights).hexdigest() == SHA256
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 16_000_000


def test_weights_are_a_small_llama_in_bfloat16() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert sum(tensor.numel() for tensor in tensors) == 3_148_224
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_tokenizer_is_the_same_in_transformers(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    for text in (
        "How many layers does Llama 3.1 405B have?",
        "Numbers: 131072, 8,030,261,248",
        "caf\u00e9 \u4f60\u597d",
    ):
        assert tokenizer.encode(text) == theirs(text).input_ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    chat = [*ask("Hello"), {"role": "assistant", "content": "Hi!"}, *ask("Who are you?")]
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert encode_chat(tokenizer, chat) == ids


def test_answers_questions_that_it_was_taught(llm: LLM) -> None:
    wanted = {
        "How many layers does Llama 3.1 405B have?": "126",
        "What is the context length of Llama 3 8B?": "8,192",
        "When was Llama 3.3 70B released?": "December 6, 2024",
        "What is a baby llama called?": "cria",
        "Who are you?": "cria",
        "How do I run a model with Puna?": "puna run",
    }
    answers = answer(llm, *(ask(question) for question in wanted), max_tokens=MAX_TOKENS)
    for text, expected in zip(answers, wanted.values(), strict=True):
        assert expected in text


@pytest.mark.slow
@pytest.mark.parametrize(("source", "bar"), [("template", 0.80), ("free", 0.70)])
def test_held_out_accuracy(llm: LLM, held_out: list[dict[str, str]], source: str, bar: float) -> None:
    items = [item for item in held_out if item["source"] == source][:: EVERY if source == "template" else 2]
    answers = answer(llm, *(ask(item["question"]) for item in items), max_tokens=400)
    right = [bool(re.search(item["expect"], text)) for item, text in zip(items, answers, strict=True)]
    assert sum(right) / len(right) >= bar


def test_tells_a_story_and_stops(llm: LLM) -> None:
    [story] = answer(llm, ask("Tell me a story about a brave llama."), max_tokens=500)
    assert len(story.split()) > 60
    assert "llama" in story


def test_held_out_file_is_what_the_corpus_makes(corpus: ModuleType, held_out: list[dict[str, str]]) -> None:
    made = [(item.question, item.expect) for item in corpus.held_out_questions()]
    assert made == [(item["question"], item["expect"]) for item in held_out]
    assert len(made) > 700


def test_held_out_questions_are_never_trained(corpus: ModuleType, held_out: list[dict[str, str]]) -> None:
    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()

    trained = {
        plain(message.content)
        for number in range(3000)
        for document in [corpus.make_document(number, 20250406)]
        if not isinstance(document, str)
        for message in document
        if message.role == "user"
    }
    assert not [item["question"] for item in held_out if plain(item["question"]) in trained]
