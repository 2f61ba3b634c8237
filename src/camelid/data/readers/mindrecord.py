"""MindSpore's MindRecord files, read without MindSpore.

    uint64 length of the header, the header (JSON), nothing up to header_size; then pages of page_size bytes
    page of BLOB_DATA   rows end to end: uint64 length of the row, and its columns
    columns             the bytes of the one there is, or for each, big-endian, uint64 length and the bytes
    integers            big-endian uint32 count, two bits an element that say its width (1, 2, 4, 8), the elements

Little-endian but where said. Pages of RAW_DATA hold columns of single values, which tokens never are. FILE.db beside it
is MindSpore's index of the rows (SQLite): it is not needed, but where it is there, it must tell of the same rows.
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

NAME = re.compile(r"\.mindrecord\d*$", re.IGNORECASE)  # a file that was written in parts has a number at its end
AGAIN = "Copy the file again, or make it anew."
MAX_HEADER = 2**26
INTEGERS = {name: np.dtype(name) for name in ("int32", "int64")}
WIDTHS = ("<i1", "<i2", "<i4", "<i8")


@dataclass(frozen=True)
class Page:
    """Rows that lie end to end."""

    number: int
    begin: int
    size: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class MindRecord:
    """An open file: what its header says."""

    path: Path
    columns: dict[str, str]
    """the type of every column"""
    blobs: tuple[str, ...]
    """the columns that are arrays, in the order of the file"""
    pages: tuple[Page, ...]

    @property
    def num_rows(self) -> int:
        return sum(page.num_rows for page in self.pages)

    def rows(self, page: Page) -> Iterator[dict[str, Integer[np.ndarray, " n"]]]:
        """The arrays of every row of a page, one row at a time; raises UserError where the page is damaged."""
        borders = self._borders(page)
        if (indexed := self._indexed(page)) is not None and indexed != borders:
            raise UserError(
                f"{self.path.name}.db tells of other rows of page {page.number} than {self.path} holds",
                "Copy both again; or remove the .db, which is not needed.",
            )
        with self.path.open("rb") as file:
            for number, (begin, end) in enumerate(borders, start=page.first_row + 1):
                file.seek(page.begin + begin + 8)
                yield self._arrays(file.read(end - begin - 8), f"{self.path}, row {number}")

    def _borders(self, page: Page) -> list[tuple[int, int]]:
        borders = []
        begin = 0
        with self.path.open("rb") as file:
            for number in range(page.num_rows):
                file.seek(page.begin + begin)
                end = begin + 8 + int.from_bytes(file.read(8), "little")
                if end > page.size:
                    raise UserError(f"{self.path}, row {page.first_row + number + 1} ends beyond its page", AGAIN)
                borders.append((begin, end))
                begin = end
        if begin != page.size:
            raise UserError(f"{self.path}: page {page.number} holds more than its {page.num_rows} rows", AGAIN)
        return borders

    def _indexed(self, page: Page) -> list[tuple[int, int]] | None:
        """The same by the file beside it, where there is one."""
        database = index_file(self.path)
        if not database.is_file():
            return None
        query = "SELECT PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END FROM INDEXES WHERE PAGE_ID_BLOB = ? ORDER BY ROW_ID"
        address = f"{database.resolve().as_uri()}?mode=ro&immutable=1"
        try:
            with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
                return connection.execute(query, (page.number,)).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{database} is no index of a MindRecord ({error})", AGAIN) from error

    def _arrays(self, row: bytes, place: str) -> dict[str, np.ndarray]:
        arrays, begin = {}, 0
        for name in self.blobs:
            end = len(row)
            if len(self.blobs) > 1:
                begin, end = begin + 8, begin + 8 + int.from_bytes(row[begin : begin + 8], "big")
            if end > len(row):
                raise UserError(f"{place}: column {name!r} ends beyond its row", AGAIN)
            try:
                arrays[name] = decode_integers(row[begin:end], INTEGERS[self.columns[name]])
            except ValueError as error:
                raise UserError(f"{place}: column {name!r} is damaged: {error}", AGAIN) from error
            begin = end
        if begin != len(row):
            raise UserError(f"{place} holds more than its columns {', '.join(self.blobs)}", AGAIN)
        return arrays


def open_mindrecord(path: Path) -> MindRecord:
    """What is in a file; raises UserError where it is damaged, or holds anything but one-dimensional integers."""
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
        raise UserError(f"{path} is no MindRecord, or is damaged ({error!r})", AGAIN) from error


def index_file(path: Path) -> Path:
    """The SQLite file that MindSpore writes beside a MindRecord."""
    return path.with_name(f"{path.name}.db")


def decode_integers(content: bytes, dtype: np.dtype) -> Integer[np.ndarray, " n"]:
    """What MindSpore's writer made of an array of int32 or int64; raises ValueError where it is damaged."""
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
        raise UserError(f"{path} is a MindRecord of version {header['version']!r}; only 3.0 is known", AGAIN)
    [schema] = header["schema"]
    columns = {name: column["type"] for name, column in schema["schema"].items()}
    blobs = tuple(schema["blob_fields"])
    for name, kind in columns.items():
        shape = schema["schema"][name].get("shape")
        if name not in blobs or kind not in INTEGERS or not isinstance(shape, list) or len(shape) != 1:
            raise UserError(
                f"{path}: column {name!r} is {kind} of shape {shape}, no array of token ids",
                "Write input_ids, and labels if there are any, as int32 of shape [-1].",
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
        raise ValueError(f"{value!r} is no count")
    return value
