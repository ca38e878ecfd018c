"""Offer the filters and tests that chat templates use, each asking the budget first.

They do what jinja's own do (most are jinja's own), save `tojson`, which is Transformers': plain JSON, nothing
escaped for HTML; and `safe` and `escape`, which give plain strings. Filters that no chat template needs are
left out.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Literal, cast

import jinja2
from jinja2 import filters, tests
from jinja2.runtime import Context
from markupsafe import escape

from puna.errors import TemplateError
from puna.text import template_limits as limits
from puna.text.template_limits import Budget, current_budget

MAX_JSON_INDENT = 100
MAX_NUMBER_CHARS = 1000
MAX_ROUND_DIGITS = 30
MAX_GROUPS = 10_000

Function = Callable[..., Any]
First = Literal["value", "environment", "context"]


def _on_text(function: Function, check: Function | None = None) -> Function:
    """Return a filter that turns its value into text, and makes new text of it."""

    @jinja2.pass_context
    @wraps(function)
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current_budget()
        budget.step()
        text = budget.text(value)
        if check is not None:
            check(budget, text, *args, **kwargs)
        result = function(text, *args, **kwargs)
        return result if result is text else budget.made(result)

    return run


def _on_value(function: Function, first: First = "value", check: Function | None = None) -> Function:
    """Return a filter that picks from its value, or lists it; `first` is what jinja is to pass before it."""

    @jinja2.pass_context
    @wraps(function)
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current_budget()
        budget.step()
        if check is not None:
            check(budget, value, *args, **kwargs)
        match first:
            case "value":
                result = function(value, *args, **kwargs)
            case "environment":
                result = function(context.environment, value, *args, **kwargs)
            case "context":
                result = function(context, value, *args, **kwargs)
        return result if isinstance(result, str) else budget.made(result)

    return run


def as_list(budget: Budget, value: Any) -> list[Any]:
    """Return the items of anything that can be looped over, each counted as a step."""
    _check_letters(budget, value)
    items = []
    for item in budget.each(value):
        items.append(item)
        budget.allow_items(len(items))
    return items


def _check_letters(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    """Check the length of a string that is about to become a list of letters."""
    if isinstance(value, str):
        budget.allow_items(len(value))


def _check_indent(budget: Budget, text: str, width: int | str = 4, *_: Any, **__: Any) -> None:
    lines = limits.count_lines(text)
    budget.allow_items(lines)
    budget.allow(len(text) + lines * (len(width) if isinstance(width, str) else width))


def _check_number(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_NUMBER_CHARS:
        raise TemplateError(f"the chat template reads a number of more than {MAX_NUMBER_CHARS} characters")


def _check_round(budget: Budget, value: Any, precision: int = 0, *_: Any, **__: Any) -> None:
    if abs(precision) > MAX_ROUND_DIGITS:
        raise TemplateError(f"the chat template rounds to {precision} digits; {MAX_ROUND_DIGITS} is the most")


def _check_groups(budget: Budget, value: Any, count: int, *_: Any, **__: Any) -> None:
    _check_letters(budget, value)
    if count > MAX_GROUPS:
        raise TemplateError(f"the chat template makes groups of {count}; {MAX_GROUPS} is the most")


def _check_format(budget: Budget, text: str, *args: Any, **kwargs: Any) -> None:
    limits.check_percent(budget, text, kwargs or args)


def _format(text: str, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("format takes positional or keyword arguments, not both")
    return text % (kwargs or args)


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    return text.replace(old, new, -1 if count is None else count)


def _trim(text: str, chars: str | None = None) -> str:
    return text.strip(chars)


def _plain(text: str) -> str:
    return text


def _escape(text: str) -> str:
    return str(escape(text))


def _sum(environment: jinja2.Environment, value: Any, attribute: Any = None, start: float = 0) -> Any:
    budget = current_budget()
    if attribute is not None:
        value = map(filters.make_attrgetter(environment, attribute), value)
    total: Any = start
    for item in budget.each(value):
        if not isinstance(item, int | float) or not isinstance(total, int | float):
            raise TypeError("sum adds numbers only")
        total = budget.checked(total + item)
    return total


@jinja2.pass_context
def _join(context: Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    budget = current_budget()
    budget.step()
    items = as_list(budget, value)
    if attribute is not None:
        items = list(map(filters.make_attrgetter(context.environment, attribute), items))
    texts = [budget.text(item) for item in items]
    separator = budget.text(d)
    budget.allow(sum(map(len, texts)) + len(separator) * len(texts))
    joined: str = budget.made(separator.join(texts))
    return joined


@jinja2.pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > MAX_JSON_INDENT:
        raise TemplateError(f"the chat template indents JSON by more than {MAX_JSON_INDENT}")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    budget = current_budget()
    budget.allow(sum(map(len, separators or ())))
    return budget.concat(encoder.iterencode(value))


@jinja2.pass_context
def _each(context: Context, value: Any) -> Any:
    return current_budget().each(value)


@jinja2.pass_context
def _made(context: Context, value: Any) -> Any:
    budget = current_budget()
    budget.step()
    return budget.made(value)


@jinja2.pass_context
def _checked(context: Context, value: Any) -> Any:
    budget = current_budget()
    budget.step()
    return value


@jinja2.pass_context
def _tilde(context: Context, values: list[Any]) -> str:
    budget = current_budget()
    return budget.concat(map(budget.text, values))


# Nodes whose work the sandbox does not see are sent through these filters; their names are no words of jinja.
EACH, MADE, STEP, TILDE = "#each", "#made", "#step", "#tilde"

FILTERS: Mapping[str, Function] = {
    EACH: _each,
    MADE: _made,
    STEP: _checked,
    TILDE: _tilde,
    "abs": _on_value(abs),
    "attr": _on_value(filters.do_attr, "environment"),
    "batch": _on_value(filters.do_batch, check=_check_groups),
    "capitalize": _on_text(filters.do_capitalize),
    "center": _on_text(filters.do_center, limits.check_width),
    "count": _on_value(len),
    "d": _on_value(filters.do_default),
    "default": _on_value(filters.do_default),
    "dictsort": _on_value(filters.do_dictsort),
    "e": _on_text(_escape),
    "escape": _on_text(_escape),
    "first": _on_value(filters.do_first, "environment"),
    "float": _on_value(filters.do_float, check=_check_number),
    "forceescape": _on_text(_escape),
    "format": _on_text(_format, _check_format),
    "groupby": _on_value(filters.do_groupby, "environment", _check_letters),
    "indent": _on_text(filters.do_indent, _check_indent),
    "int": _on_value(filters.do_int, check=_check_number),
    "items": _on_value(filters.do_items),
    "join": _join,
    "last": _on_value(filters.do_last, "environment"),
    "length": _on_value(len),
    "list": _on_value(lambda value: as_list(current_budget(), value)),
    "lower": _on_text(filters.do_lower),
    "map": _on_value(filters.do_map, "context", _check_letters),
    "max": _on_value(filters.do_max, "environment"),
    "min": _on_value(filters.do_min, "environment"),
    "reject": _on_value(filters.do_reject, "context", _check_letters),
    "rejectattr": _on_value(filters.do_rejectattr, "context", _check_letters),
    "replace": _on_text(_replace, limits.check_replace),
    "reverse": _on_value(filters.do_reverse),
    "round": _on_value(filters.do_round, check=_check_round),
    "safe": _on_text(_plain),
    "select": _on_value(filters.do_select, "context", _check_letters),
    "selectattr": _on_value(filters.do_selectattr, "context", _check_letters),
    "sort": _on_value(filters.do_sort, "environment", _check_letters),
    "string": _on_text(_plain),
    "sum": _on_value(_sum, "environment"),
    "title": _on_text(filters.do_title, _check_letters),
    "tojson": _tojson,
    "trim": _on_text(_trim, limits.check_scan),
    "unique": _on_value(filters.do_unique, "environment", _check_letters),
    "upper": _on_text(filters.do_upper),
}


def _comparing(function: Function) -> Function:
    @jinja2.pass_context
    @wraps(function)
    def run(context: Context, value: Any, *args: Any) -> bool:
        current_budget().step()
        return bool(function(value, *args))

    return run


def _is_lower(value: Any) -> bool:
    return current_budget().text(value).islower()


def _is_upper(value: Any) -> bool:
    return current_budget().text(value).isupper()


_JINJA_TESTS = cast(dict[str, Function], tests.TESTS)

TESTS: dict[str, Function] = {
    **_JINJA_TESTS,  # those that cost nothing; the others follow
    **{name: _comparing(operator.eq) for name in ("==", "eq", "equalto")},
    **{name: _comparing(operator.ne) for name in ("!=", "ne")},
    **{name: _comparing(operator.gt) for name in (">", "gt", "greaterthan")},
    **{name: _comparing(operator.ge) for name in (">=", "ge")},
    **{name: _comparing(operator.lt) for name in ("<", "lt", "lessthan")},
    **{name: _comparing(operator.le) for name in ("<=", "le")},
    "in": _comparing(tests.test_in),
    "lower": _comparing(_is_lower),
    "upper": _comparing(_is_upper),
}
