"""Rows of whatever files a source names, one at a time; whatever is wrong is named by file and line.

files -> spans -> chunks, which any process may read by itself -> records
"""

import contextlib
import glob
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from camelid.data.config import Source
from camelid.data.preparation.store import is_store
from camelid.data.readers import lines, tables
from camelid.data.readers.formats import FORMATS, Format, Record, Span
from camelid.data.readers.megatron_data import pair
from camelid.data.readers.mindrecord import NAME as MINDRECORD
from camelid.errors import UserError
from camelid.inputs import refuse_pointer, refuse_stand_in

ENDINGS = (
    ".txt, .jsonl, .ndjson, .json, .csv, .tsv (each also with .gz or .zst), .parquet, .mindrecord, "
    "or Megatron's .bin with .idx"
)
SHOWN = 5  # places of unreadable rows that are remembered


@dataclass
class Tally:
    """How many rows were read, and which could not be."""

    max_unreadable: float
    """the share that may be unreadable; where it is 0, the first such row is an error at once"""
    rows: int = 0
    unreadable: int = 0
    problems: list[str] = field(default_factory=list)
    """the first few"""

    def refuse(self, error: UserError) -> None:
        """Counts a row as unreadable, or raises its error."""
        if not self.max_unreadable:
            raise error
        self.unreadable += 1
        if len(self.problems) < SHOWN:
            self.problems.append(error.problem)

    def add(self, other: "Tally") -> None:
        """Adds what was counted of the chunks that follow."""
        self.rows += other.rows
        self.unreadable += other.unreadable
        self.problems = [*self.problems, *other.problems][:SHOWN]

    def check(self) -> None:
        """Raises UserError where more rows than allowed were unreadable."""
        # Divided: 29 of 100 are the same number as 0.29, but 0.29 * 100 is less than 29.
        if self.unreadable and self.unreadable / self.rows > self.max_unreadable:
            raise UserError(
                f"{self.unreadable} of {self.rows} rows are unreadable, max_unreadable is {self.max_unreadable}: "
                + "; ".join(self.problems),
                "Repair them, or raise max_unreadable.",
            )


Chunk = tuple[Span, ...]
"""A part of a source that is read by itself; all of them, one after another, are the source."""


def read_records(source: Source) -> Iterator[Record]:
    """Every row of a source; raises UserError where something is wrong with it, or more rows than allowed are."""
    tally = Tally(source.max_unreadable)
    for chunk in chunks(source):
        yield from read_chunk(source, chunk, tally)
    tally.check()


def chunks(source: Source) -> list[Chunk]:
    """The parts of a source, about lines.BLOCK bytes each; raises UserError where a file is empty or cannot be read.

    They follow from the files alone. Plain text is read once for it, to find where documents end and lines are.
    """
    found: list[list[Span]] = []
    room = 0
    for path in list_files(source.files):
        with reading(path):
            spans = list(_format(path, source).spans(path, source))
        if not spans:
            raise UserError(f"{path} is empty", "Leave it out of the source's files.")
        for span in spans:
            # Small files lie together, so that thousands of them are not as many pieces of work.
            if not found or span.size > room:
                found.append([])
                room = lines.BLOCK
            found[-1].append(span)
            room -= span.size
    return [tuple(spans) for spans in found]


def read_chunk(source: Source, chunk: Chunk, tally: Tally | None = None) -> Iterator[Record]:
    """The rows of a chunk; raises UserError where the file is damaged.

    Unreadable rows are counted in `tally`, to be added to those of the other chunks and checked by the caller;
    without one, this chunk alone is checked.
    """
    counted = Tally(source.max_unreadable) if tally is None else tally
    for span in chunk:
        with reading(span.path):
            for row in _format(span.path, source).read(span, source):
                counted.rows += 1
                if isinstance(row, UserError):
                    counted.refuse(row)
                else:
                    yield row
    if tally is None:
        counted.check()


def holds_rows(path: Path) -> bool:
    """Whether texts are found in a file or folder as rows, or unpacked; plain text is what it is, whatever its name."""
    plain = path.suffix.lower() == ".txt"
    return not plain and any(form.looks(path) for form in FORMATS if form.holds != "ids")


def source_files(source: Source) -> list[Path]:
    """Every file that a source is read from, with those that belong to them, in a fixed order."""
    return [file for path in list_files(source.files) for file in _format(path, source).files(path)]


def list_files(patterns: Iterable[str]) -> list[Path]:
    """The files, data sets and folders that names and globs stand for, in a fixed order, each once.

    Raises UserError where one is missing, named twice, or of no kind that is known.
    """
    found = []
    for pattern in patterns:
        with reading(Path(pattern)):
            found += _matches(pattern)
    for path in found:
        if not any(form.looks(path) for form in FORMATS):
            raise UserError(f"{path} is of no known kind", f"Rename it, or save it as one of {ENDINGS}.")
    refuse_repeated(found, "Name each file once.")
    return found


def refuse_repeated(files: Iterable[Path], advice: str) -> None:
    """Refuse a file that is there twice, under whatever name."""
    seen = set()
    for file in files:
        if (real := os.path.realpath(file)) in seen:
            raise UserError(f"{file} is named more than once", advice)
        seen.add(real)


def _format(path: Path, source: Source) -> Format:
    form = next(form for form in FORMATS if form.looks(path))
    # A text may begin like a web page, or be one.
    refuse = refuse_pointer if form.holds == "text" and not lines.PACKED.search(path.name) else refuse_stand_in
    for file in path.iterdir() if path.is_dir() else (path, *pair(path)):
        refuse(file)
    if form.holds == "ids" and source.kind != "tokens":
        raise UserError(f"{path} holds token ids, not kind = {source.kind!r}", "Set kind = 'tokens'.")
    if form.holds != "ids" and source.kind == "tokens":
        raise UserError(
            f"{path} holds no token ids", "kind = 'tokens' is for Megatron, MindRecord and prepared stores."
        )
    if form.holds == "text" and source.kind != "text":
        raise UserError(
            f"{path} is plain text, without the keys that kind = {source.kind!r} needs", "Give JSON lines or Parquet."
        )
    return form


def _matches(pattern: str) -> list[Path]:
    if pattern.startswith(tables.HUB):
        return [Path(pattern)]
    # A file's own name may hold brackets, which a glob would read as a choice of letters.
    exact = os.path.isfile(pattern) or _is_data_folder(Path(pattern))
    escaped = _escaped(pattern)
    names = [pattern] if exact else _globbed(escaped)
    paths = [path for path in map(Path, names) if not path.is_dir() or _is_data_folder(path)]
    if not paths:
        paths = [Path(file) for file in (f"{pattern}.bin", f"{pattern}.idx") if os.path.isfile(file)]
    if not exact:
        _refuse_closed_folders(escaped)
    for path in paths:
        if path.is_file() or path.is_dir():
            continue
        if path.exists():
            raise UserError(f"{path} is no file, but a pipe or a device", "Save what it gives as a file.")
        raise UserError(f"{path} is a link to nothing", "Mend the link, or remove it.")
    if not exact:
        paths = [path for path in paths if not (path.suffix == ".db" and MINDRECORD.search(path.stem))]
    if not paths:
        raise UserError(
            f"{pattern} matches no file in {os.getcwd()}",
            f"A folder's files are {os.path.join(pattern, '*')}." if os.path.isdir(pattern) else "Check the path.",
        )
    # Megatron's two files are one data set.
    return list(dict.fromkeys(path.with_suffix("") if path.suffix in (".bin", ".idx") else path for path in paths))


def _escaped(pattern: str) -> str:
    """The pattern with the signs of a glob escaped in the folders that it begins with, as far as these exist."""
    folder, rest = pattern, ""
    while folder and not (os.path.isdir(folder) and rest):
        shorter = os.path.dirname(folder)
        if shorter == folder:
            break
        folder, rest = shorter, pattern[len(shorter) :]
    return glob.escape(folder) + rest


def _globbed(pattern: str) -> list[str]:
    """What a pattern matches; where that is nothing, what it matches with brackets that stand for themselves."""
    found = glob.glob(pattern, recursive=True)
    # A sign in brackets of its own is escaped already.
    literal = re.sub(r"\[[*?[]\]|\[", lambda match: match[0] if len(match[0]) > 1 else "[[]", pattern)
    return sorted(found or glob.glob(literal, recursive=True))


def _refuse_closed_folders(pattern: str) -> None:
    """Raises UserError for a folder that a glob would pass over, because this user may not look into it."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
        for folder in glob.glob(os.path.join(pattern, ""), recursive=True):
            if not os.access(folder, os.R_OK | os.X_OK):
                raise UserError(
                    f"{folder} cannot be looked into", "Check its permissions, or name what you want of it."
                )


def _is_data_folder(path: Path) -> bool:
    return path.is_dir() and (is_store(path) or tables.is_dataset(path))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever the system refuses meanwhile, or is packed wrongly, is a UserError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}", "Check the file and its permissions.") from error
