"""Checks the arguments of a command, so that each mistake is reported in one line with one line of advice.

tyro parses the arguments afterwards. Its own reports are boxes of several lines, which its public API cannot change.
"""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from tyro.conf import Positional, Suppress

from camelid.errors import UserError

OTHER_VALUES = {
    "huggingface": "hf",
    "transformers": "hf",
    "safetensors": "hf",
    "llama.cpp": "gguf",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
"""What other systems call the values of options; suggested, never accepted."""
POSITIONAL, SUPPRESS = get_args(Positional[int])[1], get_args(Suppress[int])[1]
NUMBERS = {int: ("an integer", "1"), float: ("a number", "0.5")}


@dataclasses.dataclass(frozen=True)
class Argument:
    """A positional argument, or an option."""

    name: str
    """`--max-new-tokens` of an option, and MODEL of a positional argument"""
    metavar: str
    kind: Any
    """type of a value"""
    positional: bool
    required: bool
    many: bool
    """whether a positional argument takes several words"""

    @property
    def is_flag(self) -> bool:
        """Whether it is an option without a value."""
        return self.kind is bool and not self.positional

    @property
    def choices(self) -> tuple[str, ...]:
        """The values in the order of the help, if there is a limited number of them."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()


def check_arguments(command: Callable, name: str, words: Sequence[str]) -> None:
    """Raises UserError for the first word that the command called `name` does not accept, or that is missing."""
    arguments = list(_arguments(command))
    options = {argument.name: argument for argument in arguments if not argument.positional}
    waiting = [argument for argument in arguments if argument.positional]
    help_advice = f"camelid {name} --help shows examples and options."
    given, rest, only_positional = set(), list(words), False
    if any(word in ("-h", "--help") for word in _before_marker(words)):
        return
    while rest:
        word = rest.pop(0)
        if word == "--" and not only_positional:
            only_positional = True
        elif not only_positional and _is_option(word):
            option, equals, value = word.partition("=")
            option = option.replace("_", "-")
            if (argument := options.get(option)) is None:
                raise _unknown_option(option, list(options), help_advice)
            given.add(option)
            if argument.is_flag:
                if equals:
                    raise UserError(f"{option} takes no value", f"Write {option} alone.")
                continue
            if not equals:
                if not rest or rest[0] == "--" or _is_option(rest[0]):
                    raise UserError(f"{option} has no value", f"Write {option} {_example(argument)}.")
                value = rest.pop(0)
            _check_value(argument, value)
        elif waiting:
            given.add(waiting[0].name)
            if not waiting[0].many:
                waiting.pop(0)
        elif _lacks_dashes(word, options):
            key, _, value = word.partition("=")
            raise UserError(f"{word!r} is not an option", f"Write {f'--{key} {value}'.rstrip()}.")
        else:
            raise UserError(f"there is one argument too many: {word!r}", help_advice)
    for argument in arguments:
        if argument.required and argument.name not in given:
            what = argument.metavar if argument.positional else f"{argument.name} {argument.metavar}"
            raise UserError(f"{name} needs {what}", help_advice)


def _lacks_dashes(word: str, options: Collection[str]) -> bool:
    """Whether a word is an option, or an override of a recipe such as train.steps=5, without the dashes before it."""
    key, equals, _ = word.partition("=")
    return f"--{key.replace('_', '-')}" in options or bool(equals and "." in key)


def _before_marker(words: Sequence[str]) -> Sequence[str]:
    """The words before `--`, after which all words are positional arguments."""
    return words[: words.index("--")] if "--" in words else words


def _is_option(word: str) -> bool:
    """Whether a word is an option; negative numbers and texts such as "- a" are values."""
    return word.startswith("-") and word.lstrip("-")[:1].isalpha() and word.lower() not in ("-inf", "-infinity", "-nan")


def _arguments(command: Callable) -> Iterator[Argument]:
    """The arguments of a command, in the order of its parameters."""
    hints = typing.get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind = get_args(hints[name])[0] if hasattr(hints[name], "__metadata__") else hints[name]
        if dataclasses.is_dataclass(kind):
            types_of_fields = typing.get_type_hints(kind, include_extras=True)
            for field in dataclasses.fields(kind):
                yield _argument(field.name, types_of_fields[field.name], field.default)
        elif SUPPRESS not in getattr(hints[name], "__metadata__", ()):
            yield _argument(name, hints[name], parameter.default)


def _argument(name: str, hint: Any, default: Any) -> Argument:
    metadata = getattr(hint, "__metadata__", ())
    kind = get_args(hint)[0] if metadata else hint
    arms = get_args(kind)
    many = get_origin(kind) is tuple
    if many:
        kind = arms[0]
    elif get_origin(kind) in (types.UnionType, typing.Union) and types.NoneType in arms:
        kind = Literal["True", "False"] if arms[0] is bool else arms[0]
    names = [each.name for each in metadata if getattr(each, "name", None)]
    metavars = [each.metavar for each in metadata if getattr(each, "metavar", None)]
    option = f"--{'no-' if default is True else ''}{(names or [name])[0].replace('_', '-')}"
    metavar = metavars[0].strip("[]") if metavars else getattr(kind, "__name__", "value").upper()
    positional = POSITIONAL in metadata
    required = default in (inspect.Parameter.empty, dataclasses.MISSING)
    return Argument(metavar if positional else option, metavar, kind, positional, required, many)


def _check_value(argument: Argument, value: str) -> None:
    if argument.choices and value not in argument.choices:
        what = "format" if argument.name in ("--to", "--from") else "value"
        near = OTHER_VALUES.get(value.lower()) or next(
            iter(difflib.get_close_matches(value, argument.choices, 1)), None
        )
        suggestion = f"Did you mean {near!r}? " if near in argument.choices else ""
        listed = f"The {what}s are {', '.join(argument.choices)}."
        raise UserError(f"{argument.name} has no {what} {value!r}", suggestion + listed)
    if get_origin(argument.kind) is Mapping:
        numbers_by_id(value)
    if argument.kind in NUMBERS:
        try:
            argument.kind(value)
        except ValueError:
            raise UserError(
                f"{argument.name} {value!r} is not {NUMBERS[argument.kind][0]}",
                f"Write {argument.name} {_example(argument)}, for example.",
            ) from None


def numbers_by_id(text: str) -> dict[int, float]:
    """The value of an option such as --logit-bias. Raises UserError if it is not of the form ID=NUMBER,..."""
    try:
        pairs = [pair.split("=") for pair in text.split(",")]
        return {int(key): float(number) for key, number in pairs}
    except ValueError:
        raise UserError(f"{text!r} is not a list of numbers by token id", "Write for example 29871=-5,13=2.") from None


def _example(argument: Argument) -> str:
    """A value of the option."""
    if argument.choices:
        return argument.choices[0]
    return NUMBERS[argument.kind][1] if argument.kind in NUMBERS else argument.metavar


def _unknown_option(option: str, known: list[str], advice: str) -> UserError:
    near = difflib.get_close_matches(option, known, 1)
    if near:
        advice = f"Did you mean {near[0]!r}?"
    elif not option.startswith("--"):
        advice = f"Options begin with '--'; write -- before a text that begins with '-'. {advice}"
    return UserError(f"there is no option {option!r}", advice)
