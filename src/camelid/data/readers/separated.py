"""Rows of .csv and .tsv files: the first row names the columns, and a field in quotes may hold line breaks."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from camelid.data.readers.lines import MAX_DOCUMENT, SEPARATED, opened
from camelid.errors import UserError

Cells = dict[str, str]


def separated_rows(path: Path) -> Iterator[tuple[str, Cells | UserError]]:
    """The place and the cells of each row by column, or what is wrong with the row.

    Raises UserError where the file is not UTF-8, its quotes do not match, or two columns share a name.
    """
    match = SEPARATED.search(path.name)
    assert match is not None  # the file was chosen by its name
    csv.field_size_limit(MAX_DOCUMENT)  # the library's own limit of 128 KiB is less than a document may have
    with opened(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter="\t" if match[1].lower() == "tsv" else ",", strict=True)
        rows = _numbered(reader, path)
        header = next((cells for _, cells in rows), [])
        for name in header:
            if header.count(name) > 1:
                raise UserError(f"{path} has {header.count(name)} columns named {name!r}", "Rename all but one.")
        for line, cells in rows:
            place = f"{path}, line {line}"
            if len(cells) == len(header):
                yield place, dict(zip(header, cells, strict=True))
            else:
                yield (
                    place,
                    UserError(f"{place}: {len(cells)} cells, the header names {len(header)}", "Repair this row."),
                )


def _numbered(reader, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its first line."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}, line {line}: {error}", "Repair this row: quotes inside a field are doubled."
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, from line {line} on: not UTF-8 ({error.reason})", "Save it as UTF-8.") from error
        if cells:
            yield line, cells
