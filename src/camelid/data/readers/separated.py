"""Rows of .csv and .tsv files: the first row names the columns, and quoted fields may contain line breaks."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from camelid.data.readers.lines import MAX_DOCUMENT, SEPARATED
from camelid.data.readers.streams import open_stream
from camelid.errors import UserError

Cells = dict[str, str]


def separated_rows(path: Path) -> Iterator[tuple[str, Cells | UserError]]:
    """Yields the location and the cells of each row, by column; a UserError in place of the cells of an invalid row.

    Raises UserError if the file is not UTF-8, its quotes do not match, or two columns have the same name.
    """
    match = SEPARATED.search(path.name)
    assert match is not None  # the file was chosen by its name
    csv.field_size_limit(MAX_DOCUMENT)  # the default limit of 128 KiB is less than the length of some documents
    with open_stream(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter="\t" if match[1].lower() == "tsv" else ",", strict=True)
        rows = _numbered(reader, path)
        header = next((cells for _, cells in rows), [])
        for name in header:
            if header.count(name) > 1:
                raise UserError(f"{path} has {header.count(name)} columns named {name!r}", "Rename all but one.")
        for line, cells in rows:
            location = f"{path}, line {line}"
            if len(cells) == len(header):
                yield location, dict(zip(header, cells, strict=True))
            else:
                yield (
                    location,
                    UserError(f"{location}: {len(cells)} cells, but the header has {len(header)}", "Fix this row."),
                )


def _numbered(reader, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows that are not blank, and the numbers of their first lines."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}, line {line}: {error}", "Fix this row: double the quotes inside of a field."
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, from line {line} on: not UTF-8 ({error.reason})", "Save it as UTF-8.") from error
        if cells:
            yield line, cells
