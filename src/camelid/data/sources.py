"""Documents from text files, one at a time; whatever is wrong is named by file and line."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from camelid.errors import UserError
from camelid.text.tokenizer import HALF_CHARACTER

ENDINGS = (".txt", ".jsonl", ".jsonl.gz")


def list_files(patterns: Iterable[str]) -> list[Path]:
    """The files that names and globs stand for, in a fixed order, each once."""
    files = [file for pattern in patterns for file in _matches(pattern)]
    for file in files:
        if not file.name.endswith(ENDINGS):
            raise UserError(f"{file} ends in none of {', '.join(ENDINGS)}", "rename it, or save it as one of these")
    refuse_repeated(files, "name each file once")
    return files


def refuse_repeated(files: Iterable[Path], advice: str) -> None:
    """Refuse a file that is there twice, under whatever name."""
    seen = set()
    for file in files:
        if file.resolve() in seen:
            raise UserError(f"{file} is named more than once", advice)
        seen.add(file.resolve())


def read_documents(files: Iterable[Path], text_key: str) -> Iterator[str]:
    """The text of every document of the files."""
    for file in files:
        try:
            yield from _whole(file) if file.suffix == ".txt" else _lines(file, text_key)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file} cannot be read: {error}", "check the file and its permissions") from error


def _matches(pattern: str) -> list[Path]:
    # A file's own name may hold brackets, which a glob would read as a choice of letters.
    found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not found:
        raise UserError(
            f"{pattern} matches no file in {os.getcwd()}",
            f"a folder's files are {os.path.join(pattern, '*')}" if os.path.isdir(pattern) else "check the path",
        )
    return [Path(name) for name in found]


def _whole(file: Path) -> Iterator[str]:
    content = file.read_bytes()
    try:
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise UserError(f"{file}, line {line}: not UTF-8 ({error.reason})", "save the file as UTF-8") from error


def _lines(file: Path, text_key: str) -> Iterator[str]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text(line, text_key, f"{file}, line {number}")


def _text(line: bytes, text_key: str, place: str) -> str:
    record = _record(line, place)
    if text_key not in record:
        raise UserError(
            f"{place}: no field {text_key!r}, only {', '.join(map(repr, record)) or 'an empty object'}",
            "set text_key to the field that holds the text",
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {text_key!r} is {text!r:.40}, no string", "store the text in this field")
    if half := HALF_CHARACTER.search(text):
        raise UserError(
            f"{place}: field {text_key!r} has half a character, {half[0]!r}",
            "write both halves of the surrogate pair, or neither",
        )
    return text


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{place}: no JSON in UTF-8: {error}", "write one JSON object on each line") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: {record!r:.40} is no object", "write one JSON object on each line")
    return record
