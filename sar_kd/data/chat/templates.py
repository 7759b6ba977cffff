"""Chat templates rendered as transformers renders them, with a limit on their work.

A template is a program from the internet: it may loop for hours or build a text that fills the memory. Each loop,
call, filter, operation and output is charged before it is done, in characters that it makes and a fixed amount for
itself, and a template that spends more than `MAX_WORK` is stopped. The limit counts, so it does not depend on the
machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

MAX_WORK = 2**26
"""Characters that a template may make, and `_STEP` for each operation: about a million operations, or a second."""

_WORK_OF_A_CHARACTER = 1024
"""Added to `MAX_WORK` for each character of the conversation"""

_STEP = 64

_ITEM = 16
"""For each item of a list or a dictionary that is written out"""

_TAKE_WIDTHS = frozenset(
    ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "to_bytes", "tojson", "wordwrap", "zfill")
)
"""Filters and methods whose numbers are the size of what they make."""

_SHOW_CONTAINERS = frozenset(
    ("format", "join", "pprint", "replace", "string", "tojson", "trim", "urlencode", "xmlattr")
)
"""Filters that turn what a list or a dictionary holds into text."""

_LONG_NUMBER = re.compile(r"[0-9]{4,}")


class TemplateFailure(ValueError):
    """Why a template cannot be used, or fails on a conversation."""


class TooMuchWork(TemplateError):
    """A template has spent its limit."""


class TemplateSandbox:
    """One chat template, compiled."""

    def __init__(self, template: str, now: datetime):
        """now: what `strftime_now` gives. Raises: TemplateFailure if the template is not valid"""
        self._environment = _Environment(now)
        with _failures():
            self._template = self._environment.from_string(template)

    def render(self, messages: list[dict], **values: Any) -> str:
        """The text of a conversation.

        values: further variables of the template, such as `tools` and `add_generation_prompt`
        Raises: TooMuchWork; TemplateFailure for any other error of the template
        """
        size = _deep_size([messages, values.get("tools")], MAX_WORK)
        self._environment.remaining = MAX_WORK + _WORK_OF_A_CHARACTER * size
        with _failures():
            return "".join(self._template.generate(messages=messages, **values))


@contextmanager
def _failures() -> Iterator[None]:
    """Turn whatever error a template ends with into one: it is a foreign program, and may fail in any way."""
    try:
        yield
    except TooMuchWork:
        raise
    except Exception as error:
        raise TemplateFailure((str(error).strip() or type(error).__name__).splitlines()[0]) from error


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, in which everything is charged."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, now: datetime):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=self._output,
            cache_size=0,
        )
        self.remaining = MAX_WORK
        self.filters["tojson"] = _to_json
        self.filters = {name: self._charged_filter(name, function) for name, function in self.filters.items()}
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")}
        self.globals |= {"dict": _Dictionary(), "namespace": _SafeNamespace, "raise_exception": _raise}
        self.globals["strftime_now"] = now.strftime

    def charge(self, size: int) -> None:
        """Take the work of an operation from what remains."""
        self.remaining -= _STEP + size
        if self.remaining < 0:
            raise TooMuchWork(f"it does more than {MAX_WORK:,} characters' work; it may never end")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for concatenation in list(tree.find_all(nodes.Concat)):
            _replace(tree, concatenation, nodes.Filter(nodes.List(concatenation.nodes), "join", [], [], None, None))
        repeating: Any = tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))
        for repeated in repeating:
            size = sum(len(text.data) for text in repeated.find_all(nodes.TemplateData))
            charge = nodes.Call(nodes.EnvironmentAttribute("charge"), [nodes.Const(size)], [], None, None)
            repeated.body.insert(0, nodes.ExprStmt(charge, lineno=repeated.lineno))
        tree.set_environment(self)
        return tree

    def _output(self, value: Any) -> Any:
        self.charge(_size(value) if isinstance(value, str) else _deep_size(value, self.remaining))
        return value

    def call(self, __context, __function, *args, **kwargs):
        if __function != self.charge:
            method = getattr(__function, "__wrapped__", __function)  # the sandbox wraps `str.format`
            self._charge_arguments(
                getattr(method, "__name__", ""), getattr(method, "__self__", None), [*args, *kwargs.values()]
            )
            result = super().call(__context, __function, *args, **kwargs)
            self.charge(_size(result))
            return result
        return __function(*args)

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            self.charge(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            self._charge_arguments("format", left, [right])
        elif operator == "**":
            self.charge((_size(left) * _number(right)) ** 2)
        elif operator == "*":
            sizes = _size(left), _size(right)
            is_repeated = hasattr(left, "__len__") or hasattr(right, "__len__")
            self.charge(max(sizes) * max(_number(left), _number(right)) if is_repeated else sizes[0] * sizes[1])
        return super().call_binop(context, operator, left, right)

    def _charged_filter(self, name: str, function: Callable) -> Callable:
        first = int(hasattr(function, "jinja_pass_arg"))  # behind the context or the environment

        @wraps(function)
        def charged(*args, **kwargs):
            self._charge_arguments(name, args[first], [*args[first + 1 :], *kwargs.values()])
            result = function(*args, **kwargs)
            self.charge(_size(result))
            return result

        return charged

    def _charge_arguments(self, name: str, value: Any, arguments: list) -> None:
        """What a filter or a method is about to make of its arguments."""
        size = 0
        if name in _SHOW_CONTAINERS or name == "format_map":
            size += _deep_size([value, arguments], self.remaining)
        if name in _TAKE_WIDTHS:
            lines = 1 + (value.count("\n") + value.count("\t") if isinstance(value, str) else size)
            size += lines * max(map(_number, arguments), default=0)
        if name == "replace" and isinstance(value, str) and len(arguments) > 1:
            old, new = map(str, arguments[:2])
            size += value.count(old) * len(new)
        if name == "join":
            separator, items = (value, arguments[:1]) if isinstance(value, str) else (arguments[:1], [value])
            size += _deep_size(separator, self.remaining) * _deep_size(items, self.remaining)
        if name in ("format", "format_map") and isinstance(value, str):
            size += sum(map(int, _LONG_NUMBER.findall(value)))
            if "*" in value or re.search(r":[^}]*\{", value):
                size += sum(map(_number, _flat(arguments)))
        self.charge(size)


class _GenerationTag(Extension):
    """`{% generation %}`, with which templates mark the assistant's text."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Dictionary:
    """`dict` of a template, without the type's other attributes."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args) -> dict:
        return dict.fromkeys(*args)


class _SafeNamespace(Namespace):
    """`namespace` of a template, without names that begin with an underscore."""

    def __init__(*args, **kwargs):  # without a name for the first argument, so that every name can be set
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute {name!r}")


def _raise(message: str):
    raise TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _replace(tree: nodes.Node, old: nodes.Node, new: nodes.Node) -> None:
    """Put a node in the place of another, anywhere in a tree."""
    new.lineno = old.lineno
    for node in [tree, *tree.find_all(nodes.Node)]:
        for field, value in node.iter_fields():
            if value is old:
                setattr(node, field, new)
            elif isinstance(value, list):
                setattr(node, field, [new if item is old else item for item in value])


def _size(value: Any) -> int:
    """Characters of a text, items of a list, about the digits of a number."""
    if isinstance(value, int):
        return value.bit_length() // 3
    return len(value) if hasattr(value, "__len__") else 0


def _number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _flat(values: Iterable) -> list:
    """The values, and those of tuples among them."""
    return [item for value in values for item in (value if isinstance(value, tuple) else (value,))]


def _deep_size(value: Any, limit: int) -> int:
    """About the characters of a value written out; more than `limit` for any that exceeds it, or never ends."""
    size, pending = 0, [value]
    while pending and size <= limit:
        value = pending.pop()
        size += _ITEM + _size(value)
        if isinstance(value, Mapping):
            pending += value.keys()
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
    return size
