"""Random JSON schemas of the kinds that structured outputs are used for, and a checker for just these."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from hypothesis import strategies as st

PATTERNS = (r"^[a-c]{2,4}$", r"^(foo|ba?r)$", r"^[0-9]{3}-[0-9]{2}$", r"^[A-Z][a-z]*!{1,2}$")
_NAMES = st.sampled_from(["a", "b", "some name", 'quo"te', "back\\slash", "line\nbreak", "\u00e9\u4f60", "1"])


def schemas(*, decimals: bool = True) -> st.SearchStrategy[dict[str, Any]]:
    """Draw a schema that something satisfies; without `decimals` numbers cannot go on for ever."""
    leaves = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": {"properties": {"z": [1]}}}]),
        st.builds(_whole_numbers, st.integers(-200, 200), st.integers(0, 150), st.booleans()),
        st.builds(_strings, st.integers(0, 4), st.integers(0, 4)),
        st.sampled_from([{"type": "string", "pattern": pattern} for pattern in PATTERNS]),
        st.builds(
            lambda values: {"enum": values},
            st.lists(
                st.sampled_from(
                    ["x", "with space", "", 0, -7, True, None, [1, "y"], {"properties": {"q": {}}}]
                ),
                min_size=1,
                max_size=4,
                unique_by=json.dumps,
            ),
        ),
    )
    if decimals:
        leaves |= st.sampled_from(
            [{"type": "number"}, {"type": "integer"}, {"type": "integer", "multipleOf": 6}]
        )
        leaves |= st.builds(_numbers, st.integers(-300, 300), st.integers(1, 300))
    return st.recursive(leaves, _compound, max_leaves=6)


def _whole_numbers(low: int, width: int, exclusive: bool) -> dict[str, Any]:
    if exclusive:
        return {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": low + width + 1}
    return {"type": "integer", "minimum": low, "maximum": low + width}


def _numbers(low: int, width: int) -> dict[str, Any]:
    return {"type": "number", "minimum": low / 100, "maximum": (low + width) / 100}


def _strings(shortest: int, more: int) -> dict[str, Any]:
    return {"type": "string", "minLength": shortest, "maxLength": shortest + more}


def _compound(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    objects = st.builds(
        lambda properties, skipped: {
            "type": "object",
            "properties": properties,
            "required": [name for place, name in enumerate(properties) if not skipped >> place & 1],
        },
        st.dictionaries(_NAMES, inner, max_size=3),
        st.integers(0, 7),
    )
    return arrays | objects | st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=3))


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Say whether a value satisfies a schema of `schemas`, in which objects are closed."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "const" in schema:
        return _same(value, schema["const"])
    if "enum" in schema:
        return any(_same(value, one) for one in schema["enum"])
    match schema["type"]:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return _is_number(value) and float(value).is_integer() and _in_range(value, schema)
        case "number":
            return _is_number(value) and _in_range(value, schema)
        case "string":
            return isinstance(value, str) and _string_fits(value, schema)
        case "array":
            counts = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return counts and all(fits(item, schema["items"]) for item in value)
        case "object":
            if not isinstance(value, dict) or not set(schema["required"]) <= value.keys():
                return False
            properties = schema["properties"]
            return all(name in properties and fits(item, properties[name]) for name, item in value.items())
    raise AssertionError(f"no such type: {schema['type']}")


def _same(value: Any, other: Any) -> bool:
    return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _in_range(value: float, schema: dict[str, Any]) -> bool:
    if "multipleOf" in schema and value % schema["multipleOf"] != 0:
        return False
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        return False
    if "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]:
        return False
    return bool(schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf))


def _string_fits(value: str, schema: dict[str, Any]) -> bool:
    long_enough = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf)
    return long_enough and re.search(schema.get("pattern", ""), value) is not None
