"""Datasets that are given as Python objects: names of files, or rows, which are written to the folder of the run.

Rows become a file of JSON lines that is named after its content. From then on they are read, prepared and packed like
any other file, and a run that is resumed with other rows is refused like one with other files.
"""

import contextlib
import filecmp
import hashlib
import itertools
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from camelid.disk.locks import no_empty_folders
from camelid.errors import UserError
from camelid.inputs import expand_home

Row = str | Mapping[str, Any]
Dataset = str | Path | Iterable[str | Path | Row]
"""The name of a file, a glob or a data set; several of them; or rows: texts, or records with keys."""

ENDINGS = re.compile(r"(\.(jsonl|ndjson|json|csv|tsv|txt|parquet|mindrecord|bin|idx|gz|zst))+$", re.IGNORECASE)


class Rows:
    """The rows of an iterable: texts, or records with keys."""

    def __init__(self, dataset: Iterable[Any], rows: Iterator[Any], what: str):
        """`rows` are all rows of the dataset; `what` is the name of the argument, for messages."""
        self._dataset, self._rows, self._what = dataset, rows, what
        self._file: str | None = None

    def file(self, folder: Path) -> str:
        """The path of a file of JSON lines in `folder` with the rows, whose name is a hash of its content.

        The rows of a list are read again at every call, in case they have changed, and those of an iterator once. An
        existing file with this content is not touched. Raises UserError for a row that JSON cannot represent.
        """
        rows = self._dataset
        if iter(rows) is rows:  # an iterator has no rows a second time, but its file may be needed in another folder
            rows = self._rows if self._file is None else _read(self._file)
        self._file = _write(_checked(rows, self._what), folder)
        return self._file


def names_or_rows(dataset: Dataset, what: str) -> tuple[str, ...] | Rows:
    """The names of files in a dataset, or its rows; raises UserError if it has neither.

    Strings in a list are names if they exist or end like files of data, and texts otherwise. `what` is the name of the
    argument, for messages.
    """
    if isinstance(dataset, str | Path):
        return (str(dataset),)
    if isinstance(dataset, Mapping) or not isinstance(dataset, Iterable):
        raise UserError(
            f"{what} = {dataset!r:.60} is neither a path nor rows",
            "Give the path of a file, several paths, or rows: a list of texts or of dictionaries.",
        )
    items: Iterator[Any] = iter(dataset)
    first = next(items, None)
    if first is None:
        raise UserError(f"{what} is empty", "Give at least one row, or the path of a file.")
    items = itertools.chain([first], items)
    if not _is_name(first):
        return Rows(dataset, items, what)
    names = list(items)
    if text := next((name for name in names if not _is_name(name)), None):
        raise _mixed(what, text, first)
    return tuple(map(str, names))


def _is_name(item: object) -> bool:
    """Whether an item of a dataset names files: a path, or a string that exists or looks like the name of a file."""
    if not isinstance(item, str):
        return isinstance(item, Path)
    if "\n" in item:
        return False
    if item.startswith("hf:") or ENDINGS.search(item):
        return True
    with contextlib.suppress(UserError):  # of a home folder that does not exist
        item = expand_home(item)
    return bool(item) and any(map(os.path.exists, (item, f"{item}.bin")))


def _checked(rows: Iterable[Any], what: str) -> Iterator[Row]:
    """The rows, of which all are texts or all are records."""
    first = None
    for number, row in enumerate(rows):
        if _is_name(row):
            raise _mixed(what, first, row)
        if not isinstance(row, str | Mapping):
            raise UserError(
                f"row {number} of {what} is {row!r:.60}, neither a text nor a dictionary",
                "Give texts, or dictionaries such as {'prompt': '...', 'completion': '...'}.",
            )
        first = row if number == 0 else first
        if isinstance(row, str) != isinstance(first, str):
            raise UserError(
                f"row {number} of {what} is {row!r:.60}, and the first one {first!r:.60}",
                "Give only texts, or only dictionaries.",
            )
        yield row


def _mixed(what: str, text: object, name: object) -> UserError:
    return UserError(
        f"{what} has both texts and names of files: {text!r:.60} and {str(name)!r:.60}",
        "Give names of files that exist, or write all texts as {'text': '...'}.",
    )


def _read(file: str) -> Iterator[Row]:
    with open(file, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _write(rows: Iterable[Row], folder: Path) -> str:
    digest = hashlib.sha256()
    with no_empty_folders(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{secrets.token_hex(8)}.incomplete"
        try:
            with temporary.open("wb") as file:
                for number, row in enumerate(rows):
                    line = _line(row, number)
                    digest.update(line)
                    file.write(line)
            path = folder / f"rows-{digest.hexdigest()[:16]}.jsonl"
            # The time of a file that has this content already stays, so that its tokens in the cache are found.
            if not (path.is_file() and filecmp.cmp(temporary, path, shallow=False)):
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return str(path)


def _line(row: Row, number: int) -> bytes:
    try:
        return json.dumps({"text": row} if isinstance(row, str) else dict(row), allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"row {number} cannot be written as JSON: {error}",
            "Rows hold texts, numbers, lists and dictionaries.",
        ) from error
