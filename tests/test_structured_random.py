"""What a model writes under a random JSON schema always parses and satisfies it."""

from __future__ import annotations

import json
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
