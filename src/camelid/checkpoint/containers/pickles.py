"""Runs pickles from untrusted files: the stack machine that torch_tensors.py, dcp.py and llama2_jax.py share.

A pickle is a program for a small stack machine. Python's own machine is not safe even with restricted globals: nine
bytes can allocate gigabytes, and hashing a deeply nested tuple overflows the stack. The machine here uses the parser of
pickletools, supports the operations that checkpoints need, and can call only the functions that it is given.
"""

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from camelid.errors import UserError

LITERALS = frozenset(
    """
    BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8
    """.split()
)
BYTES = frozenset("BINBYTES SHORT_BINBYTES BINBYTES8".split())
CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# How many values an operation takes from the stack: all above the last mark, or a fixed number.
TO_MARK = ("TUPLE", "APPENDS", "SETITEMS")
COUNTS = ("TUPLE1 APPEND BINPERSID", "TUPLE2 SETITEM STACK_GLOBAL REDUCE NEWOBJ BUILD", "TUPLE3")
TAKES: Mapping[str, int] = {name: count for count, names in enumerate(COUNTS, 1) for name in names.split()}


@dataclass(eq=False)  # so that its hash is its identity, which a file cannot control
class OpaqueObject:
    """Represents an object of a class that is not imported; nothing of the class is ever called."""

    name: str
    """module and name of the class"""
    arguments: tuple[Any, ...]
    state: Any = field(default_factory=dict)
    """the object's state if the program sets it, usually a dictionary of attributes"""


class OpaqueKey(OpaqueObject):
    """An opaque object that may be a dictionary key."""


def run_pickle(
    path: Path,
    program: Any,
    allowed: Mapping[str, Any],
    calls: Mapping[str, Callable[..., Any]],
    writer: str,
    held: Callable[[Any], Any] = lambda value: value,
    inert: re.Pattern[str] | None = None,
) -> Any:
    """Runs the next pickle in `program`, an open file, and returns the object that it creates.

    Args:
        path: the file, for messages.
        program: the open file.
        allowed: the globals that the pickle may refer to, by "module name".
        calls: implementations of further operations, by name; each is called with the values it takes from the stack.
        writer: the software that writes such files, for messages.
        held: maps bytes, right after they were read, to the value that represents them.
        inert: globals, as "module name", whose objects become OpaqueObjects.

    Raises UserError if the pickle refers to another global, and other exceptions if it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for operation, value, _ in pickletools.genops(program):
        name = operation.name
        base = marks.pop() if name in TO_MARK else len(stack) - TAKES.get(name, 0)
        if not 0 <= base <= len(stack):
            raise IndexError(f"{name} needs more values than the stack has")
        items = stack[base:]
        del stack[base:]
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if name in LITERALS:
                stack.append(value)
            case _ if name in BYTES:
                stack.append(held(value))
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                stack[-1].extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                _fill(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if name == "MEMOIZE" else value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL" | "STACK_GLOBAL":
                stack.append(_allowed(path, value if name == "GLOBAL" else " ".join(items), allowed, inert))
            case "REDUCE":
                stack.append(items[0](*items[1]))  # whatever can be called here came out of `allowed`
            case _ if name in calls:
                stack.append(calls[name](*items))
            case _:  # INST, OBJ and their like, which would call something as well
                raise ValueError(f"{name} {value}, which {writer} does not write")
    return stack.pop()


def _fill(table: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Other keys are unsafe: hashing a deep tuple overflows the stack, and large integers can be chosen to collide.
        named = isinstance(key, str | OpaqueKey) or (isinstance(key, int) and 0 <= key < 2**32)
        if not isinstance(table, dict) or not named or key in table:
            raise ValueError("a dictionary with an unsupported key, or with a repeated key")
        table[key] = value


def _allowed(path: Path, name: Any, allowed: Mapping[str, Any], inert: re.Pattern[str] | None) -> Any:
    if name not in allowed and inert is not None and inert.fullmatch(name):
        return partial(_record, name)
    if name not in allowed:
        raise UserError(
            f"{path} would call {printable(name.replace(' ', '.'))} when it is opened; it is refused",
            "If you trust the file, convert it to safetensors; or get the weights from another source.",
        )
    return allowed[name]


def _record(name: str, *arguments: Any) -> OpaqueObject:
    return OpaqueObject(name, arguments)


def printable(value: object) -> str:
    """Text from an untrusted file, escaped and truncated for a terminal."""
    return ascii(str(value))[1:-1][:200]
