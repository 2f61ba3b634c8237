"""The environment in which chat templates run: they come with checkpoints, and are not trusted.

Threat model. A template can reach nothing but the values that it is given, and can change none of them: attributes that
lead to Python's internals, modification of lists and dictionaries, and loading of files are refused, by
`jinja2.sandbox.ImmutableSandboxedEnvironment`. What remains is waste. The sizes of the template, of its output, of any
text or list that it builds by operators, blocks, joining and replacing, and of `range` are limited here, so that no
short expression takes gigabytes of memory. Time is not limited: nested loops may run for long. A program that renders
templates of strangers for others, such as a server, does so in a worker process that it can end.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.runtime
import jinja2.sandbox

MAX_SOURCE = 200_000
"""Characters of a template."""
MAX_SIZE = 20_000_000
"""Characters of the output and of every text, and items of every list, that a template builds. The largest `range` is
jinja2's own limit, `jinja2.sandbox.MAX_RANGE`."""
MAX_NUMBER = 2**63
"""Magnitude of the operands of `*`, `**` and `%`."""
MAX_EXPONENT = 64
MAX_INDENT = 20
SEQUENCES = (str, list, tuple)
# Short calls whose result has any length: none of the published templates uses one.
PADDING_METHODS = frozenset(["center", "expandtabs", "ljust", "rjust", "zfill"])
PADDING_FILTERS = frozenset(["batch", "center", "format", "indent", "round", "slice", "wordwrap", "xmlattr"])


class TooLarge(jinja2.TemplateError):
    """A template exceeds a limit."""


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits, and with the filter `tojson` of transformers."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any):
        # Compile-time evaluation of constants would have no limits.
        super().__init__(**options, optimized=False)
        self.filters = {name: f for name, f in self.filters.items() if name not in PADDING_FILTERS}
        self.filters |= {"join": _join, "replace": _replace, "tojson": _tojson}
        del self.globals["lipsum"]

    def from_string(self, source: str, *args: Any, **options: Any) -> jinja2.Template:
        if len(source) > MAX_SOURCE:
            raise TooLarge(f"it has {len(source):,} characters; at most {MAX_SOURCE:,} are allowed")
        tree = self.parse(source)
        for concatenation in tree.find_all(nodes.Concat):  # a ~ b, which is not among the operators above
            values = nodes.List(concatenation.nodes)
            concatenation.nodes = [nodes.Filter(values, "join", [], [], None, None)]
        tree.set_environment(self)
        return super().from_string(tree, *args, **options)

    def concat(self, parts: Iterable[str]) -> str:
        """Joins the output of a template, a macro, or a block."""
        return "".join(_limited(parts))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in PADDING_METHODS)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(f"the attribute {attribute} of {type(obj).__name__} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is not None:
            raise jinja2.exceptions.SecurityError("str.format is not allowed")
        return None

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        lengths = [len(value) for value in (left, right) if isinstance(value, SEQUENCES)]
        if operator == "+":
            _check_size(sum(lengths))
        elif operator == "*" and lengths:
            _check_size(math.prod(len(x) if isinstance(x, SEQUENCES) else x for x in (left, right)))
        elif not (_is_moderate(left) and _is_moderate(right)) or (operator == "**" and abs(right) > MAX_EXPONENT):
            raise jinja2.exceptions.SecurityError(f"{operator} is allowed for numbers of moderate size only")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str) and name == "join" and len(args) == 1:
            args = ([*_limited(args[0], len(text))],)
        elif isinstance(text, str) and name == "replace" and len(args) >= 2:
            _check_size(len(text) + text.count(args[0]) * len(args[1]))
        return super().call(__context, __obj, *args, **kwargs)


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TooLarge(f"it builds a value of more than {MAX_SIZE:,} characters or items")


def _limited(parts: Iterable[Any], separator: int = 0) -> Iterator[Any]:
    """The parts, while their length with separators of `separator` characters is within MAX_SIZE."""
    size = 0
    for part in parts:
        size += separator + _length(part)
        _check_size(size)
        yield part


def _length(value: Any) -> int:
    return len(value) if isinstance(value, SEQUENCES) else 0


def _is_moderate(value: Any) -> bool:
    return (isinstance(value, int | float) and abs(value) <= MAX_NUMBER) or isinstance(value, jinja2.Undefined)


@jinja2.pass_eval_context
def _join(eval_ctx: nodes.EvalContext, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    return jinja2.filters.sync_do_join(eval_ctx, _limited(value, len(str(d))), d, attribute)


@jinja2.pass_eval_context
def _replace(eval_ctx: nodes.EvalContext, s: str, old: str, new: str, count: int | None = None) -> str:
    _check_size(len(str(s)) + str(s).count(old) * len(new))
    return jinja2.filters.do_replace(eval_ctx, s, old, new, count)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own escapes < and & for HTML.
    if indent is not None and not (isinstance(indent, int) and indent <= MAX_INDENT):
        raise jinja2.exceptions.SecurityError(f"tojson is allowed for an indent of up to {MAX_INDENT} only")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
