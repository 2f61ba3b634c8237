"""The text of `camelid COMMAND --help`."""

import dataclasses
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from tyro.conf import arg


def summary(command: Callable) -> str:
    """The first line of a command's docstring."""
    return _docstring(command).splitlines()[0]


def help_text(command: Callable) -> str:
    """A command's docstring before its arguments: the summary, the examples, and the other paragraphs as notes."""
    first, *paragraphs = _docstring(command).split("\n\n")
    examples = [line for text in paragraphs if _is_example(text) for line in text.splitlines()]
    notes = [text for text in paragraphs if not _is_example(text)]
    # tyro joins lines, except those that are indented; it does not wrap them.
    width = shutil.get_terminal_size().columns - 2
    wrapped = [line for text in notes for line in textwrap.wrap(" ".join(text.split()), width)]
    sections = [("Examples:", examples), ("Notes:", wrapped)]
    return "\n\n".join([first, *("\n  ".join([title, *lines]) for title, lines in sections if lines)])


def with_plain_help(command: Callable) -> Callable:
    """The command, annotated so that its help shows neither {None} as a value nor defaults without information."""
    hints = typing.get_type_hints(command, include_extras=True)

    def described(*args: Any, **kwargs: Any) -> Any:
        return command(*map(_declared, args), **{name: _declared(value) for name, value in kwargs.items()})

    signature = inspect.signature(command)
    parameters = [
        parameter.replace(annotation=_with_plain_help(hints[name], parameter.default))
        for name, parameter in signature.parameters.items()
    ]
    described.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    described.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    described.__doc__, described.__name__ = command.__doc__, command.__name__
    return described


def _with_plain_help(hint: Any, default: Any) -> Any:
    metadata = getattr(hint, "__metadata__", ())
    plain = get_args(hint)[0] if metadata else hint
    if dataclasses.is_dataclass(plain):
        return Annotated[(_with_plain_fields(plain), *metadata)] if metadata else _with_plain_fields(plain)
    if get_origin(plain) in (types.UnionType, typing.Union) and get_args(plain)[1:] == (types.NoneType,):
        # Before the annotation's own metadata, which takes precedence.
        hint = Annotated[(plain, arg(metavar=_metavar(get_args(plain)[0])), *metadata)]
    uninformative = any(default is nothing for nothing in (None, False, inspect.Parameter.empty)) or default in ((), "")
    return Annotated[hint, arg(help_behavior_hint="")] if uninformative else hint


def _with_plain_fields(cls: Any) -> Any:
    """A subclass of a dataclass whose fields are options, annotated in the same way."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [
        (field.name, _with_plain_help(hints[field.name], field.default), dataclasses.field(default=field.default))
        for field in dataclasses.fields(cls)
    ]
    namespace = {"__post_init__": _unchecked}
    return dataclasses.make_dataclass(
        cls.__name__, fields, bases=(cls,), namespace=namespace, frozen=True, kw_only=True
    )


def _unchecked(options: Any) -> None:
    """In place of the checks of a dataclass, whose errors tyro would report in a form of its own."""


def _declared(value: Any) -> Any:
    """An instance of the class that `_with_plain_fields` has extended, which checks its fields; others as they are."""
    if getattr(type(value), "__post_init__", None) is not _unchecked:
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return type(value).__mro__[1](**fields)


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    if get_origin(kind) is Mapping:
        return "ID=NUMBER,..."
    return "{True,False}" if kind is bool else kind.__name__.upper()


def _docstring(command: Callable) -> str:
    return inspect.cleandoc(command.__doc__ or "").split("\nArgs:")[0].strip()


def _is_example(line: str) -> bool:
    return line.startswith("camelid ") or "| camelid " in line
