"""Jinja templates from strangers: what they write is bounded in time and memory, and they see only what they are given.

Templates have no `while`, so work comes from loops, calls, filters, operators and slices. Each of these is charged to a
budget, by what goes in or comes out, which stops a template between two steps, in whatever thread it runs; no value may
grow past a limit. What could make much of little in one step (`*` on texts, `**`, str.format, `center`, ...) is not
there at all.
"""

import contextlib
import contextvars
import datetime
import functools
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

from camelid.errors import UserError

MAX_TEMPLATE_CHARS = 200_000
SECONDS = 5.0
"""of the rendering thread's own time: a busy or sleeping machine stops no honest template"""
STR_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper".split()
)
FILTERS = frozenset(
    "abs attr capitalize count d default dictsort e escape first float indent int items join last length list lower "
    "map max min reject rejectattr replace reverse round safe select selectattr sort string title trim truncate unique "
    "upper wordcount".split()
)
# What these are told decides how much they write.
SIZED_FILTERS = frozenset(["indent", "round", "tojson"])
MOST_TOLD = 20
"""the largest number, and the length of the longest text"""
# These may go through what they are given once for every character of the text.
SLOW_METHODS = frozenset(["strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"])
UNITS_BETWEEN_LOOKS = 5000
"""looking at the clock takes longer than most of what is charged for"""

SECRET = secrets.token_hex(8)
GENERATION_BEGINS, GENERATION_ENDS = f"<generation {SECRET}>", f"</generation {SECRET}>"


@dataclass(frozen=True)
class Rendered:
    text: str
    generated: tuple[tuple[int, int], ...]
    """the spans of the text that stand in {% generation %} blocks"""


def render(source: str, values: dict[str, Any], now: datetime.datetime | None = None) -> Rendered:
    """What the template `source` makes of the values; UserError where it fails, refuses them, or goes too far.

    `now` is what strftime_now tells; left out, the clock does.
    """
    template, has_generation = _compiled(source)
    budget = _Budget(source, _size(values, 1 << 62), now)
    with _refusing("fails"), _bounded_by(budget):
        text = template.render(values)
        if not has_generation:
            return Rendered(text, ())
        budget.marks_generation = True
        return _without_marks(template.render(values), text)


class _TooMuch(jinja2.TemplateError):
    pass


class _Budget:
    """What one rendering may still do, counted in characters and items."""

    def __init__(self, source: str, given: int, now: datetime.datetime | None):
        self.largest = 1_000_000 + 4 * given
        self.now = now
        self.marks_generation = False
        # One turn of a loop can go through the whole template.
        self._step = 500 + len(source) // 8
        self._left = 20_000_000 + 100 * given
        self._next_look = self._left
        self._until = time.thread_time() + SECONDS

    def step(self) -> None:
        self.charge(self._step)

    def charge(self, cost: int) -> None:
        self._left -= cost
        if self._left < self._next_look:
            self._next_look = self._left - UNITS_BETWEEN_LOOKS
            if self._left < 0 or time.thread_time() > self._until:
                raise _TooMuch("it takes more time, or writes more, than any chat needs")

    def room_for(self, size: int) -> None:
        """Refuse a value before it is made, or pay for it."""
        if size > self.largest:
            raise _TooMuch(f"it makes a value of more than {self.largest:,} characters")
        self.charge(size)

    def size(self, value: Any) -> int:
        return len(value) if type(value) is str else _size(value, self.largest)


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def _bounded_by(budget: _Budget) -> Iterator[None]:
    token = _budget.set(budget)
    try:
        yield
    finally:
        _budget.reset(token)


@contextlib.contextmanager
def _refusing(fault: str) -> Iterator[None]:
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template {fault}, line {error.lineno}: {error.message}", "mend it, or name another template"
        ) from error
    except _Refused as error:
        raise UserError(
            f"the chat template refuses this chat: {error}", "mend the chat, or name another template"
        ) from error
    except Exception as error:  # whatever a template does wrong, Python's own errors too, is the template's fault
        missing = re.search(r"'(bos|eos|unk|pad)_token' is undefined", str(error))
        advice = "mend it, or name another template"
        if missing:
            advice = f"name {missing[1]}_token in tokenizer_config.json, or use a template without it"
        kind = "" if isinstance(error, _TooMuch) else f"{type(error).__name__}: "
        raise UserError(f"the chat template {fault}: {kind}{str(error)[:500]}", advice) from error


def _without_marks(marked: str, text: str) -> Rendered:
    """The spans between the marks of generation blocks."""
    spans: list[tuple[int, int]] = []
    pieces, at, begun = [], 0, None
    for piece in re.split(f"({re.escape(GENERATION_BEGINS)}|{re.escape(GENERATION_ENDS)})", marked):
        if piece == GENERATION_BEGINS:
            begun = at
        elif piece == GENERATION_ENDS and begun is not None:
            spans.append((begun, at))
        else:
            pieces.append(piece)
            at += len(piece)
    if "".join(pieces) != text:
        raise jinja2.TemplateError("what stands in its {% generation %} blocks is changed afterwards")
    return Rendered(text, tuple(spans))


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> tuple[jinja2.Template, bool]:
    """The template, and whether it may have {% generation %} blocks."""
    # Constants are folded, which is work too.
    with _refusing("does not compile"), _bounded_by(_Budget(source, 0, None)):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise _TooMuch(f"it has {len(source):,} characters, and {MAX_TEMPLATE_CHARS:,} are allowed")
        return _environment().from_string(source), re.search(r"\{%[-+]?\s*generation\b", source) is not None


class _Refused(jinja2.TemplateError):
    pass


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def concat(self, pieces: Iterable[str]) -> str:
        """What everything written is joined by: the whole text, and that of macros and blocks."""
        return "".join(map(_value, pieces))

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(f"the attribute {attribute} of {type(obj).__name__} is not allowed")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if (isinstance(obj, str) and attr not in STR_METHODS) or isinstance(obj, int | float | bytes):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is not None:
            raise jinja2.exceptions.SecurityError("str.format is not allowed")
        return None

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "+":
            budget.room_for(budget.size(left) + budget.size(right))
        elif operator == "**" or not (_is_moderate(left) and _is_moderate(right)):
            raise jinja2.exceptions.SecurityError(f"{operator} is allowed for moderate numbers only")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        # Each of the functions that it goes through holds a copy of them.
        budget.charge(10 * (len(args) + len(kwargs)))
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            if __obj.__name__ == "replace" and len(args) >= 2:
                budget.room_for(_replaced_size(text, args[0], args[1]))
            elif __obj.__name__ == "join" and args:
                args = (_joinable(args[0], text),)
            elif __obj.__name__ in SLOW_METHODS:
                _charge_search(text, *args, *kwargs.values())
        elif isinstance(__obj, jinja2.runtime.LoopContext):
            args = tuple(map(_turns, args))
        return _value(super().call(__context, __obj, *args, **kwargs))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Charged().visit(source), *args, **kwargs)


class _Charged(jinja2.visitor.NodeTransformer):
    """Puts a filter of ours around what loops, what is compared or looked up, and what makes a value of several."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered("_turns", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered("_concat", nodes.List(node.nodes, lineno=node.lineno, environment=node.environment))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered("_value", node)
        node.arg = _weighed(node.arg)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered("_value", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered("_value", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered("_value", node) if node.ctx == "load" else node


def _filtered(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    # What filters and calls give is paid for.
    return node if isinstance(node, nodes.Const | nodes.Filter | nodes.Call) else _filtered("_value", node)


def _turns(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _budget.get().step()
        yield value


def _value(value: Any) -> Any:
    budget = _budget.get()
    budget.room_for(budget.size(value))
    return value


def _concat(values: list[Any]) -> str:
    return "".join(map(str, _value(values)))


def _joinable(values: Iterable[Any], between: str) -> list[Any]:
    budget = _budget.get()
    values = list(values)
    budget.room_for(budget.size(values) + len(values) * len(between))
    return values


def _charge_search(text: str, *sought: Any) -> None:
    _budget.get().charge(sum(len(text) * len(each) // 64 for each in sought if isinstance(each, str)))


def _is_moderate(value: Any) -> bool:
    return (isinstance(value, int | float) and abs(value) <= 2**63) or isinstance(value, jinja2.Undefined)


def _replaced_size(text: str, old: Any, new: Any) -> int:
    return len(text) + text.count(str(old)) * len(str(new))


def _charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with what it gives paid for."""

    @functools.wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if name in SIZED_FILTERS:
            for told in (*args[1:], *kwargs.values()):
                if (abs(told) if isinstance(told, int | float) else budget.size(told)) > MOST_TOLD:
                    raise jinja2.exceptions.SecurityError(f"{name} is allowed for options up to {MOST_TOLD} only")
        found = function(*args, **kwargs)
        return map(_value, found) if isinstance(found, Iterator) else _value(found)

    return charged


def _charged_test(function: Callable[..., bool]) -> Callable[..., bool]:
    """The test, with what is compared in it paid for."""

    @functools.wraps(function)
    def charged(*args: Any) -> bool:
        if len(args) > 1:
            _value(args)
        return function(*args)

    return charged


@jinja2.pass_eval_context
def _join(eval_ctx: nodes.EvalContext, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    return jinja2.filters.sync_do_join(eval_ctx, _joinable(value, str(d)), d, attribute)


def _trim(value: str, chars: str | None = None) -> str:
    _charge_search(str(value), chars)
    return jinja2.filters.do_trim(value, chars)


@jinja2.pass_eval_context
def _replace(eval_ctx: nodes.EvalContext, s: str, old: str, new: str, count: int | None = None) -> str:
    _budget.get().room_for(_replaced_size(str(s), old, new))
    return jinja2.filters.do_replace(eval_ctx, s, old, new, count)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own spells < and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any):
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not have an attribute {name!r}")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{GENERATION_BEGINS}{text}{GENERATION_ENDS}" if _budget.get().marks_generation else text


@functools.cache
def _environment() -> _Environment:
    # Jinja's optimizer takes minutes for chains of a hundred filters.
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        finalize=_value,
    )
    own = {"join": _join, "replace": _replace, "tojson": _tojson, "trim": _trim}
    known = {name: own.get(name) or environment.filters[name] for name in FILTERS | own.keys()}
    environment.filters = {name: _charged_filter(name, function) for name, function in known.items()}
    environment.filters |= {"_turns": _turns, "_value": _value, "_concat": _concat}
    environment.tests = {name: _charged_test(function) for name, function in environment.tests.items()}
    del environment.globals["lipsum"]
    environment.globals |= {
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
    }
    return environment


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise jinja2.exceptions.SecurityError("strftime_now is allowed for up to 100 characters only")
    return (_budget.get().now or datetime.datetime.now()).strftime(form)


def _raise(message: Any) -> None:
    raise _Refused(str(message)[:1000])


def _size(value: Any, most: int) -> int:
    """The characters and items of a value with all that it holds, counted as often as it holds them, up to `most`."""
    total, stack = 0, [value]
    while stack and total <= most:
        held = stack.pop()
        total += 1
        if isinstance(held, str):
            total += len(held)
        elif isinstance(held, int):
            total += held.bit_length() // 8
        elif isinstance(held, dict | list | tuple | set | frozenset):
            total += len(held)
            if total <= most:
                stack.extend(held)
                stack.extend(held.values() if isinstance(held, dict) else ())
        elif isinstance(held, bytes | range):
            total += len(held)
        elif isinstance(held, jinja2.utils.Namespace):
            stack.append(getattr(held, "_Namespace__attrs"))  # noqa: B009
    return total
