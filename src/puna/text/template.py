"""Run the chat template of a checkpoint: jinja, in a sandbox, with a limit.

The one place that makes a jinja environment. It is set up as Transformers 5 sets up its own (trimmed blocks,
loop controls, a plain JSON `tojson`, `raise_exception`, `strftime_now`, `{% generation %}`), so a template
writes the same text here and there; without a loader, so nothing can be included; and with `template_limits`
asked on everything that loops, calls, joins or multiplies, since jinja's sandbox itself stops no loop and no
`"a" * 20000000`. Filters, tests and methods are allow-lists.

What it does not do: it is no separate process, so one call into Python that hangs is out of its reach.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.lexer import TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from puna.errors import TemplateError
from puna.text import template_limits as limits
from puna.text.template_filters import EACH, FILTERS, MADE, STEP, TESTS, TILDE, as_list
from puna.text.template_limits import current_budget, new_budget

MAX_TEMPLATE_BYTES = 1_000_000
MAX_TOKENS = 30_000  # of jinja's lexer, in a template; real ones have up to about 5,000
MAX_ERROR_CHARS = 1000

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(dir(str)) - {"encode", "maketrans", "translate"},
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index", "grouper", "list"}),  # the last two: what `groupby` yields
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    LoopContext: frozenset(dir(LoopContext)),
    Cycler: frozenset({"current", "next", "reset"}),
}


class _Refusal(jinja2.TemplateError):
    """Be what `raise_exception` raises: the template does not take these messages."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Hold a compiled template and the names of the variables that it reads."""

    code: jinja2.Template
    variables: frozenset[str]

    def render(self, variables: Mapping[str, Any], *, date: datetime.date | None = None) -> str:
        """Return the text; `strftime_now` sees `date`, or the present.

        Raises `TemplateError` when the template refuses, fails, or goes over a limit.
        """
        known = {**variables, "strftime_now": functools.partial(_strftime, date)}
        with new_budget() as budget, _named_errors(self.code):
            budget.checked(dict(variables))
            return budget.concat(self.code.root_render_func(self.code.new_context(known)))


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> ChatTemplate:
    """Compile a template, once; raise `TemplateError` naming the line where it is wrong."""
    if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
        raise TemplateError(f"a chat template has at most {MAX_TEMPLATE_BYTES:,} bytes")
    with new_budget(), _named_errors(None):
        tree = _ENVIRONMENT.parse(source)
        _refuse_other_files(tree)
        names = frozenset(meta.find_undeclared_variables(tree))
        tree = _Watch().visit(tree)
        code = jinja2.Template.from_code(_ENVIRONMENT, _ENVIRONMENT.compile(tree), _ENVIRONMENT.globals)
        return ChatTemplate(code=code, variables=names)


@contextlib.contextmanager
def _named_errors(template: jinja2.Template | None) -> Iterator[None]:
    """Turn whatever a template can raise into `TemplateError`: a template can make any operation fail."""
    try:
        yield
    except TemplateError as error:
        raise TemplateError(_shorten(f"{error}{_place(error, template)}")) from None
    except _Refusal as error:
        raise TemplateError(_shorten(f"the chat template refuses the messages: {error}")) from None
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            _shorten(f"the chat template is wrong (line {error.lineno}): {error.message}")
        ) from None
    except (RecursionError, MemoryError) as error:
        raise TemplateError(f"the chat template nests too deeply{_place(error, template)}") from None
    except Exception as error:
        what = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise TemplateError(_shorten(f"the chat template failed{_place(error, template)}: {what}")) from error


def _place(error: BaseException, template: jinja2.Template | None) -> str:
    """Return " (line N)" of the template, from the innermost frame of its compiled code."""
    line = None
    trace = error.__traceback__
    while template is not None and trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return "" if line is None else f" (line {line})"


def _shorten(text: str) -> str:
    text = _ADDRESS.sub("", text)
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 3] + "..."


def _refuse_other_files(tree: nodes.Template) -> None:
    refused = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.EvalContextModifier)
    for node in tree.find_all(refused):
        raise jinja2.TemplateSyntaxError(f"{type(node).__name__} is not for chat templates", node.lineno)


class _Watch(NodeTransformer):
    """Send through the budget what jinja would compile to plain Python."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = _through(EACH, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(TILDE, nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if _is_constant(node.items) else _through(MADE, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" or _is_constant(node.items) else _through(MADE, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _through(MADE, node) if node.items else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through(MADE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        cheap = len(node.ops) == 1 and _is_constant([node.expr]) or _is_constant([o.expr for o in node.ops])
        return node if cheap and not {o.op for o in node.ops} & {"in", "notin"} else _through(STEP, node)


def _is_constant(items: Iterable[nodes.Node]) -> bool:
    return all(isinstance(item, nodes.Const) for item in items)


def _through(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Tags(Extension):
    """Count tokens while parsing, and read `{% generation %}`, which marks text for training, as a scope."""

    tags = {"generation"}

    def filter_stream(self, stream: TokenStream) -> Iterable[Any]:
        for count, token in enumerate(stream):
            current_budget().step()
            if count >= MAX_TOKENS:
                raise TemplateError(f"a chat template has at most {MAX_TOKENS:,} tokens")
            yield token

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Formatter(SandboxedFormatter):
    """Be `str.format` with its widths and values looked at first."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self._size = 0

    def format_field(self, value: Any, format_spec: str) -> str:
        budget = current_budget()
        limits.check_format_spec(budget, value, format_spec)
        text: str = budget.made(super().format_field(value, format_spec))
        self._size += len(text)
        budget.allow(self._size)
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        current_budget().allow(limits.text_bound(value))
        return super().convert_field(value, conversion)


def _concat(parts: Iterable[str]) -> str:
    return current_budget().concat(parts)


def _without_jinja_scopes(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the template wrote; jinja passes its scopes among them, for macros."""
    return {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}


class _Sandbox(ImmutableSandboxedEnvironment):
    """Be jinja's sandbox, with allow-lists of attributes and a budget."""

    concat = staticmethod(_concat)
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current_budget()
        budget.step()
        limits.check_operator(budget, operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, Namespace):
            return True
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        pattern: str = value.__self__
        takes_mapping: bool = value.__name__ == "format_map"

        def write(*args: Any, **kwargs: Any) -> str:
            values = args[0] if takes_mapping else kwargs
            return _Formatter(self).vformat(pattern, () if takes_mapping else args, values)

        return write

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = current_budget()
        budget.step()
        if isinstance(obj, LoopContext):
            args = (budget.each(args[0]), *args[1:]) if args else args
        if not (isinstance(obj, BuiltinMethodType) and isinstance(obj.__self__, str)):
            result = super().call(context, obj, *args, **kwargs)
            return result if isinstance(result, str) else budget.made(result)
        if obj.__name__ == "join" and len(args) == 1:
            args = (as_list(budget, args[0]),)
        if check := limits.STRING_METHOD_CHECKS.get(obj.__name__):
            check(budget, obj.__self__, *args, **_without_jinja_scopes(kwargs))
        return budget.made(super().call(context, obj, *args, **kwargs))


def _write(value: Any) -> str:
    budget = current_budget()
    budget.step()
    return budget.text(value)


def _raise_exception(message: Any = "") -> None:
    raise _Refusal(current_budget().text(message))


def _strftime(date: datetime.date | None, pattern: str) -> str:
    if len(pattern) > 100:
        raise TemplateError("a date pattern has at most 100 characters")
    return (date or datetime.datetime.now()).strftime(pattern)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    space = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        space[name] = value
    return space


class _Namespace(Namespace):
    """Be jinja's namespace without names that start with an underscore, which Python looks up by itself."""

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"a namespace has no name {name!r}")
        super().__setitem__(name, value)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_write,
        extensions=["jinja2.ext.loopcontrols", _Tags],
    )
    environment.filters = dict(FILTERS)
    environment.tests = dict(TESTS)
    environment.globals = {
        "range": safe_range,
        "dict": _new_dict,
        "cycler": Cycler,
        "joiner": Joiner,
        "namespace": _namespace,
        "raise_exception": _raise_exception,
    }
    return environment


_ENVIRONMENT = _environment()
