"""Grammars over token ids: JSON schema, regex, choice, Lark or GBNF, structural tags, by llguidance.

A grammar is compiled for a tokenizer and then says, token after token, which ids may follow. It knows bytes
and ids, no tensors: masks are bit fields. Size, depth and the work of compiling are bounded, so that a
hostile grammar ends in an error and not in a hang.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from puna.errors import MissingExtraError, ParameterError

if TYPE_CHECKING:
    from llguidance import LLMatcher, StructTag

    from puna.text.tokenizer import Tokenizer

# Between the tokens of JSON: blanks, or a line break with an indent. Without a bound, small models write
# white space until their length is used up.
_SPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,40}"
MAX_GRAMMAR_CHARS = 500_000
MAX_DEPTH = 64
_MAX_LEXER_STATES = 50_000

# Keywords of JSON Schema that hold a schema or a list of them, and those that hold schemas by name. All
# others (`const`, `enum`, `default`, ...) hold values, whatever these look like.
_SCHEMAS = frozenset(
    ("additionalItems", "additionalProperties", "allOf", "anyOf", "contains", "else", "if", "items", "not")
    + ("oneOf", "prefixItems", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties")
)
_NAMED_SCHEMAS = frozenset(("$defs", "definitions", "dependentSchemas", "patternProperties", "properties"))

_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammar")


class TokenGrammar:
    """Follow one sequence through a grammar."""

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._vocab_size = vocab_size
        self._pending: Future[bytes] | None = None

    def prepare(self) -> None:
        """Begin to work out the next mask in another thread."""
        if self._pending is None:
            self._pending = _threads.submit(self._mask)

    def allowed_bits(self) -> bytes:
        """Return a bit field, lowest bit first, of the ids that may come next."""
        if self._pending is None:
            return self._mask()
        bits, self._pending = self._pending.result(), None
        return bits

    def accept(self, token_id: int) -> None:
        """Go on by one token, which must have been allowed."""
        self._settle()
        self._pending = None
        if token_id in self._end_ids:
            return
        self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Say whether nothing can follow but the end."""
        self._settle()
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str:
        """Return why the grammar gave up (it grew past its limits), or an empty string."""
        self._settle()
        return str(self._matcher.get_error()) if self._matcher.is_error() else ""

    def fork(self) -> TokenGrammar:
        """Return an independent copy at the same place."""
        self._settle()
        return TokenGrammar(self._matcher.deep_copy(), self._end_ids, self._vocab_size)

    def _settle(self) -> None:
        """Wait for a mask that is being worked out: until then nobody else may use the matcher."""
        if self._pending is not None:
            self._pending.result()

    def _mask(self) -> bytes:
        if self._matcher.is_stopped():
            return _bits_of(self._end_ids, self._vocab_size)
        return bytes(self._matcher.compute_bitmask())


class GrammarCompiler:
    """Compile grammars for one tokenizer; made once, since it reads the whole vocabulary."""

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int], vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise MissingExtraError(
                "structured outputs need llguidance: pip install 'puna[structured]'"
            ) from error
        self._end_ids = end_ids
        self._vocab_size = vocab_size
        self._special_names = frozenset(tokenizer.special_tokens)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, end_ids)),
            n_vocab=vocab_size,
            eos_token=sorted(end_ids),
        )
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES, max_grammar_size=MAX_GRAMMAR_CHARS, verbose_errors=False
        )

    def compile(
        self,
        *,
        json_schema: str | dict[str, Any] | None = None,
        regex: str | None = None,
        choice: list[str] | None = None,
        grammar: str | None = None,
        any_whitespace: bool = True,
        additional_properties: bool = True,
        whitespace_pattern: str | None = None,
        structural_tag: str | None = None,
    ) -> TokenGrammar:
        """Compile the one kind given; raise ParameterError that says what is wrong with it."""
        from llguidance import LLMatcher, StructTag

        text = ""
        if json_schema is not None:
            space = whitespace_pattern or (_SPACE if any_whitespace else None)
            options = {"whitespace_flexible": any_whitespace, "whitespace_pattern": space}
            text = _from_schema(_checked_schema(json_schema, additional_properties), options)
        elif regex is not None:
            text = LLMatcher.grammar_from_regex(_checked_text("regex", regex))
        elif choice is not None:
            options_text = " | ".join(json.dumps(item) for item in choice)
            text = LLMatcher.grammar_from_lark(_checked_text("choice", f"start: {options_text}"))
        elif grammar is not None:
            text = _from_grammar(_checked_text("grammar", grammar))
        elif structural_tag is not None:
            tags = _tags(_checked_text("structural_tag", structural_tag), additional_properties)
            has_special = any(tag.trigger in self._special_names for tag in tags)
            text = StructTag.to_grammar(tags, assume_special=has_special)
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise ParameterError(f"bad grammar: {str(matcher.get_error())[:500]}")
        return TokenGrammar(matcher, self._end_ids, self._vocab_size)


class _Vocabulary:
    """Show a tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        self.eos_token_id = min(end_ids) if end_ids else 0
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), *end_ids})
        special = set(self.special_token_ids)
        self._id_of = {text: i for i, text in enumerate(self.tokens) if text and i not in special}
        self._longest = max(map(len, self._id_of), default=1)

    def __call__(self, text: bytes | str) -> list[int]:
        """Cut forced text into tokens, longest first: a tokenizer might put a space before it."""
        data = text.encode() if isinstance(text, str) else text
        ids: list[int] = []
        place = 0
        while place < len(data):
            for size in range(min(self._longest, len(data) - place), 0, -1):
                found = self._id_of.get(data[place : place + size])
                if found is not None:
                    ids.append(found)
                    place += size
                    break
            else:
                break
        return ids


def _from_schema(schema: dict[str, Any], options: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    try:
        return str(LLMatcher.grammar_from_json_schema(schema, overrides=options))
    except ValueError as error:
        raise ParameterError(f"bad JSON schema: {error}") from error


def _from_grammar(text: str) -> str:
    """Take Lark as it is; GBNF (`root ::= ...`) is rewritten."""
    from llguidance import LLMatcher, gbnf_to_lark

    if "::=" in text:
        try:
            text = gbnf_to_lark.gbnf_to_lark(text)
        except Exception as error:  # the converter raises bare Exceptions
            raise ParameterError(f"bad GBNF grammar: {error}") from error
    return str(LLMatcher.grammar_from_lark(text))


def _tags(text: str, additional_properties: bool) -> list[StructTag]:
    """Read vLLM's form of a structural tag, {"structures": [{"begin", "schema", "end"}], "triggers": [...]}.

    Any text is allowed, and behind each trigger only the structures that begin with it: JSON by a schema. A
    trigger that is the name of a special token means that token.
    """
    from llguidance import StructTag

    try:
        value = json.loads(text)
        triggers = [str(trigger) for trigger in value["triggers"]]
        tags = []
        for one in value["structures"]:
            begin, schema, end = one["begin"], one["schema"], one["end"]
            trigger = next((t for t in triggers if t and begin.startswith(t)), None)
            if trigger is None:
                raise ParameterError(f"structural_tag: no trigger of {triggers} begins {begin!r}")
            grammar = _checked_schema(schema, additional_properties)
            tags.append(StructTag(trigger=trigger, begin=begin, grammar=grammar, end=str(end)))
    except ParameterError:
        raise
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"structural_tag is not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ParameterError(
            f"structural_tag must hold triggers and structures with begin, schema and end: {error!r}"
        ) from error
    if not tags:
        raise ParameterError("structural_tag has no structures")
    return tags


def _checked_text(name: str, text: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ParameterError(f"{name} has {len(text)} characters; {MAX_GRAMMAR_CHARS} are allowed")
    if "\0" in text:
        raise ParameterError(f"{name} must not contain NUL")
    return text


def _checked_schema(schema: str | dict[str, Any], additional_properties: bool) -> dict[str, Any]:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        value = json.loads(_checked_text("json", text))
    except ParameterError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"json is not JSON: {error}") from error
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise ParameterError(f"a JSON schema must be an object, got {type(value).__name__}")
    if _depth(value) > MAX_DEPTH:
        raise ParameterError(f"the JSON schema is nested deeper than {MAX_DEPTH}")
    return value if additional_properties else _closed(value)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _closed(value: Any) -> Any:
    """Forbid properties that an object's schema does not list."""
    if isinstance(value, list):
        return [_closed(item) for item in value]
    if not isinstance(value, dict):
        return value
    closed = dict(value)
    for key in _SCHEMAS & value.keys():
        closed[key] = _closed(value[key])
    for key in _NAMED_SCHEMAS & value.keys():
        if isinstance(value[key], dict):
            closed[key] = {name: _closed(schema) for name, schema in value[key].items()}
    if isinstance(closed.get("properties"), dict) or isinstance(closed.get("patternProperties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def _bits_of(ids: frozenset[int], vocab_size: int) -> bytes:
    bits = bytearray(-(-vocab_size // 32) * 4)
    for i in ids:
        bits[i // 8] |= 1 << (i % 8)
    return bytes(bits)
