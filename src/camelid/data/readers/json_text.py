"""JSON with one object per line, and JSON arrays, one entry at a time."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from camelid.data.readers import lines
from camelid.data.readers.streams import open_stream
from camelid.errors import UserError

ARRAY = re.compile(r"\.json(\.gz|\.zst)?$", re.IGNORECASE)  # or JSON Lines: the first character distinguishes them
WHITESPACE = re.compile(r"[ \t\r\n]*")


def parse_line(content: bytes, location: str) -> Any:
    """The JSON value of a line, or a UserError if it is invalid."""
    try:
        return json.loads(content.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=_unique)
    except _DuplicateKey as error:
        return _duplicate(location, error)
    except (ValueError, RecursionError) as error:
        return UserError(f"{location}: not JSON in UTF-8: {error}", "Write one JSON object per line.")


def is_array(path: Path) -> bool:
    """Whether a file is one JSON array rather than JSON Lines."""
    if not ARRAY.search(path.name):
        return False
    with open_stream(path) as file:
        while block := file.read(io.DEFAULT_BUFFER_SIZE):
            if start := block.removeprefix(codecs.BOM_UTF8).lstrip():
                return start.startswith(b"[")
    return False


def entries(stream: io.BufferedIOBase, name: object) -> Iterator[tuple[str, Any]]:
    """Yields the location and the value of each entry of a JSON array; the value is a UserError if it is invalid.

    Raises UserError if the text is not a JSON array.
    """
    window = _Window(stream, name)
    window.expect("[")
    number = 0
    while not window.at("]"):
        number += 1
        if number > 1:
            window.expect(",")
        yield window.value(number)
    window.expect("]")
    if not window.ended():
        raise UserError(f"{name}, line {window.line}: text follows the array", "Write one array per file.")


class _DuplicateKey(ValueError):
    """A key that appears twice in one object; parsers differ in which value they keep."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values; raises _DuplicateKey if a key appears twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(
            f"the key {next(key for key in found if keys.count(key) > 1)!r} appears twice in one object"
        )
    return found


def _recorded(duplicates: list[_DuplicateKey], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values; a key that appears twice is recorded instead of raised.

    An exception would lose the end of the entry, and with it all entries that follow.
    """
    try:
        return _unique(pairs)
    except _DuplicateKey as error:
        duplicates.append(error)
        return dict(pairs)


def _duplicate(location: str, error: _DuplicateKey) -> UserError:
    return UserError(f"{location}: {error}", "Keep one of the two.")


class _Window:
    """The part of a JSON text that is in memory, and the position of the parser in it."""

    def __init__(self, stream: io.BufferedIOBase, name: object):
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._duplicates: list[_DuplicateKey] = []
        # The hook refers to the list only: a reference to the window would keep its text in memory.
        self._json = json.JSONDecoder(object_pairs_hook=partial(_recorded, self._duplicates))
        self._text, self._at, self._is_complete = "", 0, False
        self.line = 1

    def expect(self, sign: str) -> None:
        if not self.at(sign):
            found = repr(self._text[self._at : self._at + 20]) if self._at < len(self._text) else "the end"
            raise UserError(f"{self._name}, line {self.line}: expected {sign!r}, found {found}", "Fix this JSON array.")
        self._at += 1

    def at(self, sign: str) -> bool:
        return not self.ended() and self._text[self._at] == sign

    def ended(self) -> bool:
        """Skips whitespace and returns whether nothing else is left."""
        while True:
            match = WHITESPACE.match(self._text, self._at)
            assert match is not None  # it matches any text
            self._move(match.end())
            if self._at < len(self._text) or self._is_complete:
                return self._at == len(self._text)
            self._read()

    def value(self, number: int) -> tuple[str, Any]:
        self.ended()
        location = f"{self._name}, entry {number} (line {self.line})"
        while True:
            self._duplicates.clear()
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                # The digits of a number may continue in what is not read yet.
                if end < len(self._text) or self._is_complete:
                    self._move(end)
                    return location, _duplicate(location, self._duplicates[0]) if self._duplicates else value
            except (ValueError, RecursionError) as error:
                if self._is_complete or isinstance(error, RecursionError):
                    raise UserError(f"{location}: not JSON: {error}", "Fix it, or write JSON Lines.") from error
            if len(self._text) - self._at > lines.MAX_DOCUMENT:
                raise UserError(
                    f"{location} is invalid, or larger than {lines.MAX_DOCUMENT >> 20} MiB", "Fix it, or split it."
                )
            self._read()

    def _move(self, index: int) -> None:
        self.line += self._text.count("\n", self._at, index)
        self._at = index

    def _read(self) -> None:
        rest = self._text[self._at :]
        block = self._stream.read(max(lines.BLOCK, len(rest)))
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + block.count(b"\n", 0, error.start)
            raise UserError(f"{self._name}, line {line}: not UTF-8 ({error.reason})", "Save it as UTF-8.") from error
        self._text, self._at, self._is_complete = rest + text, 0, not block
