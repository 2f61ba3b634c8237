"""Documents of text files and JSON, plain or compressed, a block at a time.

A file is read in blocks that end where a document does, so that a block can be read by itself: no more than one of them
is in memory, and blocks may go to several processes.
"""

import codecs
import gzip
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from camelid.data.config import Source
from camelid.errors import UserError
from camelid.extras import install_hint
from camelid.inputs import encoding_of

BLOCK = 2**22  # bytes; 100 MB give two processes a dozen each
MAX_DOCUMENT = 2**26  # bytes; the tokenizer needs about a hundred times as many
JSON = re.compile(r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$", re.IGNORECASE)
ARRAY = re.compile(r"\.json(\.gz|\.zst)?$", re.IGNORECASE)  # may also be JSON lines: its first character says
TEXT = re.compile(r"\.txt(\.gz|\.zst)?$", re.IGNORECASE)
SEPARATED = re.compile(r"\.(csv|tsv)(\.gz|\.zst)?$", re.IGNORECASE)
PACKED = re.compile(r"\.(gz|zst)$", re.IGNORECASE)

# What stands between two documents.
LINE = re.compile(rb"\n")
BLANK_LINE = re.compile(rb"\n(?:[ \t\r]*\n)+")  # what begins with a certain byte is found ten times as fast
ARTICLE = re.compile(rb"\n(?= = (?!= )[^\n]*(?<! =) = \r?\n)")  # before a heading of WikiText's first level
NEVER = re.compile(rb"\0(?!)")  # the byte makes the search fast

NEWLINE = b"\n"
BLANKS = re.compile(r"[ \t\r\n]*")
BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")


def border(path: Path, source: Source) -> re.Pattern[bytes]:
    """What stands between the documents of a file."""
    if not TEXT.search(path.name) or source.split == "line":
        return LINE
    if source.split == "blank_line":
        return BLANK_LINE
    if source.split.startswith("marker:"):
        return re.compile(re.escape(source.split.removeprefix("marker:").encode()))
    return ARTICLE if source.clean == "wikitext" else NEVER


def opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """The bytes of a file, uncompressed; text with a byte-order mark of UTF-16 or UTF-32 becomes UTF-8."""
    stream = _unpacked(path)
    try:
        encoding = encoding_of(stream.peek(4)[:4])
    except BaseException:
        stream.close()
        raise
    return stream if encoding.startswith("utf-8") else io.BufferedReader(_Recoded(stream, encoding, path))


def _unpacked(path: Path) -> gzip.GzipFile | io.BufferedReader:
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(path)
        case ".zst":
            return io.BufferedReader(_Zstandard(path))
    return path.open("rb")


def from_the_beginning(path: Path) -> bool:
    """Whether a file can only be read from its beginning: it is compressed, or in UTF-16 or UTF-32."""
    if PACKED.search(path.name):
        return True
    with path.open("rb") as file:
        return not encoding_of(file.read(4)).startswith("utf-8")


def blocks(stream: io.BufferedIOBase, between: re.Pattern[bytes], name: object) -> Iterator[tuple[int, bytes]]:
    """A stream in blocks of about BLOCK bytes that end where a document does, each with the number of its first line.

    Raises UserError where a document is longer than MAX_DOCUMENT.
    """
    data, line, ended = b"", 1, False
    while True:
        cut = _cut(data, between)
        while cut is None and not ended:
            if len(data) > BLOCK + MAX_DOCUMENT:
                begin = max((match.end() for match in between.finditer(data, 0, BLOCK)), default=0)
                raise too_long(f"{name}, line {line + data.count(NEWLINE, 0, begin)}")
            # Twice as much each time, or a long document would be searched again and again.
            more = stream.read(max(BLOCK, len(data)))
            data, ended = data + more, not more
            cut = _cut(data, between)
        if not data:
            return
        end = len(data) if cut is None else cut
        yield line, data[:end]
        line += data.count(NEWLINE, 0, end)
        data = data[end:]


def _cut(data: bytes, between: re.Pattern[bytes]) -> int | None:
    match = between.search(data, BLOCK - 1)
    # Blank lines may go on in what is not read yet.
    return None if match is None or match.end() == len(data) else match.end()


def documents(line: int, data: bytes, between: re.Pattern[bytes], name: object) -> Iterator[tuple[int, bytes]]:
    """The documents of a block that are not blank, each with the number of its line.

    Where they are cut, line breaks at their ends belong to the border.
    """
    begin = 0
    if between is BLANK_LINE and (blank := BLANK_LINES.match(data)):
        begin = blank.end()
        line += data.count(NEWLINE, 0, begin)
    while begin < len(data):
        match = between.search(data, begin)
        end = len(data) if match is None else match.start()
        piece = data[begin:end]
        if len(piece) > MAX_DOCUMENT:
            raise too_long(f"{name}, line {line}")
        if piece and not piece.isspace():
            if between is NEVER:
                yield line, piece
            else:
                kept = piece.lstrip(b"\r\n")
                yield line + piece.count(NEWLINE, 0, len(piece) - len(kept)), kept.rstrip(b"\r\n")
        after = len(data) if match is None else match.end()
        line += data.count(NEWLINE, begin, after)
        begin = after


def too_long(place: object) -> UserError:
    return UserError(
        f"{place}: a document of more than {MAX_DOCUMENT >> 20} MiB",
        "Cut it: for a .txt file, split = 'line', 'blank_line' or 'marker:STRING' says where.",
    )


def text(content: bytes, name: object, line: int) -> tuple[str, str | UserError]:
    """A document's place and its text, or what is wrong with it."""
    try:
        found = content.decode("utf-8-sig" if line == 1 else "utf-8")
        wrong = content.find(b"\0")
        if wrong < 0:
            return f"{name}, line {line}", found
        problem = "a NUL byte"
    except UnicodeDecodeError as error:
        wrong, problem = error.start, f"not UTF-8 ({error.reason})"
    place = f"{name}, line {line + content.count(NEWLINE, 0, wrong)}"
    return place, UserError(f"{place}: {problem}", "Save it as text in UTF-8.")


def row(content: bytes, place: str) -> Any:
    """The JSON of a line, or what is wrong with it."""
    try:
        return json.loads(content.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=_unique)
    except _Repeated as error:
        return _twice(place, error)
    except (ValueError, RecursionError) as error:
        return UserError(f"{place}: no JSON in UTF-8: {error}", "Write one JSON object on each line.")


class _Repeated(ValueError):
    """A key that stands twice in one object; readers differ in which of the two they take."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; raises _Repeated where a key stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(f"the key {next(key for key in found if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _noted(repeated: list[_Repeated], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; a key that stands twice is noted and not raised.

    An error would hide where an entry of an array ends, and with it all entries that follow.
    """
    try:
        return _unique(pairs)
    except _Repeated as error:
        repeated.append(error)
        return dict(pairs)


def _twice(place: str, error: _Repeated) -> UserError:
    return UserError(f"{place}: {error}", "Keep one of the two.")


def is_array(path: Path) -> bool:
    """Whether a file is one JSON array, not JSON lines."""
    if not ARRAY.search(path.name):
        return False
    with opened(path) as file:
        while block := file.read(io.DEFAULT_BUFFER_SIZE):
            if begun := block.removeprefix(codecs.BOM_UTF8).lstrip():
                return begun.startswith(b"[")
    return False


def entries(stream: io.BufferedIOBase, name: object) -> Iterator[tuple[str, Any]]:
    """The place and the value of each entry of a JSON array, or what is wrong with it, one at a time.

    Raises UserError where the text is not a JSON array.
    """
    window = _Window(stream, name)
    window.expect("[")
    number = 0
    while not window.sees("]"):
        number += 1
        if number > 1:
            window.expect(",")
        place, value = window.value(number)
        yield place, value
    window.expect("]")
    if not window.ended():
        raise UserError(f"{name}, line {window.line}: more stands after the array", "Keep one array in a file.")


class _Window:
    """The part of a JSON text that is in memory."""

    def __init__(self, stream: io.BufferedIOBase, name: object):
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._repeated: list[_Repeated] = []
        # The hook knows no more than the list: one that knew the window would keep its text in memory.
        self._json = json.JSONDecoder(object_pairs_hook=partial(_noted, self._repeated))
        self._text, self._place, self._whole = "", 0, False
        self.line = 1

    def expect(self, sign: str) -> None:
        if not self.sees(sign):
            found = repr(self._text[self._place : self._place + 20]) if self._place < len(self._text) else "its end"
            raise UserError(
                f"{self._name}, line {self.line}: {found} where {sign!r} should be", "Repair this JSON array."
            )
        self._place += 1

    def sees(self, sign: str) -> bool:
        return not self.ended() and self._text[self._place] == sign

    def ended(self) -> bool:
        """Whether nothing but blanks is left."""
        while True:
            match = BLANKS.match(self._text, self._place)
            assert match is not None  # of any text
            self._move(match.end())
            if self._place < len(self._text) or self._whole:
                return self._place == len(self._text)
            self._read()

    def value(self, number: int) -> tuple[str, Any]:
        self.ended()
        place = f"{self._name}, entry {number} (line {self.line})"
        while True:
            self._repeated.clear()
            try:
                value, end = self._json.raw_decode(self._text, self._place)
                # A number may go on in what is not read yet.
                if end < len(self._text) or self._whole:
                    self._move(end)
                    return place, _twice(place, self._repeated[0]) if self._repeated else value
            except (ValueError, RecursionError) as error:
                if self._whole or isinstance(error, RecursionError):
                    raise UserError(f"{place}: no JSON: {error}", "Repair it, or write JSON lines.") from error
            if len(self._text) - self._place > MAX_DOCUMENT:
                raise UserError(f"{place} is broken, or larger than {MAX_DOCUMENT >> 20} MiB", "Repair it, or cut it.")
            self._read()

    def _move(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _read(self) -> None:
        rest = self._text[self._place :]
        block = self._stream.read(max(BLOCK, len(rest)))
        try:
            self._text, self._place, self._whole = rest + self._decoder.decode(block, final=not block), 0, not block
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + block.count(NEWLINE, 0, error.start)
            raise UserError(f"{self._name}, line {line}: not UTF-8 ({error.reason})", "Save it in UTF-8.") from error


class _Recoded(io.RawIOBase):
    """A stream of text in UTF-16 or UTF-32, as UTF-8."""

    def __init__(self, stream: io.BufferedIOBase, encoding: str, path: Path):
        self._stream, self._encoding, self._path = stream, encoding, path
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready, self._ended = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            data = self._stream.read(io.DEFAULT_BUFFER_SIZE)
            self._ended = not data
            try:
                self._ready = self._decoder.decode(data, final=self._ended).encode()
            except UnicodeError as error:
                raise UserError(f"{self._path}: not {self._encoding} ({error})", "Save it as UTF-8.") from error
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Zstandard(io.RawIOBase):
    """What a .zst file holds; unlike the library's own reader, it notices that a file is cut short."""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{path} needs zstandard: {error}", install_hint("data")) from error
        # What `zstd --long=31` packs can be read with this much only; other files take less.
        self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._error = zstandard.ZstdError
        self._path, self._file = path, path.open("rb")
        self._object = None
        self._ready, self._left = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # A kilobyte can hold 32 megabytes, so no more at once.
            packed = self._left or self._file.read(1024)
            self._left = b""
            if not packed and self._object is None:
                return 0
            if not packed:
                raise EOFError("it is cut short")
            self._object = self._object or self._frame()
            try:
                self._ready = self._object.decompress(packed)
            except self._error as error:
                raise OSError(str(error)) from error
            if self._object.eof:
                self._left, self._object = self._object.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
