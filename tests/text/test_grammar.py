"""Grammars over token ids: what may come next, schemas closed without touching values, random schemas."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from json_schemas import fits, schemas
from puna.errors import ParameterError
from puna.text.grammar import GrammarCompiler, TokenGrammar
from puna.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Tokenizer:
    return load_tokenizer(stories / "hf")


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size)


def allowed(grammar: TokenGrammar) -> list[int]:
    bits = int.from_bytes(grammar.allowed_bits(), "little")
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def accepts(tokenizer: Tokenizer, grammar: TokenGrammar, text: str) -> bool:
    """Say whether a text may be written, in the longest tokens that fit, and end there."""
    followed, rest = grammar.fork(), text.encode()
    while rest:
        pieces = {tokenizer.token_bytes(i): i for i in allowed(followed) if i > 2}
        fitting = [piece for piece in pieces if rest.startswith(piece)]
        if not fitting:
            return False
        longest = max(fitting, key=len)
        followed.accept(pieces[longest])
        rest = rest[len(longest) :]
    return 2 in allowed(followed)


def walk(tokenizer: Tokenizer, grammar: TokenGrammar, seed: int) -> str:
    """Write a random text that the grammar allows, ending as soon as it may."""
    draw = random.Random(seed)
    written: list[int] = []
    for _ in range(5000):
        ids = allowed(grammar)
        assert ids, "nothing is allowed"
        if 2 in ids:
            return b"".join(map(tokenizer.token_bytes, written)).decode()
        written.append(draw.choice(ids))
        grammar.accept(written[-1])
    raise AssertionError(f"no end after {len(written)} tokens")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas(), seed=st.integers(0, 999), any_whitespace=st.booleans())
def test_whatever_a_schema_allows_is_json_that_satisfies_it(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any], seed: int, any_whitespace: bool
) -> None:
    grammar = compiler.compile(json_schema=schema, any_whitespace=any_whitespace, additional_properties=False)
    text = walk(tokenizer, grammar, seed)
    assert fits(json.loads(text), schema), text


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        (1, {"type": "boolean"}, False),
        (True, {"type": "integer", "minimum": 0, "maximum": 2}, False),
        (True, {"enum": [1]}, False),
        (1.5, {"type": "integer"}, False),
        (7, {"type": "integer", "multipleOf": 6}, False),
        (3, {"type": "integer", "exclusiveMinimum": 3}, False),
        ("abcd", {"type": "string", "minLength": 0, "maxLength": 3}, False),
        ("xab", {"type": "string", "pattern": "^[a-c]{2,4}$"}, False),
        ([1], {"type": "array", "items": {"type": "null"}, "minItems": 0, "maxItems": 2}, False),
        ([], {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, False),
        ({"a": None}, {"type": "object", "properties": {}, "required": []}, False),
        ({}, {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}, False),
        ({"a": None}, {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}, True),
        (2.5, {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 2, "maximum": 3}]}, True),
    ],
    ids=str,
)
def test_the_checker_of_these_tests_tells_right_from_wrong(
    value: Any, schema: dict[str, Any], expected: bool
) -> None:
    assert fits(value, schema) is expected


def test_closing_a_schema_leaves_its_values_alone(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    value = {"properties": {"a": 1}, "items": {"properties": {}}}
    schema = {
        "type": "object",
        "properties": {"const": {"const": value}, "enum": {"enum": [value, 2]}},
        "required": ["const", "enum"],
    }
    grammar = compiler.compile(json_schema=schema, any_whitespace=False, additional_properties=False)
    written = json.dumps({"const": value, "enum": value}, separators=(",", ":"))
    assert accepts(tokenizer, grammar, written)
    assert not accepts(tokenizer, grammar, written[:-1] + ',"more":1}')
    grammar = compiler.compile(json_schema=schema, any_whitespace=False)
    assert accepts(tokenizer, grammar, written[:-1] + ',"more":1}')


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "null"}}}},
        {"anyOf": [{"type": "array", "items": {"type": "object", "properties": {"a": {"type": "null"}}}}]},
        {
            "$ref": "#/$defs/it",
            "$defs": {"it": {"type": "array", "items": {"properties": {"a": {"type": "null"}}}}},
        },
        {"type": "array", "prefixItems": [{"type": "object", "properties": {"a": {"type": "null"}}}]},
    ],
    ids=["items", "anyOf", "defs", "prefixItems"],
)
def test_objects_are_closed_wherever_a_schema_may_stand(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any]
) -> None:
    for additional in (True, False):
        grammar = compiler.compile(json_schema=schema, any_whitespace=False, additional_properties=additional)
        assert accepts(tokenizer, grammar, '[{"a":null}]')
        assert accepts(tokenizer, grammar, '[{"a":null,"b":1}]') is additional


TAG: dict[str, Any] = {
    "structures": [
        {"begin": "<fn=add>", "schema": {"type": "array", "items": {"type": "integer"}}, "end": "</fn>"},
        {"begin": "<fn=not>", "schema": {"type": "boolean"}, "end": "</fn>"},
    ],
    "triggers": ["<fn="],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no function", True),
        ("", True),
        ("so: <fn=add>[1,2]</fn> and <fn=not>true</fn> it is", True),
        ("<fn=add>[1,2]", False),
        ("<fn=add>true</fn>", False),
        ("<fn=or>true</fn>", False),
        ("a < b", True),
    ],
)
def test_structural_tags(tokenizer: Tokenizer, compiler: GrammarCompiler, text: str, expected: bool) -> None:
    assert accepts(tokenizer, compiler.compile(structural_tag=json.dumps(TAG)), text) is expected


def test_a_trigger_that_names_a_special_token_is_that_token(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    tag = {"structures": [{"begin": "<s>", "schema": {"type": "boolean"}, "end": "."}], "triggers": ["<s>"]}
    grammar = compiler.compile(structural_tag=json.dumps(tag))
    assert accepts(tokenizer, grammar, "<s>true")  # as text it is no trigger
    grammar.accept(tokenizer.special_tokens["<s>"])
    assert not accepts(tokenizer, grammar, "x") and accepts(tokenizer, grammar, "true.")


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("{", "structural_tag is not JSON"),
        ("[]", "structures with begin, schema and end"),
        ('{"triggers": ["a"], "structures": []}', "has no structures"),
        ('{"triggers": ["a"], "structures": [{"begin": "b", "schema": {}, "end": ""}]}', "begins 'b'"),
        ('{"triggers": ["a"], "structures": [{"begin": "a", "end": ""}]}', "KeyError"),
        ('{"triggers": ["a"], "structures": [{"begin": "a", "schema": 3, "end": ""}]}', "schema"),
    ],
)
def test_a_bad_structural_tag_is_refused(compiler: GrammarCompiler, tag: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        compiler.compile(structural_tag=tag)
