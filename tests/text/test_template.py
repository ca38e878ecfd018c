"""The template runner writes what Transformers writes, and keeps strangers' templates in their box."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from puna.errors import TemplateError
from puna.text import template
from puna.text.template import compile_template

MESSAGES = [
    {"role": "system", "content": "Be <b> & \"brief\" 'x' "},
    {"role": "user", "content": " Hi \u00e9\u2028\n"},
    {"role": "assistant", "content": "<think>why</think>yes"},
    {"role": "tool", "content": "4", "name": "f"},
]
TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"enum": [1, 2.5, None, True]}}}}]

WRITES = [
    "{% for m in messages %}\n  {% if loop.first %}\n    first\n  {% endif %}\n{{ m.role }}\n{% endfor %}\n",
    "{%- for m in messages -%} {{ m['content'] | trim }} {%- endfor %}",
    "{{ tools | tojson(indent=4) }}{{ messages | tojson }}{{ 'a/<\u00e9' | tojson(ensure_ascii=true) }}",
    "{{ {'b': 1, 'a': [1, 2]} | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ messages[1:] | map(attribute='role') | join(', ') }}"
    "|{{ ', '.join(messages | map(attribute='role')) }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[-1].name | upper }}",
    "{% for m in messages | rejectattr('role', 'in', ['user', 'tool']) %}{{ loop.index }}/{{ loop.length }},"
    "{{ loop.revindex0 }}{{ loop.cycle('a', 'b') }}{{ loop.last }}{% endfor %}",
    "{% for m in messages if m.role != 'user' %}"
    "{{ loop.previtem.role if loop.previtem }}>{% else %}none{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.s = ns.s ~ m.role ~ ns.n %}{% endfor %}{{ ns.s }}",
    "{% macro turn(m, end='!') %}[{{ m.role }}{{ end }}{{ caller() if caller }}]{% endmacro %}"
    "{{ turn(messages[0]) }}{% call turn(messages[1], end='?') %}inner{% endcall %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ messages[2].content.split('</think>')[-1].strip('\\n') }}"
    "{{ 'x,y'.split(',', 1) }}{{ 'ab'.startswith('a') }}",
    "{{ '%s is %5.2f' % ('pi', 3.14159) }}{{ '%-4s|' | format('a') }}{{ '{:>4}|{a!r}'.format(1, a='b') }}",
    "{{ 'a b' | title }}{{ 'ABC' | lower }}{{ 'abc' | capitalize }}"
    "{{ 'a\nb' | indent(2, true) }}{{ 'a' | center(5) }}|",
    "{{ [3, 1, 2] | sort(reverse=true) }}{{ [1, 1, 2] | unique | list }}{{ [1, 2] | sum }}{{ [1, 2] | max }}",
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'k': 'v'}.items() | list }}{{ {'k': 'v'} | items | list }}",
    "{% for role, group in messages | groupby('role') %}{{ role }}{{ group | length }}{% endfor %}",
    "{{ range(2, 10, 3) | list }}{{ [1, 2, 3, 4, 5] | batch(2, 0) | list }}",
    "{{ missing | default('d') }}{{ none | default('d', true) }}"
    "{{ missing }}{{ missing is defined }}{{ '' is none }}",
    "{{ messages is iterable }}{{ messages[0] is mapping }}"
    "{{ 'a' is string }}{{ 2 is even }}{{ 1.5 | round | int }}",
    "{{ 'b' in 'abc' }}{{ 1 < 2 < 3 }}{{ not true }}"
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ -3 | abs }}{{ 1 / 4 }}",
    "{% set text %}a{{ messages | length }}{% endset %}"
    "{{ text * 2 }}{% filter upper %}x{{ text }}{% endfilter %}",
    "{% for x in [[1, [2]], 3] recursive %}"
    "{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
    "{% block a %}x{{ messages[0].role }}{% endblock %}{{ self.a() }}{% raw %}{{ }}{% endraw %}{# note #}",
    "{{ '<a>' | escape }}{{ '<a>' | safe }}{{ ['a', 1, none, {'k': [1.5]}] }}"
    "{{ (1, 'x') }}{{ 'abc'[1:] }}{{ 'abc'[::-1] }}",
    "{% set a, b = 1, [2] + [3] %}{{ a }}{{ b }}{{ dict(x=1, y=2) }}{% with c = 3 %}{{ c }}{% endwith %}",
    "{{ 'a-b'.replace('-', '+') }}{{ 'aXb' | replace('X', '\\n') }}"
    "{{ '3' | int + 1 }}{{ 'x' | int(7) }}{{ '2.5' | float }}",
    "{{ joiner(',')() }}{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}{{ c.current }}",
]


@pytest.mark.parametrize("source", WRITES)
def test_writes_what_transformers_writes(source: str) -> None:
    expected, _ = render_jinja_template([MESSAGES], tools=TOOLS, chat_template=source)
    variables: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, "add_generation_prompt": False}
    assert compile_template(source).render(variables) == expected[0]


def test_dates_are_passed_in() -> None:
    compiled = compile_template("{{ strftime_now('%d %b %Y') }}")
    assert compiled.render({}, date=datetime.date(2024, 7, 6)) == "06 Jul 2024"
    assert compiled.render({}) == datetime.datetime.now().strftime("%d %b %Y")


def test_variables_are_named() -> None:
    source = (
        "{% if custom is defined %}{% set tools = custom %}{% endif %}{{ tools }}{% set own = 1 %}{{ own }}"
    )
    assert compile_template(source).variables == {"custom", "tools"}


def test_each_template_is_compiled_once() -> None:
    assert compile_template("a{{ b }}") is compile_template("a{{ b }}")


FAILS = [
    ("a\n{% if %}", "the chat template is wrong (line 2): Expected an expression"),
    ("\n\n{{ a | nofilter }}", "the chat template is wrong (line 3): No filter named 'nofilter'."),
    ("{% include 'x' %}", "the chat template is wrong (line 1): Include is not for chat templates"),
    ("{% import 'x' as y %}", "Import is not for chat templates"),
    ("{% from 'x' import y %}", "FromImport is not for chat templates"),
    ("{% extends 'x' %}", "Extends is not for chat templates"),
    ("{% autoescape true %}{% endautoescape %}", "is not for chat templates"),
    ("\n{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
    ("\n\n{{ a.b.c }}", "the chat template failed (line 3): 'a' is undefined"),
    (
        "{% macro f() %}\n{{ 1 + 'a' }}{% endmacro %}{{ f() }}",
        "failed (line 2): TypeError: unsupported operand",
    ),
    ("{{ 1 / 0 }}", "failed (line 1): ZeroDivisionError"),
    ("{{ 2.0 ** 100000 }}", "failed (line 1): OverflowError"),
    ("{{ range(100001) }}", "Range too big"),
    ("{{ lipsum() }}", "'lipsum' is undefined"),
    ("{{ [] | random }}", "No filter named 'random'"),
]


@pytest.mark.parametrize(("source", "message"), FAILS)
def test_errors_name_the_line(source: str, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        compile_template(source).render({})
    assert message in str(caught.value)


def test_errors_are_short() -> None:
    with pytest.raises(TemplateError) as caught:
        compile_template("{{ raise_exception('no ' * 1000) }}").render({})
    assert len(str(caught.value)) == template.MAX_ERROR_CHARS


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ [''] | map(attribute='__class__') | join }}",
    "{{ '{0.__class__.__init__.__globals__}'.format('a') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ namespace.__init__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
    "{% for i in [1] %}{{ loop._iterable }}{% endfor %}",
    "{% for i in [1] %}{{ loop }}{% endfor %}",
    "{{ range }}",
    "{{ ''.join }}",
    "{{ [range] | string }}",
    "{{ [range] ~ '' }}",
    "{{ [[range]] | join }}",
    "{{ '%s' % range }}",
    "{{ '%s' | format(range) }}",
    "{{ '{}'.format(range) }}",
    "{{ '{!r}'.format(range) }}",
    "{{ raise_exception(range) }}",
    "{{ self }}",
    "{{ namespace(a=1) }}",
    "{{ namespace(a=1) | upper }}",
    "{{ namespace(a=1) is lower }}",
    "{{ [1] | map('upper') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ messages[0].pop('role') }}",
    "{{ 'a'.encode() }}",
    "{{ 'a'.translate({}) }}",
    "{{ (1).to_bytes(100000000, 'big') }}",
    "{{ range.mro() }}",
    "{{ dict.fromkeys(range(10)) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_of_python_is_reached_or_written(source: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user"}]
    try:
        written = compile_template(source).render({"messages": messages})
    except TemplateError as error:
        written = str(error)
    for trace in ("<class", "<function", "<built-in", " at 0x", "object at", "/", "Namespace {"):
        assert trace not in written
    assert messages == [{"role": "user"}]


def test_every_method_of_strings_is_known() -> None:
    """A new method of `str` needs a look: does it make a long string out of a short one?"""
    known = """capitalize casefold center count encode endswith expandtabs find format format_map index
        isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle
        isupper join ljust lower lstrip maketrans partition removeprefix removesuffix replace rfind rindex
        rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title translate upper
        zfill"""
    assert {name for name in dir(str) if not name.startswith("_")} <= set(known.split())
