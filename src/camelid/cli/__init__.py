"""The command line. Each command is a function, which imports JAX only when it needs it."""

import difflib
import functools
import inspect as inspect_module
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping
from typing import NoReturn

import tyro

from camelid import interrupts
from camelid.cli.arguments import check_arguments
from camelid.cli.checkpoints import convert, diff
from camelid.cli.data import inspect as data_inspect
from camelid.cli.data import prepare as data_prepare
from camelid.cli.data_cache import cache as data_cache
from camelid.cli.deltas import delta_apply, delta_make
from camelid.cli.failures import as_user_error
from camelid.cli.finetuning import finetune
from camelid.cli.help import help_text, summary, with_plain_help
from camelid.cli.models import generate, inspect, perplexity
from camelid.cli.packaged_recipes import copy_recipe, list_recipes, show_recipe
from camelid.cli.runs import plot, runs
from camelid.cli.shared import parsers
from camelid.cli.training import demo, train
from camelid.errors import UserError

COMMANDS: dict[str, Callable] = {
    "generate": generate,
    "evaluate perplexity": perplexity,
    "finetune": finetune,
    "train": train,
    "runs": runs,
    "plot": plot,
    "recipes ls": list_recipes,
    "recipes show": show_recipe,
    "recipes cp": copy_recipe,
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

RESUMABLE = ("train", "finetune", "demo", "data prepare")
"""Commands that continue where they were interrupted."""

TAKES_OVERRIDES = ("train", "finetune", "data inspect")
"""Commands whose other options are fields of the recipe."""

OTHER_NAMES = {
    "fine-tune": "finetune",
    "tune": "finetune",
    "pretrain": "train",
    "fit": "train",
    "sft": "finetune",
    "lora": "finetune",
    "dpo": "finetune",
    "recipe": "recipes ls",
    "ls": "recipes ls",
    "cp": "recipes cp",
    "run": "train",
    "eval": "evaluate perplexity",
    "ppl": "evaluate perplexity",
    "perplexity": "evaluate perplexity",
    "infer": "generate",
    "inference": "generate",
    "sample": "generate",
    "complete": "generate",
    "export": "convert",
    "quantize": "convert",
    "verify": "convert",
    "compare": "diff",
    "merge": "delta apply",
    "preprocess": "data prepare",
    "tokenize": "data prepare",
    "prepare": "data prepare",
    "info": "inspect",
    "show": "inspect",
    "quickstart": "demo",
    "status": "runs",
}
"""What other systems call the commands; suggested, never accepted."""


def main() -> None:
    """Runs the command of sys.argv.

    Errors of the user and of the system are reported in one line, with one line of advice, and exit status 2.
    """
    warnings.formatwarning = _format_warning
    arguments = sys.argv[1:]
    try:
        _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output is gone: there is nobody to tell, and nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if (explained := as_user_error(error, _command_name(arguments) or "")) is None:
            raise
        _fail(explained.problem, explained.advice)


def _format_warning(message: Warning | str, *location: object) -> str:
    """A warning in one line, without the location in the code."""
    return f"warning: {' '.join(str(message).split())}\n"


def _fail(problem: str, advice: str) -> NoReturn:
    print(f"camelid: {problem}\n         {advice}", file=sys.stderr)
    sys.exit(2)


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [*arguments[1:], "--help"]  # camelid help train
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return print(_overview())
    if arguments[0] == "--version":
        from camelid import __version__

        return print(f"camelid {__version__}")
    if arguments == ["recipes"]:
        arguments = ["recipes", "ls"]
    name = _command_name(arguments)
    if name is None:
        if arguments[1:] in ([], ["-h"], ["--help"], ["help"]) and (group := _group(arguments[0])):
            return print(_overview(group))
        raise _unknown_command(arguments)
    if name in RESUMABLE:
        interrupts.set_advice(interrupts.RESUME)
    rest, overrides = arguments[len(name.split()) :], []
    if name in TAKES_OVERRIDES:
        rest, overrides = _split_overrides(name, rest)
    check_arguments(COMMANDS[name], name, rest)
    command = with_plain_help(COMMANDS[name])
    return tyro.cli(
        functools.partial(command, overrides=tuple(overrides)) if overrides else command,
        prog=f"camelid {name}",
        description=help_text(COMMANDS[name]),
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff,),  # --json has no --no-json
        registry=parsers(),
    )


def _command_name(arguments: list[str]) -> str | None:
    """The command that the arguments begin with, if there is one."""
    return next((name for name in COMMANDS if arguments[: len(name.split())] == name.split()), None)


def _group(word: str) -> dict[str, Callable]:
    """The commands that begin with a common word, such as `data`."""
    return {name: function for name, function in COMMANDS.items() if name.startswith(f"{word} ")}


def _overview(commands: Mapping[str, Callable] = COMMANDS) -> str:
    width, indent = shutil.get_terminal_size().columns, " " * 23
    lines = [
        textwrap.fill(summary(function), width, initial_indent=f"  {name:20} ", subsequent_indent=indent)
        for name, function in commands.items()
    ]
    return "\n".join(
        [
            "camelid: the Llama family end to end in JAX",
            "",
            "usage: camelid COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "  camelid COMMAND --help shows examples and options;",
            "  camelid --version prints the version.",
        ]
    )


def _unknown_command(arguments: list[str]) -> UserError:
    name = " ".join(arguments[:2] if _group(arguments[0]) else arguments[:1])
    nearest = difflib.get_close_matches(name, COMMANDS, 1)
    suggestion = OTHER_NAMES.get(name.lower()) or next(iter(nearest), None)
    advice = f"Did you mean 'camelid {suggestion}'?" if suggestion else f"The commands are {', '.join(COMMANDS)}."
    return UserError(f"there is no command {name!r}", advice)


def _split_overrides(name: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separates the options of a command itself from overrides of recipe fields, `--table.field VALUE`."""
    parameters = inspect_module.signature(COMMANDS[name]).parameters
    own = {f"--{parameter.replace('_', '-')}" for parameter in parameters} | {"--help", "-h"}
    options, overrides, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        option = argument.partition("=")[0]
        # Only `train` has so many fields as options that an unknown one is more likely a field.
        is_field = argument.startswith("--") and (name == "train" or "." in option)
        if not is_field or option.replace("_", "-") in own:
            options.append(argument)
        else:
            overrides.append(argument)
            if "=" not in argument and rest:
                overrides.append(rest.pop(0))
    return options, overrides
