"""The types of files that records are read from: how each is divided into ranges, and how a range is read."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from camelid.data.config import Source
from camelid.data.preparation.store import Store, is_store
from camelid.data.readers import json_text, lines, tables
from camelid.data.readers.megatron_data import is_indexed, open_indexed, pair
from camelid.data.readers.mindrecord import NAME as MINDRECORD
from camelid.data.readers.mindrecord import index_file, open_mindrecord
from camelid.data.readers.records import Record, RecordOrError, cleaned_record, object_record, text_record
from camelid.data.readers.separated import separated_rows
from camelid.data.readers.streams import is_sequential, open_stream
from camelid.errors import UserError

IGNORED = -100  # label in MindFormers' data of a token without loss


@dataclass(frozen=True)
class FileRange:
    """A part of a file or data set that can be read independently."""

    path: Path
    start: int
    """First unit of the range; units are bytes, row groups, pages, or documents, as the type of the file defines."""
    stop: int
    """The unit after the last one."""
    first: int
    """Number of its first line or record, counted from 1."""
    size: int
    """Approximate size in bytes."""


@dataclass(frozen=True)
class FileType:
    """A type of files, and its reader."""

    matches: Callable[[Path], bool]
    content: Literal["text", "objects", "ids"]
    ranges: Callable[[Path, Source], Iterable[FileRange]]
    """Divides a file into ranges; none if it is empty."""
    read: Callable[[FileRange, Source], Iterator[RecordOrError]]
    """Reads the records of a range."""
    files: Callable[[Path], list[Path]] = lambda path: [path]
    """Lists all files that belong to a path."""


# Text and JSON --------------------------------------------------------------------------


def _text_ranges(path: Path, source: Source) -> Iterable[FileRange]:
    if is_sequential(path):
        return _one_range(path, _read_text(_entire(path), source))
    return _block_ranges(path, lines.separator(path, source))


def _json_ranges(path: Path, source: Source) -> Iterable[FileRange]:
    if json_text.is_array(path) or is_sequential(path):
        return _one_range(path, _read_json(_entire(path), source))
    return _block_ranges(path, lines.LINE)


def _one_range(path: Path, records: Iterator[RecordOrError]) -> list[FileRange]:
    """The range of a file that can only be read from its beginning, unless it has no records."""
    return [_entire(path)] if any(True for _ in records) else []


def _entire(path: Path) -> FileRange:
    size = path.stat().st_size
    return FileRange(path, 0, size, 1, size)


def _block_ranges(path: Path, between: re.Pattern[bytes]) -> Iterator[FileRange]:
    with path.open("rb") as file:
        begin = 0
        for first, data in lines.blocks(file, between, path):
            if not data.isspace():
                yield FileRange(path, begin, begin + len(data), first, len(data))
            begin += len(data)


def _read_text(part: FileRange, source: Source) -> Iterator[RecordOrError]:
    for first, data in _blocks(part, source):
        for line, content in lines.documents(first, data, lines.separator(part.path, source), part.path):
            location, text = lines.decode(content, part.path, line)
            yield text if isinstance(text, UserError) else cleaned_record(text, location, source)


def _read_json(part: FileRange, source: Source) -> Iterator[RecordOrError]:
    if json_text.is_array(part.path):
        with open_stream(part.path) as file:
            for location, value in json_text.entries(file, part.path):
                yield object_record(value, location, source)
        return
    for first, data in _blocks(part, source):
        for line, content in lines.documents(first, data, lines.LINE, part.path):
            location = f"{part.path}, line {line}"
            yield object_record(json_text.parse_line(content, location), location, source)


def _blocks(part: FileRange, source: Source) -> Iterator[tuple[int, bytes]]:
    if is_sequential(part.path):
        with open_stream(part.path) as file:
            yield from lines.blocks(file, lines.separator(part.path, source), part.path)
        return
    with part.path.open("rb") as file:
        file.seek(part.start)
        data = file.read(part.stop - part.start)
    if len(data) != part.stop - part.start:
        raise UserError(f"{part.path} was truncated while it was read", "Let the program that writes it finish first.")
    yield part.first, data


# Tables ---------------------------------------------------------------------------------


def _separated_ranges(path: Path, source: Source) -> Iterable[FileRange]:
    # A quoted field may contain line breaks, so rows can only be found from the beginning.
    return _one_range(path, _read_separated(_entire(path), source))


def _read_separated(part: FileRange, source: Source) -> Iterator[RecordOrError]:
    for location, cells in separated_rows(part.path):
        yield object_record(cells, location, source)


def _parquet_ranges(path: Path, source: Source) -> Iterator[FileRange]:
    return _merged_ranges(path, tables.parquet_groups(path))


def _merged_ranges(path: Path, units: Sequence[tuple[int, int]]) -> Iterator[FileRange]:
    """Ranges of units with these numbers of records and bytes; adjacent small units are merged.

    The metadata of the file is read again for each range.
    """
    begin, first, num_records, size = 0, 1, 0, 0
    for number, (more_records, more_bytes) in enumerate(units):
        if num_records and size + more_bytes > lines.BLOCK:
            yield FileRange(path, begin, number, first, size)
            begin, first, num_records, size = number, first + num_records, 0, 0
        num_records, size = num_records + more_records, size + more_bytes
    if num_records:
        yield FileRange(path, begin, len(units), first, size)


def _read_parquet(part: FileRange, source: Source) -> Iterator[RecordOrError]:
    return _table_records(tables.parquet_rows(part.path, part.start, part.stop, _column(source)), part, source)


def _dataset_ranges(path: Path, source: Source) -> Iterator[FileRange]:
    for start, stop in tables.dataset_ranges(str(path)):
        yield FileRange(path, start, stop, start + 1, lines.BLOCK)


def _read_dataset(part: FileRange, source: Source) -> Iterator[RecordOrError]:
    return _table_records(tables.dataset_rows(str(part.path), part.start, part.stop, _column(source)), part, source)


def _column(source: Source) -> str | None:
    return source.text_key if source.kind == "text" else None


def _table_records(values: Iterable[Any], part: FileRange, source: Source) -> Iterator[RecordOrError]:
    for number, value in enumerate(values, start=part.first):
        location = f"{part.path}, row {number}"
        if isinstance(value, UserError):
            yield UserError(f"{location}: {value.problem}", value.advice)
        elif source.kind == "text":
            yield text_record(value, location, source)
        else:
            yield object_record(value, location, source)


# Token ids ------------------------------------------------------------------------------


def _megatron_ranges(path: Path, source: Source) -> Iterator[FileRange]:
    data = open_indexed(path)
    return _even_ranges(path, len(data), len(data.tokens))


def _megatron_files(path: Path) -> list[Path]:
    open_indexed(path)  # raises UserError if one of the two is missing
    return list(pair(path))


def _read_megatron(part: FileRange, source: Source) -> Iterator[RecordOrError]:
    data = open_indexed(part.path)
    for index in range(part.start, part.stop):
        if len(ids := data.document(index)):
            yield Record(ids, f"{part.path}, document {index + 1}")


def _store_ranges(path: Path, source: Source) -> Iterator[FileRange]:
    store = Store.open(path)
    return _even_ranges(path, store.num_documents, store.tokens.nbytes)


def _read_store(part: FileRange, source: Source) -> Iterator[RecordOrError]:
    store = Store.open(part.path)
    for index in range(part.start, part.stop):
        begin, end = int(store.offsets[index]), int(store.offsets[index + 1])
        ids = store.tokens[begin:end].astype(np.int32)
        yield Record((ids, store.weights(begin, end)), f"{part.path}, document {index + 1}")


def _even_ranges(path: Path, count: int, size: int) -> Iterator[FileRange]:
    """Ranges of `count` documents of `size` bytes in all, with equal numbers of documents."""
    step = max(1, count * lines.BLOCK // max(size, 1))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield FileRange(path, start, stop, start + 1, (stop - start) * size // count)


def _mindrecord_ranges(path: Path, source: Source) -> Iterator[FileRange]:
    file = open_mindrecord(path)
    if set(file.columns) not in ({"input_ids"}, {"input_ids", "labels"}):
        raise UserError(
            f"{path} has the columns {', '.join(file.columns)}", "Only input_ids, optionally with labels, can be read."
        )
    return _merged_ranges(path, [(page.num_rows, page.size) for page in file.pages])


def _read_mindrecord(part: FileRange, source: Source) -> Iterator[RecordOrError]:
    file = open_mindrecord(part.path)
    for page in file.pages[part.start : part.stop]:
        for number, row in enumerate(file.rows(page), start=page.first_row + 1):
            yield _labeled(row, f"{part.path}, row {number}")


def _labeled(row: dict[str, np.ndarray], location: str) -> RecordOrError:
    """A record of MindFormers, whose labels equal the ids (they are not shifted) or IGNORED, without loss."""
    ids, labels = row["input_ids"].astype(np.int32), row.get("labels")
    if labels is None:
        return Record(ids, location)
    has_loss = labels != IGNORED
    if labels.shape != ids.shape or (labels[has_loss] != ids[has_loss]).any():
        return UserError(f"{location}: labels are neither the ids nor {IGNORED}", "Create the file again.")
    if not has_loss[1:].any():
        return UserError(
            f"{location}: every label is {IGNORED}, so no token has a loss", "Create the file again, or remove it."
        )
    # Padding follows the last id with a loss.
    end = int(np.flatnonzero(has_loss)[-1]) + 1
    return Record((ids[:end], has_loss[:end].astype(np.float32)), location)


FILE_TYPES = (
    FileType(lambda path: bool(lines.TEXT.search(path.name)), "text", _text_ranges, _read_text),
    FileType(lambda path: bool(lines.JSON.search(path.name)), "objects", _json_ranges, _read_json),
    FileType(lambda path: bool(lines.SEPARATED.search(path.name)), "objects", _separated_ranges, _read_separated),
    FileType(lambda path: path.suffix.lower() == ".parquet", "objects", _parquet_ranges, _read_parquet),
    FileType(
        lambda path: str(path).startswith(tables.HUB) or tables.is_dataset(path),
        "objects",
        _dataset_ranges,
        _read_dataset,
        lambda path: tables.dataset_files(str(path)),
    ),
    FileType(
        lambda path: bool(MINDRECORD.search(path.name)),
        "ids",
        _mindrecord_ranges,
        _read_mindrecord,
        lambda path: [file for file in (path, index_file(path)) if file.is_file()],
    ),
    FileType(is_store, "ids", _store_ranges, _read_store, lambda path: sorted(filter(Path.is_file, path.iterdir()))),
    FileType(is_indexed, "ids", _megatron_ranges, _read_megatron, _megatron_files),
)
