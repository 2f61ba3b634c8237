"""Documents of text files, one block at a time.

A file is read in blocks that end at the end of a document, so that each block can be read independently. Only one of
them is in memory, and several processes can read different blocks.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path

from camelid.data.config import Source
from camelid.errors import UserError

BLOCK = 2**22  # bytes; 100 MB are a dozen blocks for each of two processes
MAX_DOCUMENT = 2**26  # bytes; the tokenizer needs about a hundred times as much memory
JSON = re.compile(r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$", re.IGNORECASE)
TEXT = re.compile(r"\.txt(\.gz|\.zst)?$", re.IGNORECASE)
SEPARATED = re.compile(r"\.(csv|tsv)(\.gz|\.zst)?$", re.IGNORECASE)

# Separators between documents.
LINE = re.compile(rb"\n")
BLANK_LINE = re.compile(rb"\n(?:[ \t\r]*\n)+")  # a pattern with a fixed first byte is found ten times as fast
ARTICLE = re.compile(rb"\n(?= = (?!= )[^\n]*(?<! =) = \r?\n)")  # before a level-1 heading of WikiText
MATCHES_NOTHING = re.compile(rb"\0(?!)")  # the fixed first byte makes the search fast

NEWLINE = b"\n"
BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")


def separator(path: Path, source: Source) -> re.Pattern[bytes]:
    """The pattern that separates the documents of a file."""
    if not TEXT.search(path.name) or source.split == "line":
        return LINE
    if source.split == "blank_line":
        return BLANK_LINE
    if source.split.startswith("marker:"):
        return re.compile(re.escape(source.split.removeprefix("marker:").encode()))
    return ARTICLE if source.clean == "wikitext" else MATCHES_NOTHING


def blocks(stream: io.BufferedIOBase, between: re.Pattern[bytes], name: object) -> Iterator[tuple[int, bytes]]:
    """Yields a stream in blocks of about BLOCK bytes that end with a document, and the number of their first lines.

    Raises UserError if a document is longer than MAX_DOCUMENT.
    """
    data, line, ended = b"", 1, False
    while True:
        cut = _cut(data, between)
        while cut is None and not ended:
            if len(data) > BLOCK + MAX_DOCUMENT:
                begin = max((match.end() for match in between.finditer(data, 0, BLOCK)), default=0)
                raise too_long(f"{name}, line {line + data.count(NEWLINE, 0, begin)}")
            # Twice as much each time: otherwise a long document would be searched again and again.
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
    # Blank lines may continue in what is not read yet.
    return None if match is None or match.end() == len(data) else match.end()


def documents(line: int, data: bytes, between: re.Pattern[bytes], name: object) -> Iterator[tuple[int, bytes]]:
    """Yields the documents of a block that are not blank, and the numbers of their lines.

    `line` is the number of the first line of the block. Line breaks around a separator belong to it.
    """
    begin = 0
    if between is BLANK_LINE and (blank := BLANK_LINES.match(data)):
        begin = blank.end()
        line += data.count(NEWLINE, 0, begin)
    while begin < len(data):
        match = between.search(data, begin)
        end = len(data) if match is None else match.start()
        content = data[begin:end]
        if len(content) > MAX_DOCUMENT:
            raise too_long(f"{name}, line {line}")
        if content and not content.isspace():
            if between is MATCHES_NOTHING:
                yield line, content
            else:
                kept = content.lstrip(b"\r\n")
                yield line + content.count(NEWLINE, 0, len(content) - len(kept)), kept.rstrip(b"\r\n")
        after = len(data) if match is None else match.end()
        line += data.count(NEWLINE, begin, after)
        begin = after


def decode(content: bytes, name: object, line: int) -> tuple[str, str | UserError]:
    """Returns the location and the text of a document; the text is a UserError if it is invalid."""
    try:
        found = content.decode("utf-8-sig" if line == 1 else "utf-8")
        invalid = content.find(b"\0")
        if invalid < 0:
            return f"{name}, line {line}", found
        problem = "a NUL byte"
    except UnicodeDecodeError as error:
        invalid, problem = error.start, f"not UTF-8 ({error.reason})"
    location = f"{name}, line {line + content.count(NEWLINE, 0, invalid)}"
    return location, UserError(f"{location}: {problem}", "Save it as text in UTF-8.")


def too_long(location: object) -> UserError:
    return UserError(
        f"{location}: a document of more than {MAX_DOCUMENT >> 20} MiB",
        "Split it: for a .txt file, set split = 'line', 'blank_line' or 'marker:STRING'.",
    )
