"""Reads the records of a source one at a time; errors name the file and the line.

files -> ranges -> chunks, which any process can read independently -> records
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from camelid.data.config import Source
from camelid.data.readers import lines
from camelid.data.readers.file_names import list_files, reading
from camelid.data.readers.file_types import FILE_TYPES, FileRange, FileType
from camelid.data.readers.megatron_data import pair
from camelid.data.readers.records import Record
from camelid.data.readers.streams import COMPRESSED
from camelid.errors import UserError
from camelid.inputs import refuse_pointer, refuse_stand_in

SHOWN = 5  # unreadable records that are named


@dataclass
class Tally:
    """How many records were read, and which of them are unreadable."""

    max_unreadable: float
    """Maximum fraction of unreadable records; if it is 0, the first one raises an error at once."""
    rows: int = 0
    unreadable: int = 0
    problems: list[str] = field(default_factory=list)
    """What is wrong with the first few."""

    def refuse(self, error: UserError) -> None:
        """Counts a record as unreadable, or raises the error."""
        if not self.max_unreadable:
            raise error
        self.unreadable += 1
        if len(self.problems) < SHOWN:
            self.problems.append(error.problem)

    def add(self, other: "Tally") -> None:
        """Adds the counts of chunks that follow."""
        self.rows += other.rows
        self.unreadable += other.unreadable
        self.problems = [*self.problems, *other.problems][:SHOWN]

    def check(self) -> None:
        """Raises UserError if more records than allowed are unreadable."""
        # Not multiplied: 29 / 100 equals 0.29, but 0.29 * 100 is less than 29.
        if self.unreadable and self.unreadable / self.rows > self.max_unreadable:
            raise UserError(
                f"{self.unreadable} of {self.rows} records are unreadable, and max_unreadable = {self.max_unreadable}: "
                + "; ".join(self.problems),
                "Fix them, or raise max_unreadable.",
            )


Chunk = tuple[FileRange, ...]
"""A unit of work: ranges of one or several files. The chunks of a source, concatenated, are the source."""


def read_records(source: Source) -> Iterator[Record]:
    """Yields every record of a source; raises UserError for a damaged file or too many unreadable records."""
    tally = Tally(source.max_unreadable)
    for chunk in chunks(source):
        yield from read_chunk(source, chunk, tally)
    tally.check()


def chunks(source: Source) -> list[Chunk]:
    """Divides a source into chunks of about lines.BLOCK bytes; raises UserError if a file is empty or cannot be read.

    The chunks depend on the files alone. Plain text is read once, to find the ends of documents and count lines.
    """
    found: list[list[FileRange]] = []
    room = 0
    for path in list_files(source.files):
        with reading(path):
            ranges = list(_file_type(path, source).ranges(path, source))
        if not ranges:
            raise UserError(f"{path} is empty", "Remove it from the files of the source.")
        for part in ranges:
            # Small files share a chunk, so that thousands of files are not thousands of units of work.
            if not found or part.size > room:
                found.append([])
                room = lines.BLOCK
            found[-1].append(part)
            room -= part.size
    return [tuple(ranges) for ranges in found]


def read_chunk(source: Source, chunk: Chunk, tally: Tally | None = None) -> Iterator[Record]:
    """Yields the records of a chunk; raises UserError if a file is damaged.

    Records are counted in `tally`, which the caller adds to those of the other chunks and checks; without one, the
    chunk is checked by itself.
    """
    counted = Tally(source.max_unreadable) if tally is None else tally
    for part in chunk:
        with reading(part.path):
            for record in _file_type(part.path, source).read(part, source):
                counted.rows += 1
                if isinstance(record, UserError):
                    counted.refuse(record)
                else:
                    yield record
    if tally is None:
        counted.check()


def holds_records(path: Path) -> bool:
    """Whether a file or folder holds texts as records, or compressed, and not as plain text."""
    plain = path.suffix.lower() == ".txt"
    return not plain and any(known.matches(path) for known in FILE_TYPES if known.content != "ids")


def source_files(source: Source) -> list[Path]:
    """Lists every file that a source is read from, including index files, in a fixed order."""
    return [file for path in list_files(source.files) for file in _file_type(path, source).files(path)]


def _file_type(path: Path, source: Source) -> FileType:
    """The type of a file; raises UserError if its content does not fit the kind of the source."""
    found = next(known for known in FILE_TYPES if known.matches(path))
    # A plain text may start like a web page, or be one.
    refuse = refuse_pointer if found.content == "text" and not COMPRESSED.search(path.name) else refuse_stand_in
    for file in path.iterdir() if path.is_dir() else (path, *pair(path)):
        refuse(file)
    if found.content == "ids" and source.kind != "tokens":
        raise UserError(f"{path} holds token ids, which do not fit kind = {source.kind!r}", "Set kind = 'tokens'.")
    if found.content != "ids" and source.kind == "tokens":
        raise UserError(
            f"{path} holds no token ids", "kind = 'tokens' reads data of Megatron and MindRecord, and prepared stores."
        )
    if found.content == "text" and source.kind != "text":
        raise UserError(
            f"{path} is plain text, without the keys that kind = {source.kind!r} needs", "Give JSON Lines or Parquet."
        )
    return found
