"""Rows of Parquet files and Hugging Face data sets, one range at a time; the extra `data` installs their libraries."""

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camelid.data.readers.lines import BLOCK
from camelid.data.readers.records import missing_text
from camelid.errors import UserError
from camelid.extras import install_hint

HUB = "hf:"
SEPARATOR = re.compile(r":(?![^\[]*\])")  # but not the colon of a slice: train[:10%]
ROWS = 1000  # that are read at once
AGAIN = "Download or copy it again."

# Parquet --------------------------------------------------------------------------------


def parquet_groups(path: Path) -> list[tuple[int, int]]:
    """Returns the numbers of rows and bytes of each row group; raises UserError if it is not a Parquet file."""
    metadata = _parquet(path).metadata
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return [(group.num_rows, group.total_byte_size) for group in groups]


def parquet_rows(path: Path, start: int, stop: int, column: str | None) -> Iterator[Any]:
    """Yields the rows of row groups [start, stop), or their values of one column; a UserError for invalid values.

    Raises UserError if the file is damaged, or does not have exactly one column of this name.
    """
    import pyarrow

    file = _parquet(path)
    names = file.schema_arrow.names
    if column is not None and column not in names:
        raise missing_text(path, column, names)
    for name in names if column is None else [column]:
        if names.count(name) > 1:
            raise UserError(f"{path} has {names.count(name)} columns named {name!r}", "Rename all but one.")
    try:
        batches = file.iter_batches(ROWS, row_groups=list(range(start, stop)), columns=column and [column])
        for batch in batches:
            yield from _values(batch.to_struct_array() if column is None else batch.column(column))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", AGAIN) from error


def _values(array: Any) -> Iterator[Any]:
    try:
        yield from array.to_pylist()
    except (ValueError, OverflowError):  # invalid UTF-8, or a date out of Python's range
        for value in array:
            try:
                yield value.as_py()
            except UnicodeDecodeError as error:
                yield UserError(f"not UTF-8 ({error.reason})", "Store text as UTF-8.")
            except (ValueError, OverflowError) as error:
                yield UserError(f"a value out of range ({error})", "Store it as text, or remove it.")


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing(path, "pyarrow", error) from error
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file, or is damaged ({error})", AGAIN) from error


# Hugging Face data sets -----------------------------------------------------------------


def is_dataset(folder: Path) -> bool:
    """Whether a folder was written by save_to_disk of a data set or of a dictionary of splits."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def dataset_ranges(name: str) -> list[tuple[int, int]]:
    """Returns ranges [start, stop) of rows of about BLOCK bytes; raises UserError if there is no such data set."""
    rows = open_dataset(name)
    if not len(rows):
        return []
    size = math.ceil(len(rows) * BLOCK / max(rows.data.nbytes, 1))
    return [(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]


def dataset_rows(name: str, start: int, stop: int, column: str | None) -> Iterator[Any]:
    """Yields rows [start, stop), or their values of one column; raises UserError if there is no such column."""
    rows = open_dataset(name)
    if column is not None:
        if column not in rows.column_names:
            raise missing_text(name, column, rows.column_names)
        rows = rows.select_columns([column])
    for first in range(start, stop, ROWS):
        table = rows[first : min(first + ROWS, stop)]
        yield from _values(table.to_struct_array() if column is None else table.column(column))


def dataset_files(name: str) -> list[Path]:
    """Lists the files that hold the rows of a data set."""
    return sorted({Path(file["filename"]) for file in open_dataset(name).cache_files})


def open_dataset(name: str) -> Any:
    """Opens the data set in a folder, or hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; the default split is train."""
    state = Path(name).absolute() / "state.json"
    return _loaded(name, state, state.stat().st_mtime_ns if state.is_file() else 0)


@functools.lru_cache(4)  # a process reads many ranges of one data set
def _loaded(name: str, state: Path, changed: int) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _missing(name, "datasets", error) from error
    try:
        if name.startswith(HUB):
            hub, *options = SEPARATOR.split(name.removeprefix(HUB))
            split = options.pop() if options else "train"
            found = datasets.load_dataset(hub, *options, split=split)
        else:
            found = datasets.load_from_disk(name)
    except Exception as error:  # the library passes on errors of many others
        raise UserError(f"{name} cannot be loaded: {error}", _advice(name)) from error
    if isinstance(found, datasets.DatasetDict):
        splits = [str(split) for split in found]
        raise UserError(f"{name} has several splits: {', '.join(splits)}", f"Name one, as {Path(name) / splits[0]}.")
    # Rows in the library's default format have images and audio decoded, which needs more libraries.
    return found.with_format("arrow")


def _advice(name: str) -> str:
    if name.startswith(HUB):
        return "Write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, with the names of the Hub."
    return "Save it again with save_to_disk."


def _missing(name: object, library: str, error: ImportError) -> UserError:
    return UserError(f"{name} needs {library}: {error}", install_hint("data"))
