"""Wrong types given to the Python doors: one of Puna's errors that names the fault, not one from inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puna import LLM, AutoModelForCausalLM, LoraConfig, SamplingParams, get_peft_model
from puna.errors import ConfigError, ParameterError


@pytest.fixture(scope="module")
def llm(stories: Path) -> LLM:
    return LLM(str(stories / "hf"), kv_cache_memory_bytes=1 << 22)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda llm: llm.chat(None), "messages must be a list"),
        (lambda llm: llm.chat("hi"), "messages must be a list"),
        (lambda llm: llm.beam_search(["A"], SamplingParams()), "takes BeamSearchParams, not SamplingParams"),
        (lambda llm: llm.generate({"prompt_token_ids": [True]}, use_tqdm=False), "not of booleans"),
    ],
)
def test_the_llm_names_what_is_wrong(llm: LLM, ask: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ask(llm)


def test_arguments_of_the_wrong_kind(stories: Path) -> None:
    folder = str(stories / "hf")
    with pytest.raises(ParameterError, match="device 'tpu' cannot be used"):
        LLM(folder, device="tpu")
    wrong: Any = "ngram"
    with pytest.raises(ParameterError, match="speculative_config must be a dict, not 'ngram'"):
        LLM(folder, speculative_config=wrong)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ParameterError, match="a streamer has the methods put and end"):
        model.generate(torch.tensor([[1]]), streamer=wrong, max_new_tokens=1)
    with pytest.raises(ParameterError, match="takes a LoraConfig, not dict"):
        get_peft_model(model, {"r": 4})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="target_modules must be names"):
        LoraConfig(target_modules=5)  # type: ignore[arg-type]
