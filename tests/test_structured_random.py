"""What a model writes under a random JSON schema always parses and satisfies it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from json_schemas import fits, schemas
from puna import LLM, SamplingParams, StructuredOutputsParams


@pytest.fixture(scope="module")
def llm(stories: Path) -> LLM:
    return LLM(stories / "hf", kv_cache_memory_bytes=2**24)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    some=st.lists(schemas(decimals=False), min_size=1, max_size=3),
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
)
def test_whatever_the_model_writes_satisfies_the_schema(
    llm: LLM, some: list[dict[str, Any]], seed: int, temperature: float
) -> None:
    params = [
        SamplingParams(
            seed=seed,
            temperature=temperature,
            max_tokens=None,
            structured_outputs=StructuredOutputsParams(
                json=schema, disable_any_whitespace=True, disable_additional_properties=True
            ),
        )
        for schema in some
    ]
    outputs = llm.generate([[1]] * len(some), params, use_tqdm=False)
    for schema, output in zip(some, outputs, strict=True):
        (answer,) = output.outputs
        assert answer.finish_reason == "stop" and fits(json.loads(answer.text), schema), answer.text


def test_white_space_between_the_tokens_of_json_is_bounded(llm: LLM) -> None:
    newline = llm.get_tokenizer().token_to_id("<0x0A>")
    assert newline is not None
    params = SamplingParams(
        max_tokens=100,
        temperature=0.0,
        logit_bias={newline: 100.0},
        structured_outputs=StructuredOutputsParams(
            json={"type": "array", "items": {"const": 1}, "minItems": 3}
        ),
    )
    text = llm.generate([[1]], params, use_tqdm=False)[0].outputs[0].text
    assert re.match(r"\[\n {0,40}1\n {0,40},", text) and "\n\n" not in text, text
