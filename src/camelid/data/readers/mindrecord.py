"""Reads MindSpore's MindRecord files without MindSpore.

    file                uint64 length of the header, the header (JSON), padding to header_size, pages of page_size bytes
    page of BLOB_DATA   rows, concatenated: uint64 length of the row, and its columns
    columns             the bytes of a single column, or for each column its big-endian uint64 length and its bytes
    integers            big-endian uint32 count, two bits per element for its width (1, 2, 4, 8 bytes), the elements

Integers are little-endian unless noted. Pages of RAW_DATA hold scalar columns, which token ids never are. FILE.db in
the same folder is MindSpore's index of the rows (SQLite); it is optional, but must describe the same rows.
"""

import contextlib
import json
import operator
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from camelid.errors import UserError

NAME = re.compile(r"\.mindrecord\d*$", re.IGNORECASE)  # the files of a sharded data set end with a number
AGAIN = "Copy the file again, or create it again."
MAX_HEADER = 2**26
INTEGERS = {name: np.dtype(name) for name in ("int32", "int64")}
WIDTHS = ("<i1", "<i2", "<i4", "<i8")


@dataclass(frozen=True)
class Page:
    """Consecutive rows of a file."""

    number: int
    begin: int
    size: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class MindRecord:
    """An open file, as its header describes it."""

    path: Path
    columns: dict[str, str]
    """Data type of every column."""
    blobs: tuple[str, ...]
    """Columns that are arrays, in the order in which rows store them."""
    pages: tuple[Page, ...]

    @property
    def num_rows(self) -> int:
        return sum(page.num_rows for page in self.pages)

    def rows(self, page: Page) -> Iterator[dict[str, Integer[np.ndarray, " n"]]]:
        """Yields the arrays of every row of a page, by column; raises UserError if the page is damaged."""
        ranges = self._row_ranges(page)
        if (indexed := self._indexed(page)) is not None and indexed != ranges:
            raise UserError(
                f"{self.path.name}.db describes other rows of page {page.number} than {self.path} holds",
                "Copy both again, or remove the .db file, which is optional.",
            )
        with self.path.open("rb") as file:
            for number, (begin, end) in enumerate(ranges, start=page.first_row + 1):
                file.seek(page.begin + begin + 8)
                yield self._arrays(file.read(end - begin - 8), f"{self.path}, row {number}")

    def _row_ranges(self, page: Page) -> list[tuple[int, int]]:
        ranges = []
        begin = 0
        with self.path.open("rb") as file:
            for number in range(page.num_rows):
                file.seek(page.begin + begin)
                end = begin + 8 + int.from_bytes(file.read(8), "little")
                if end > page.size:
                    raise UserError(f"{self.path}, row {page.first_row + number + 1} ends beyond its page", AGAIN)
                ranges.append((begin, end))
                begin = end
        if begin != page.size:
            raise UserError(f"{self.path}: page {page.number} holds more than its {page.num_rows} rows", AGAIN)
        return ranges

    def _indexed(self, page: Page) -> list[tuple[int, int]] | None:
        """The same from the index file; None if there is none."""
        database = index_file(self.path)
        if not database.is_file():
            return None
        query = "SELECT PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END FROM INDEXES WHERE PAGE_ID_BLOB = ? ORDER BY ROW_ID"
        address = f"{database.resolve().as_uri()}?mode=ro&immutable=1"
        try:
            with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
                return connection.execute(query, (page.number,)).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{database} is not an index of a MindRecord ({error})", AGAIN) from error

    def _arrays(self, row: bytes, location: str) -> dict[str, np.ndarray]:
        arrays, begin = {}, 0
        for name in self.blobs:
            end = len(row)
            if len(self.blobs) > 1:
                begin, end = begin + 8, begin + 8 + int.from_bytes(row[begin : begin + 8], "big")
            if end > len(row):
                raise UserError(f"{location}: column {name!r} ends beyond its row", AGAIN)
            try:
                arrays[name] = decode_integers(row[begin:end], INTEGERS[self.columns[name]])
            except ValueError as error:
                raise UserError(f"{location}: column {name!r} is damaged: {error}", AGAIN) from error
            begin = end
        if begin != len(row):
            raise UserError(f"{location} holds more than its columns {', '.join(self.blobs)}", AGAIN)
        return arrays


def open_mindrecord(path: Path) -> MindRecord:
    """Reads the header of a file; raises UserError if it is damaged, or has columns other than 1-D integer arrays."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= min(MAX_HEADER, path.stat().st_size - 8):
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
        return _described(path, header)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}", "Check the file and its permissions.") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a MindRecord, or is damaged ({error!r})", AGAIN) from error


def index_file(path: Path) -> Path:
    """The path of the SQLite index that MindSpore writes for a MindRecord."""
    return path.with_name(f"{path.name}.db")


def decode_integers(content: bytes, dtype: np.dtype) -> Integer[np.ndarray, " n"]:
    """Decodes an array of int32 or int64 as MindSpore's writer encodes it; raises ValueError if it is damaged."""
    #  00000003  24  01  00 02  00 00 01 00        3 elements: one, two and four bytes wide (00 01 10 ..)
    count = int.from_bytes(content[:4], "big")
    begin = 4 + -(-count // 4)
    if len(content) < begin:
        raise ValueError(f"{count} elements in {len(content)} bytes")
    packed = np.frombuffer(content, np.uint8, begin - 4, 4)
    codes = (packed[:, None] >> np.array([6, 4, 2, 0], np.uint8) & 3).ravel()[:count]
    ends = begin + np.cumsum(1 << codes.astype(np.int64))
    if len(content) != (int(ends[-1]) if count else begin):
        raise ValueError(f"{len(content)} bytes; its elements need {int(ends[-1]) if count else begin}")
    raw = np.frombuffer(content, np.uint8)
    values = np.empty(count, np.int64)
    for code, width in enumerate(WIDTHS):
        of_width = codes == code
        places = ends[of_width, None] + np.arange(-(1 << code), 0)
        values[of_width] = raw[places].view(width).ravel()
    limits = np.iinfo(dtype)
    if count and not limits.min <= values.min() <= values.max() <= limits.max:
        raise ValueError(f"an element does not fit {dtype.name}")
    return values.astype(dtype)


def _described(path: Path, header: dict[str, Any]) -> MindRecord:
    if header["version"] != "3.0":
        raise UserError(f"{path} is a MindRecord of version {header['version']!r}; only 3.0 is supported", AGAIN)
    [schema] = header["schema"]
    columns = {name: column["type"] for name, column in schema["schema"].items()}
    blobs = tuple(schema["blob_fields"])
    for name, dtype in columns.items():
        shape = schema["schema"][name].get("shape")
        if name not in blobs or dtype not in INTEGERS or not isinstance(shape, list) or len(shape) != 1:
            raise UserError(
                f"{path}: column {name!r} is {dtype} of shape {shape}, not an array of token ids",
                "Write input_ids, and optionally labels, as int32 of shape [-1].",
            )
    if not blobs or not set(blobs) <= columns.keys() or len(set(blobs)) != len(blobs):
        raise ValueError(f"blob_fields {blobs} of columns {tuple(columns)}")
    pages, first_row = [], 0
    for page in sorted(header["page"], key=operator.itemgetter("page_id")):
        if page["page_type"] != "BLOB_DATA":
            continue
        num_rows = _count(page["end_row_id"]) - _count(page["start_row_id"])
        begin = _count(header["header_size"]) + _count(page["page_id"]) * _count(header["page_size"])
        if num_rows < 0 or begin + _count(page["page_size"]) > path.stat().st_size:
            raise ValueError(f"page {page['page_id']} ends beyond the file, or holds {num_rows} rows")
        pages.append(Page(page["page_id"], begin, page["page_size"], first_row, num_rows))
        first_row += num_rows
    return MindRecord(path, columns, blobs, tuple(pages))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
