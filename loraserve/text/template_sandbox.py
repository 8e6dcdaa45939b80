"""Runs a Jinja template with a budget: a hostile one ends in BudgetError, not in a dead process.

jinja2's sandbox keeps a template from objects that are not its own; it bounds neither time nor
memory. Here everything that a template does is charged in characters: each executed line its own
length, each expression, operator, filter and call the sizes it reads and writes, before it runs
where the size of the result is not that of its inputs. A deadline covers what is slow but small.

Known gap: comparing two nested structures that refer to the same parts many times over is one
operation for Python and cannot be interrupted.
"""

import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_WORK = 64 << 20
"""Characters that a template may touch while it renders."""
MAX_SECONDS = 3.0
MAX_WIDTH = 1000
"""Of padding, indentation and number formats."""
MAX_POWER_BITS = 4096

_FILE = "<chat template>"
_WIDTH_METHODS = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs"))
_WIDTH_FILTERS = frozenset(("center", "indent", "tojson", "batch", "slice", "wordwrap", "round"))
# A width or precision of four digits or more, or one that is given as an argument.
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[-#0 +]*\d*\.?(\*|\d{4,})")
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{4,}|\{)")
# What a value in a list or a mapping costs beside its text: about its memory.
_VALUE_COST = 32


class BudgetError(Exception):
    """The template did too much; the text says of what."""


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._left = MAX_WORK
        self._end = time.monotonic() + MAX_SECONDS

    def charge(self, characters: int) -> None:
        self._left -= characters
        if self._left < 0:
            raise BudgetError(f"touches more than {MAX_WORK} characters")

    def check_time(self) -> None:
        if time.monotonic() > self._end:
            raise BudgetError(f"takes longer than {MAX_SECONDS:g} s")

    def weigh(self, *values: Any) -> None:
        """Charges the values as if written out, what occurs twice twice."""
        stack = list(values)
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                self.charge(len(value) + 1)
            elif isinstance(value, int):
                self.charge(value.bit_length() // 3 + 1)
            elif isinstance(value, (list, tuple, dict, set, frozenset)):
                self.charge(len(value) * _VALUE_COST + 1)
                self.check_time()
                stack += value
                if isinstance(value, dict):
                    stack += value.values()
            else:
                self.charge(1)


_budget: ContextVar[Budget] = ContextVar("budget")


def _check_width(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise BudgetError(f"asks for a width over {MAX_WIDTH}")


def _check_percent(text: str) -> None:
    if _WIDE_PERCENT.search(text):
        raise BudgetError(f"has a format with a width of {MAX_WIDTH} or more")


def _check_braces(text: str) -> None:
    if _WIDE_BRACES.search(text.replace("{{", "").replace("}}", "")):
        raise BudgetError(f"has a format with a width of {MAX_WIDTH} or more")


def _charge_expansion(name: str, text: Any, args: Sequence[Any]) -> None:
    """For operations whose result can be longer than what goes in."""
    budget = _budget.get()
    strings = [len(arg) for arg in args if isinstance(arg, str)]
    if name == "replace" and isinstance(text, str) and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        budget.charge(text.count(old) * len(new))
    elif name in ("join", "indent", "wordwrap", "translate", "xmlattr"):
        if args and isinstance(args[0], Mapping):
            strings += [len(v) for v in args[0].values() if isinstance(v, str)]
        if isinstance(text, str | list | tuple | Mapping):
            budget.charge(len(text) * max(strings, default=1))
        if name == "indent" and isinstance(text, str):
            width = next((arg for arg in args if isinstance(arg, int)), 4)
            budget.charge((text.count("\n") + 1) * abs(width))
    elif name == "format" and isinstance(text, str):
        _check_percent(text)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # keeps the mark that asks jinja2 for the environment
    def run(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        given = list(args)
        if name == "join" and len(given) > skipped and isinstance(given[skipped], Iterator):
            given[skipped] = list(given[skipped])
        value = given[skipped] if len(given) > skipped else None
        rest = [*given[skipped + 1 :], *kwargs.values()]
        budget.weigh(value, *rest)
        if name in _WIDTH_FILTERS:
            _check_width(*rest)
        _charge_expansion(name, value, rest)
        result = function(*given, **kwargs)
        budget.charge(len(result) if isinstance(result, str | list) else 1)
        return result

    return run


class _Generator(CodeGenerator):
    """jinja2's own, but `a ~ b` goes through the environment."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat_charged((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope, as the block that transformers makes of it is one.
        return [nodes.Scope(body).set_lineno(line)]


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and renders templates that nobody has checked."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # Nothing of the template runs while it is compiled, where there is no budget.
            optimized=False,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=self._finalized,
        )
        # Made for placeholder pages: a million random words for one call.
        del self.globals["lipsum"]
        self.filters = {name: _bounded_filter(name, f) for name, f in self.filters.items()}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _bounded_filter(name, function)

    @staticmethod
    def _finalized(value: Any) -> Any:
        """Called for each expression that is written."""
        _budget.get().weigh(value)
        return value

    def concat_charged(self, parts: tuple[Any, ...]) -> str:
        _budget.get().weigh(*parts)
        return "".join(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    budget.charge(len(sequence) * max(times, 0))
            budget.charge(_size(left) + _size(right))
        elif operator == "**":
            integers = isinstance(left, int) and isinstance(right, int)
            if integers and left.bit_length() * abs(right) > MAX_POWER_BITS:
                raise BudgetError(f"computes a power of more than {MAX_POWER_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            _check_percent(left)
            budget.weigh(left, right)
        else:
            budget.charge(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.check_time()
        budget.weigh(*args, *kwargs.values())
        text = getattr(__obj, "__self__", None)
        if text is None:  # jinja2 wraps str.format in a function of its own
            text = getattr(getattr(__obj, "__wrapped__", None), "__self__", None)
        if isinstance(text, str):
            name = __obj.__name__
            budget.charge(len(text))
            if name in _WIDTH_METHODS:
                _check_width(*args)
            if name in ("format", "format_map"):
                _check_braces(text)
            elif name == "join" and args:
                items = list(args[0])
                args = (items, *args[1:])
                budget.weigh(items)
                budget.charge(len(items) * len(text))
            else:
                _charge_expansion(name, text, args)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.charge(_size(result))
        return result

    def compile_source(self, source: str) -> "BudgetedTemplate":
        """Raises jinja2.TemplateError, or whatever else Python says to the code it makes."""
        return BudgetedTemplate(self, source)


def _size(value: Any) -> int:
    if isinstance(value, str | list | tuple):
        return len(value)
    return value.bit_length() // 3 if isinstance(value, int) else 1


class BudgetedTemplate:
    """A compiled template; may be rendered by several threads at once."""

    def __init__(self, environment: BudgetedEnvironment, source: str) -> None:
        python: str = environment.compile(source, raw=True)
        code = compile(python, _FILE, "exec")
        self._template = jinja2.Template.from_code(environment, code, dict(environment.globals))
        # A line's length bounds the text it can write by itself.
        self._line_lengths = [0, *(len(line) + 1 for line in python.split("\n"))]

    def render(self, variables: Mapping[str, Any], max_characters: int) -> str:
        """Raises BudgetError, and what the template raises.

        A thread's trace function, such as a debugger's, is suspended meanwhile.
        """
        budget = Budget()
        lengths = self._line_lengths

        def on_line(frame: FrameType, event: str, _: Any) -> Any:
            if event == "line":
                budget.charge(lengths[frame.f_lineno])
                budget.check_time()
            return on_line

        def on_call(frame: FrameType, _event: str, _: Any) -> Any:
            return on_line if frame.f_code.co_filename == _FILE else None

        token = _budget.set(budget)
        previous = sys.gettrace()
        sys.settrace(on_call)
        try:
            pieces: list[str] = []
            length = 0
            for piece in self._template.generate(variables):
                length += len(piece)
                if length > max_characters:
                    raise BudgetError(f"writes more than {max_characters} characters")
                pieces.append(piece)
            return "".join(pieces)
        finally:
            sys.settrace(previous)
            _budget.reset(token)


__all__ = ["Budget", "BudgetError", "BudgetedEnvironment", "BudgetedTemplate", "SecurityError"]
