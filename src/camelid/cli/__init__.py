"""The command line. Each command is a function; JAX is imported where a command needs it."""

import difflib
import functools
import inspect as inspect_module
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import NoReturn

import tyro

from camelid import interrupts
from camelid.cli.checkpoints import convert, diff
from camelid.cli.data import inspect as data_inspect
from camelid.cli.data import prepare as data_prepare
from camelid.cli.data_cache import cache as data_cache
from camelid.cli.deltas import delta_apply, delta_make
from camelid.cli.failures import explained
from camelid.cli.models import generate, inspect, perplexity
from camelid.cli.shared import path_options
from camelid.cli.training import demo, train
from camelid.errors import UserError

COMMANDS: dict[str, Callable] = {
    "generate": generate,
    "evaluate perplexity": perplexity,
    "train": train,
    "convert": convert,
    "diff": diff,
    "delta make": delta_make,
    "delta apply": delta_apply,
    "inspect": inspect,
    "data prepare": data_prepare,
    "data inspect": data_inspect,
    "data cache": data_cache,
    "demo": demo,
}

RESUMABLE = ("train", "demo", "data prepare")
"""commands that, when they are interrupted, need not begin again"""

QUIET = (tyro.conf.FlagCreatePairsOff,)  # --json, and no --no-json


def main() -> None:
    """Runs a command; errors of the user or the system are one line and one line of advice, with exit status 2."""
    warnings.formatwarning = _one_line
    words = sys.argv[1:]
    try:
        _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody to tell, and nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if (told := explained(error, _name(words) or "")) is None:
            raise
        _fail(told.problem, told.advice)


def _one_line(message: Warning | str, *about: object) -> str:
    """A warning for people, who do not read where in the code it was raised."""
    return f"warning: {' '.join(str(message).split())}\n"


def _fail(problem: str, advice: str) -> NoReturn:
    print(f"camelid: {problem}\n         {advice}", file=sys.stderr)
    sys.exit(2)


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        return print(_overview())
    if words[0] == "--version":
        from camelid import __version__

        return print(f"camelid {__version__}")
    name = _name(words)
    if name is None:
        if words[1:] in ([], ["-h"], ["--help"], ["help"]) and (group := _group(words[0])):
            return print(_overview(group))
        return _unknown(words)
    if name in RESUMABLE:
        interrupts.advise("the same command goes on from where it was")
    command, rest = COMMANDS[name], words[len(name.split()) :]
    if name == "train":
        rest, overrides = _split_overrides(rest)
        command = functools.partial(train, overrides=tuple(overrides))
    return tyro.cli(
        command,
        prog=f"camelid {name}",
        description=_paragraphs(COMMANDS[name]),
        args=rest,
        config=QUIET,
        registry=path_options(),
    )


def _name(words: list[str]) -> str | None:
    """The command among the words of a command line."""
    return next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)


def _group(word: str) -> dict[str, Callable]:
    """The commands that begin with a word of their own, such as `data`."""
    return {name: function for name, function in COMMANDS.items() if name.startswith(f"{word} ")}


def _overview(commands: Mapping[str, Callable] = COMMANDS) -> str:
    lines = [f"  {name:20} {command_help(function).splitlines()[0]}" for name, function in commands.items()]
    return "\n".join(
        [
            "camelid: the Llama family end to end in JAX",
            "",
            "usage: camelid COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "  camelid COMMAND --help shows its options with examples; camelid --version prints the version.",
        ]
    )


def _paragraphs(function: Callable) -> str:
    """A command's help with a line of its own for each example."""
    return re.sub(r"\n+", "\n\n", command_help(function))


def command_help(function: Callable) -> str:
    """What a command's docstring says before its arguments."""
    return inspect_module.cleandoc(function.__doc__ or "").split("\nArgs:")[0].strip()


def _unknown(words: list[str]) -> None:
    asked = " ".join(words[:2] if _group(words[0]) else words[:1])
    near = difflib.get_close_matches(asked, COMMANDS, 1)
    advice = f"Did you mean 'camelid {near[0]}'?" if near else f"Commands: {', '.join(COMMANDS)}."
    raise UserError(f"there is no command {asked!r}", advice)


def _split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """The words that are train's own, and the recipe fields among them with their values."""
    own = {f"--{name.replace('_', '-')}" for name in inspect_module.signature(train).parameters} | {"--help", "-h"}
    mine, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word.partition("=")[0].replace("_", "-") in own:
            mine.append(word)
        else:
            overrides.append(word)
            if "=" not in word and rest:
                overrides.append(rest.pop(0))
    return mine, overrides
