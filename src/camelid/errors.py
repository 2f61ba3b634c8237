"""The exception that the command line reports without a traceback."""

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class UserError(ValueError):
    """An error that the user can correct: the problem and advice, one line each."""

    def __init__(self, problem: str, advice: str):
        super().__init__(f"{problem}\n{advice}")
        self.problem = problem
        self.advice = advice

    def __reduce__(self):
        # Exceptions are pickled by `args`, here the text alone; worker processes raise it in their parent.
        return type(self), (self.problem, self.advice)


_OPTIONS = (
    (r"--config PRESET_OR_JSON", "config=ModelConfig(...)"),
    (r"--config (\w+)", r'config=camelid.model.presets.preset("\1")'),
    (r"--overwrite\b", "overwrite=True"),
    (r"--resume\b", "resume=True"),
    (r"--dtype (\w+)", r'dtype="\1"'),
    (r"--sequence-length (\d+)", r"length=\1"),
    (r"--(tokenizer|format|dtype)\b", r"\1=..."),
    (r"--(run|out)\b", "args={'run': ...}"),
    (r"--(lora|dpo)\.(\w+) (\S+?)(?=[,.]? )", r"args={'\1': {'\2': \3}}"),
    (r"--(lora|dpo)\b(?!\.)", r"args={'\1': {}}"),
    (r"--fields ('[^']*')", r"dataset_options={'fields': \1}"),
    (r"--text-key (\S+)", r"dataset_options={'text_key': '\1'}"),
    (r"--template\b", "dataset_options={'template': ...}"),
)


def in_python(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Replaces options of the command line in UserErrors of a public function by its arguments.

    Only the text of the exception changes, which Python users see; the command line prints `problem` and `advice`.
    """

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            error.args = (with_arguments(str(error)),)
            raise

    return wrapped


def with_arguments(text: str) -> str:
    """A message with arguments of Python in place of options of the command line."""
    for option, argument in _OPTIONS:
        text = re.sub(option, argument, text)
    return text
