"""Templates that would fill the memory or never end are stopped, quickly and by name."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from puna.errors import TemplateError
from puna.text import template, template_limits
from puna.text.template import compile_template

# Small limits make a quick test; the limits themselves are tried at the end.
SMALL = {
    "MAX_SECONDS": 30.0,
    "MAX_STEPS": 20_000,
    "MAX_CHARS": 100_000,
    "MAX_ITEMS": 5_000,
    "MAX_CHARS_MADE": 1_000_000,
    "MAX_SCAN": 1_000_000,
}

A = "{% set a = 'a' * 90000 %}"  # nearly as long as a string may be
B = "{% set b = 'a' * 89999 + 'a' %}"  # equal, and another object

TIMES = {
    "nested loops": "{% for a in range(999) %}{% for b in range(999) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for a in range(999) %}{% for b in range(999) if false %}{% endfor %}{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(50) }}",
    "recursive loop": "{% for x in [[]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "caller": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 16
    + "x"
    + "{% endcall %}" * 16,
    "wide recursion": "{% for x in [1] recursive %}{{ loop(range(999)) }}{% endfor %}",
    "find from the right": A + "{{ a.rfind('b' + a[:50000]) }}",
    "strip of many": A + "{{ a.strip('b' * 50000) }}",
    "trim of many": A + "{{ a | trim('b' * 50000) }}",
    "split from the right": A + "{{ a.rsplit('b' + a[:50000]) }}",
}

SIZES = {
    "times": "{{ 'a' * 20000000 }}",
    "times, reversed": "{{ 20000000 * 'a' }}",
    "times of a list": "{{ [1] * 20000000 }}",
    "times of a tuple": "{{ (1, 2) * 20000000 }}",
    "plus": "{% set ns = namespace(s='abc') %}"
    "{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "tilde": "{% set ns = namespace(s='abc') %}"
    "{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "list plus": "{% set ns = namespace(l=[1]) %}"
    "{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "list of lists": "{% set ns = namespace(l=[1]) %}"
    "{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "dict of dicts": "{% set ns = namespace(l=1) %}"
    "{% for i in range(99) %}{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l | tojson }}",
    "namespaces": "{% set ns = namespace(l=1) %}"
    "{% for i in range(99) %}{% set ns.l = namespace(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l | string }}",
    "deep list": "{% set ns = namespace(l=1) %}{% for i in range(999) %}{% set ns.l = [ns.l] %}{% endfor %}",
    "power": "{{ 10 ** 100000000 }}",
    "product": "{% set ns = namespace(n=3) %}"
    "{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "power in %": "{{ '%99999999d' % 1 }}",
    "precision in %": "{{ '%.99999999f' % 1 }}",
    "width from outside in %": "{{ '%*d' % (99999999, 1) }}",
    "values in %": A + "{{ '%s%s' % (a, a) }}",
    "format filter": "{{ '%99999999d' | format(1) }}",
    "str.format": "{{ '{:99999999}'.format(1) }}",
    "str.format, nested": "{{ '{:{w}}'.format(1, w=99999999) }}",
    "str.format, twice": A + "{{ '{0}{0}'.format(a) }}",
    "format_map": "{{ '{a:99999999}'.format_map({'a': 1}) }}",
    "center": "{{ 'a' | center(20000000) }}",
    "str.center": "{{ 'a'.center(20000000) }}",
    "ljust": "{{ 'a'.ljust(20000000) }}",
    "rjust": "{{ 'a'.rjust(20000000) }}",
    "zfill": "{{ 'a'.zfill(20000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(20000000) }}",
    "method passed on": "{% set m = ['a'] | map(attribute='center') | list %}{{ m[0](20000000) }}",
    "replace": A + "{{ a | replace('a', a) }}",
    "replace nothing": A + "{{ a | replace('', 'aaaa') }}",
    "str.replace": A + "{{ a.replace('a', a) }}",
    "join": A + "{{ [a, a] | join }}",
    "join by": A + "{{ [1, 2, 3] | join(a) }}",
    "str.join": A + "{{ a.join(['b', 'b', 'b']) }}",
    "str.join of a generator": A + "{{ a.join(['b', 'b', 'b'] | map('upper')) }}",
    "indent": "{{ ('a\n' * 1000) | indent(1000) }}",
    "indent by text": A + "{{ 'a\nb\nc' | indent(a) }}",
    "tojson indent": "{{ [1] | tojson(indent=100000000) }}",
    "tojson of much": A + "{{ ('\t' * 90000) | tojson }}",
    "set block": A + "{% set s %}{% for i in range(99) %}{{ a }}{% endfor %}{% endset %}",
    "macro": A + "{% macro f() %}{% for i in range(99) %}{{ a }}{% endfor %}{% endmacro %}{% set s = f() %}",
    "data in a set block": "{% set s %}{% for i in range(99) %}" + "A" * 9000 + "{% endfor %}{% endset %}",
    "output": A + "{% for i in range(99) %}{{ a }}{% endfor %}",
    "many strings": A + "{% set ns = namespace() %}{% for i in range(99) %}{% set x = a ~ i %}{% endfor %}",
    "many variables": A + "".join(f"{{% set x{i} = a[1:] %}}" for i in range(20)),
    "many lists": "{% set l = range(4000) | list %}"
    + "".join(f"{{% set x{i} = l.copy() %}}" for i in range(20)),
    "sort": A + B + "{{ [a, b] | sort }}",
    "letters": A + "{{ a | list }}",
    "letters mapped": A + "{{ a | map('upper') | list }}",
    "letters joined": A + "{{ ','.join(a) }}",
    "letters sorted": A + "{{ a | sort }}",
    "words": "{{ ('a ' * 40000).split() | length }}",
    "pieces": "{{ ('a,' * 40000).split(',') | length }}",
    "lines": "{{ ('a\n' * 40000).splitlines() | length }}",
    "title": A + "{{ a | title }}",
    "range": "{{ range(99999) | list }}",
    "batch": "{{ [1] | batch(100000000, 'x') | list }}",
    "sum of lists": "{{ [[1], [2]] | sum(start=[]) }}",
    "round": "{{ 1 | round(100000000, 'ceil') }}",
    "number": "{{ ('9' * 50000) | int }}",
    "number in base 16": "{{ ('f' * 50000) | int(base=16) }}",
    "date": "{{ strftime_now('%Y' * 1000) }}",
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(template_limits, name, value)


@pytest.mark.parametrize("name", TIMES)
def test_what_takes_long_is_stopped(name: str, small: None) -> None:
    began = time.thread_time()
    with pytest.raises(TemplateError):
        compile_template(TIMES[name]).render({})
    assert time.thread_time() - began < 1.0


@pytest.mark.parametrize("name", SIZES)
def test_what_grows_is_stopped_before_it_has_grown(name: str, small: None) -> None:
    compiled = compile_template(SIZES[name])
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            compiled.render({})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (TIMES["nested loops"], "it takes more than 20,000 steps (line 1)"),
        ("\n" + SIZES["times"], "it makes a string of more than 100,000 characters (line 2)"),
        (SIZES["times of a list"], "a list has more than 5,000 items (line 1)"),
        (SIZES["many strings"], "it makes more than 1,000,000 characters in all (line 1)"),
        (SIZES["power"], "it makes a number of more than 4096 bits (line 1)"),
        (SIZES["deep list"], "lists are nested deeper than 100 (line 1)"),
        (TIMES["find from the right"], "it searches 90,000 characters for 50,001 (line 1)"),
    ],
)
def test_the_reason_is_told(source: str, reason: str, small: None) -> None:
    with pytest.raises(TemplateError) as caught:
        compile_template(source).render({})
    assert str(caught.value) == f"the chat template was stopped: {reason}"


def test_the_clock_stops_what_steps_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_template("{% for i in range(100000) %}{{ i }}{% endfor %}")
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.001)
    with pytest.raises(TemplateError, match=r"it takes more than 0\.001 seconds"):
        compiled.render({})


WRONG = {
    "parentheses": "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "sum": "{{ 1" + "+1" * 400 + " }}",
    "attributes": "{{ a" + ".b" * 400 + " }}",
    "not": "{{ " + "not " * 800 + "1 }}",
    "nested if": "{% if 1 %}" * 100 + "{% endif %}" * 100,
    "nested for": "{% for x in [1] %}" * 21 + "{% endfor %}" * 21,
    "many tokens": "{{ a }}" * 400,
    "long": "a" * (template.MAX_TEMPLATE_BYTES + 1),
    "long in bytes": "\u00e9" * (template.MAX_TEMPLATE_BYTES // 2 + 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_too_large_to_compile_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_TOKENS", 1000)
    with pytest.raises(TemplateError) as caught:
        compile_template(WRONG[name])
    assert len(str(caught.value)) <= template.MAX_ERROR_CHARS


def test_what_is_large_and_harmless_is_rendered() -> None:
    messages = [{"role": "user", "content": f"{i} " * 500} for i in range(1000)]
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content | trim }}{% endif %} {% endfor %}"
    text = compile_template(source).render({"messages": messages})
    assert text == "".join(message["content"].strip() + " " for message in messages)


def test_messages_beyond_the_limit_are_refused() -> None:
    messages = [{"content": "a" * 1_000_000}] * 11
    with pytest.raises(TemplateError, match="a list has more than 10,000,000 characters"):
        compile_template("{{ messages | length }}").render({"messages": messages})


def test_the_real_limits_hold() -> None:
    for attack in ("{{ 'a' * 10000001 }}", "{{ [0] * 500001 }}", "{{ 2 ** 4097 }}"):
        with pytest.raises(TemplateError):
            compile_template(attack).render({})
    assert compile_template("{{ 'a' * 10000000 }}").render({}) == "a" * 10_000_000
