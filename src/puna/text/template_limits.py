"""Limit what running a chat template may cost: steps, seconds, and the size of everything it makes.

A template comes with a checkpoint, so with a stranger, and a thread cannot be killed. The rule that makes the
limits hold is that no value a template can reach is larger than `MAX_CHARS` and `MAX_ITEMS`, counted through
nested lists as often as they are mentioned: whatever makes a value asks first, or is measured before the next
step. Then no single operation takes long, and the clock is looked at on each.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from jinja2 import Undefined

from puna.errors import TemplateError

MAX_SECONDS = 2.0
MAX_STEPS = 2_000_000  # loop rounds, calls, filters, operators
MAX_CHARS = 10_000_000  # in one value, and in the output
MAX_ITEMS = 500_000  # in one value
MAX_CHARS_MADE = 200_000_000  # in all values together
MAX_DEPTH = 100
MAX_INT_BITS = 4096
MAX_SCAN = 100_000_000  # character comparisons in one search that may be quadratic

_ITEM_CHARS = 16  # what an item of a new list counts as, of MAX_CHARS_MADE

_CONTAINERS = (list, tuple, dict, set, frozenset, range, MappingView)
_SCALARS = (bool, int, float, type(None), Undefined)

_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")
_DIGITS = re.compile(r"\d+")
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


class Budget:
    """Count what one rendering costs, and stop it with `TemplateError` when that is too much."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._steps = 0
        self._made = 0

    def step(self) -> None:
        """Count one operation, and look at the clock."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            _stop(f"it takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self._deadline:
            _stop(f"it takes more than {MAX_SECONDS:g} seconds")

    def allow(self, chars: int) -> None:
        """Check the size of a string that is about to be made."""
        if chars > MAX_CHARS:
            _stop(f"it makes a string of more than {MAX_CHARS:,} characters")

    def allow_items(self, items: int) -> None:
        """Check the length of a list that is about to be made."""
        if items > MAX_ITEMS:
            _stop(f"a list has more than {MAX_ITEMS:,} items")

    def allow_scan(self, left: int, right: int) -> None:
        """Check a search whose cost may be the product of two lengths."""
        if left * right > MAX_SCAN:
            _stop(f"it searches {left:,} characters for {right:,}")

    def made(self, value: Any) -> Any:
        """Return a value that was just made, after counting it."""
        if isinstance(value, str):
            self.allow(len(value))
            self._charge(len(value))
        elif isinstance(value, _CONTAINERS):
            self._charge(_ITEM_CHARS * len(value))
        return self.checked(value)

    def checked(self, value: Any) -> Any:
        """Return a value, after measuring it if it is a container or a large number."""
        if isinstance(value, _CONTAINERS):
            _Measure(closed=False).walk(value)
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            _stop(f"it makes a number of more than {MAX_INT_BITS} bits")
        return value

    def text(self, value: Any) -> str:
        """Return a value as jinja writes it; only what JSON knows has a text, not objects of Python."""
        if isinstance(value, str):
            return value
        self.allow(text_bound(value))
        text = str(value)
        self._charge(len(text))
        return text

    def concat(self, parts: Iterable[str]) -> str:
        """Join the pieces of a block, a macro, or a `~`."""
        pieces = []
        size = 0
        for piece in parts:
            self.step()
            size += len(piece)
            self.allow(size)
            pieces.append(piece)
        self._charge(size)
        return "".join(pieces)

    def each(self, iterable: Any) -> Rounds:
        """Return an iterable whose every round counts as a step."""
        return Rounds(self, iterable)

    def _charge(self, chars: int) -> None:
        self._made += chars
        if self._made > MAX_CHARS_MADE:
            _stop(f"it makes more than {MAX_CHARS_MADE:,} characters in all")


_BUDGET: ContextVar[Budget] = ContextVar("puna_template_budget")


def current_budget() -> Budget:
    """Return the budget of the rendering that runs."""
    return _BUDGET.get()


@contextmanager
def new_budget() -> Iterator[Budget]:
    """Start a budget for one compilation or one rendering."""
    budget = Budget()
    token = _BUDGET.set(budget)
    try:
        yield budget
    finally:
        _BUDGET.reset(token)


class Rounds:
    """Iterate over a value and count each round; has the length that the value has."""

    def __init__(self, budget: Budget, iterable: Any) -> None:
        self._budget = budget
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            self._budget.step()
            yield item

    def __len__(self) -> int:
        return len(self._iterable)


class _Measure:
    """Count the items and characters of nested containers, each as often as it is mentioned."""

    def __init__(self, *, closed: bool) -> None:
        self.chars = 0
        self.items = 0
        self._closed = closed

    def walk(self, value: Any, depth: int = 1) -> None:
        if depth > MAX_DEPTH:
            _stop(f"lists are nested deeper than {MAX_DEPTH}")
        self.items += len(value)
        for child in _children(value):
            if isinstance(child, str):
                self.chars += len(child)
            elif isinstance(child, _CONTAINERS):
                self.walk(child, depth + 1)
            elif self._closed:
                self.chars += _scalar_bound(child)
        if self.items > MAX_ITEMS:
            _stop(f"a list has more than {MAX_ITEMS:,} items")
        if self.chars > MAX_CHARS:
            _stop(f"a list has more than {MAX_CHARS:,} characters")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, range):
        return ()
    return itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else value


def _stop(reason: str) -> NoReturn:
    raise TemplateError(f"the chat template was stopped: {reason}")


def _scalar_bound(value: Any) -> int:
    if not isinstance(value, _SCALARS):
        raise TemplateError(f"the chat template writes a value of type {type(value).__name__} as text")
    if isinstance(value, int):
        return value.bit_length() // 3 + 2
    return 350 if isinstance(value, float) else 32  # "%f" % 1e308 has 316 characters


def text_bound(value: Any) -> int:
    """Return about how many characters `str(value)` has; raise `TemplateError` for an object of Python."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, _CONTAINERS):
        return _scalar_bound(value)
    measure = _Measure(closed=True)
    measure.walk(value)
    return measure.chars + 4 * measure.items


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Refuse `+`, `*`, `**` and `%` where the result would be too large."""
    match operator:
        case "+":
            _check_sum(budget, left, right)
        case "*":
            _check_product(budget, left, right)
        case "**":
            _check_power(left, right)
        case "%" if isinstance(left, str):
            check_percent(budget, left, right)


def _check_sum(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, str) and isinstance(right, str):
        budget.allow(len(left) + len(right))
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        budget.allow_items(len(left) + len(right))


def _check_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_INT_BITS:
            _stop(f"it makes a number of more than {MAX_INT_BITS} bits")
        return
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str) and isinstance(times, int):
            budget.allow(len(value) * times)
        elif isinstance(value, list | tuple) and isinstance(times, int):
            budget.allow_items(len(value) * times)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_INT_BITS:
        _stop(f"it makes a number of more than {MAX_INT_BITS} bits")


def check_percent(budget: Budget, pattern: str, values: Any) -> None:
    """Refuse `pattern % values` with widths or values that would make the text too large."""
    fields = list(_PERCENT.finditer(pattern))
    widths = 0
    for field in fields:
        for width in field.groups():
            if width == "*":
                _stop("a width of * in %")
            widths += _number(width)
    budget.allow(len(pattern) + widths + len(fields) * text_bound(values))


def check_format_spec(budget: Budget, value: Any, spec: str) -> None:
    """Refuse a `str.format` field whose width, precision or value would make the text too large."""
    budget.step()
    budget.allow(text_bound(value) + sum(_number(digits) for digits in _DIGITS.findall(spec)))


def _number(digits: str | None) -> int:
    """Return the number, or one that is too large where there are too many digits for a width."""
    return 0 if digits is None else int(digits) if len(digits) < 10 else 10**10


def check_width(budget: Budget, text: str, width: int = 80, *_: Any) -> None:
    """Refuse to pad `text` to a width that is too large."""
    budget.allow(max(len(text), width))


def check_replace(budget: Budget, text: str, old: str, new: str, *_: Any) -> None:
    """Refuse `text.replace(old, new)` where the result would be too large."""
    budget.allow(len(text) + text.count(old) * len(new))


def _check_tabs(budget: Budget, text: str, tabsize: int = 8) -> None:
    budget.allow(len(text) + text.count("\t") * max(tabsize, 0))


def _check_join(budget: Budget, text: str, items: Any) -> None:
    if not isinstance(items, _CONTAINERS):
        raise TemplateError("the chat template joins something that is no list")
    budget.allow(text_bound(items) + len(text) * len(items))


def _check_split(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> None:
    pieces = len(text) // 2 if sep is None else text.count(sep) if sep else 0
    budget.allow_items(1 + (pieces if maxsplit < 0 else min(pieces, maxsplit)))
    budget.allow_scan(len(text), len(sep or ""))


def _check_lines(budget: Budget, text: str, keepends: bool = False) -> None:
    budget.allow_items(count_lines(text))


def count_lines(text: str) -> int:
    """Return at least how many lines `splitlines` finds."""
    return 1 + sum(text.count(end) for end in _LINE_ENDS)


def check_scan(budget: Budget, text: str, chars: str | None = None, *_: Any) -> None:
    """Refuse a search from the right, or stripping, that may take the product of the two lengths."""
    budget.allow_scan(len(text), len(chars or ""))


# What Python's string methods must be asked before they are called; those not named here cost no more than
# the string is long and make nothing much longer.
STRING_METHOD_CHECKS: Mapping[str, Callable[..., None]] = {
    "center": check_width,
    "ljust": check_width,
    "rjust": check_width,
    "zfill": check_width,
    "expandtabs": _check_tabs,
    "replace": check_replace,
    "join": _check_join,
    "split": _check_split,
    "rsplit": _check_split,
    "splitlines": _check_lines,
    "rfind": check_scan,
    "rindex": check_scan,
    "rpartition": check_scan,
    "strip": check_scan,
    "lstrip": check_scan,
    "rstrip": check_scan,
}
