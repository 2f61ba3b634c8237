"""Rendering of chat templates, as `apply_chat_template` of transformers renders them."""

import contextlib
import datetime
import functools
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.parser

from camelid.errors import UserError
from camelid.text.sandbox import Environment, TooLarge

_SECRET = secrets.token_hex(8)
_BEGIN, _END = f"<generation {_SECRET}>", f"</generation {_SECRET}>"


@dataclass(frozen=True)
class Rendered:
    """The output of a template."""

    text: str
    generated: tuple[tuple[int, int], ...]
    """Spans (start, end) of the text that are inside {% generation %} blocks."""


def render(source: str, values: dict[str, Any], now: datetime.datetime | None = None) -> Rendered:
    """Renders the template `source` with the variables `values`.

    `now` is the time that `strftime_now` formats; None is the current time. Raises UserError if the template does not
    compile, fails, exceeds a limit, or refuses the values by `raise_exception`.
    """
    values = {**values, "strftime_now": (now or datetime.datetime.now()).strftime}
    with _template_errors("does not compile"):
        template = _compiled(source, marked=False)
    with _template_errors("fails"):
        text = template.render(values)
        if re.search(r"\{%[-+]?\s*generation\b", source) is None:
            return Rendered(text, ())
        return Rendered(text, _generated_spans(_compiled(source, marked=True).render(values), text))


@functools.lru_cache(maxsize=128)
def _compiled(source: str, *, marked: bool) -> jinja2.Template:
    return _environment(marked).from_string(source)


@functools.cache
def _environment(marked: bool) -> Environment:
    extensions = [_MarkedGeneration if marked else _Generation, jinja2.ext.loopcontrols]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _raise_exception
    return environment


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, the tag of transformers around the messages of the assistant."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("write"), [], [], body).set_lineno(line)

    def write(self, caller: Callable[[], str]) -> str:
        return caller()


class _MarkedGeneration(_Generation):
    def write(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _generated_spans(marked: str, text: str) -> tuple[tuple[int, int], ...]:
    """The spans of `text` between the marks of `marked`, which is the same text with marks."""
    spans: list[tuple[int, int]] = []
    unmarked, length, start = [], 0, 0
    for part in re.split(f"({re.escape(_BEGIN)}|{re.escape(_END)})", marked):
        if part == _BEGIN:
            start = length
        elif part == _END:
            spans.append((start, length))
        else:
            unmarked.append(part)
            length += len(part)
    if "".join(unmarked) != text:
        raise jinja2.TemplateError("the output of its {% generation %} blocks is changed afterwards")
    return tuple(spans)


class _Refused(jinja2.TemplateError):
    """Raised by a template itself."""


def _raise_exception(message: Any) -> None:
    raise _Refused(str(message)[:1000])


@contextlib.contextmanager
def _template_errors(what: str) -> Iterator[None]:
    """Raises UserError for every error in the block: whatever a template does wrong, also Python's own errors."""
    advice = "Correct the template, or choose another one."
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template {what}, line {error.lineno}: {error.message}", advice) from error
    except _Refused as error:
        raise UserError(
            f"the chat template refuses this chat: {error}", "Correct the chat, or choose another template."
        ) from error
    except Exception as error:
        if missing := re.search(r"'(bos|eos|unk|pad)_token' is undefined", str(error)):
            advice = f"Name {missing[1]}_token in tokenizer_config.json, or choose a template without it."
        kind = "" if isinstance(error, TooLarge) else f"{type(error).__name__}: "
        raise UserError(f"the chat template {what}: {kind}{str(error)[:500]}", advice) from error
