"""Rows of Parquet files and of Hugging Face data sets, a range at a time; the extra `data` has their libraries."""

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camelid.data.config import better_kind
from camelid.data.readers.lines import BLOCK
from camelid.errors import UserError
from camelid.extras import install_hint

HUB = "hf:"
SEPARATOR = re.compile(r":(?![^\[]*\])")  # not the one of a slice: train[:10%]
ROWS = 1000  # at once, where a row has no size that is known
AGAIN = "Download or copy it again."

# Parquet --------------------------------------------------------------------------------


def parquet_groups(path: Path) -> list[tuple[int, int]]:
    """The rows and the bytes of each row group; raises UserError where it is no Parquet."""
    metadata = _parquet(path).metadata
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return [(group.num_rows, group.total_byte_size) for group in groups]


def parquet_rows(path: Path, start: int, stop: int, column: str | None) -> Iterator[Any]:
    """The rows of row groups [start, stop), or a column of them; a UserError in place of what is no value.

    Raises UserError where the file is damaged, has no such column, or several of one name.
    """
    import pyarrow

    file = _parquet(path)
    names = file.schema_arrow.names
    if column is not None and column not in names:
        raise no_column(path, column, names)
    for name in names if column is None else [column]:
        if names.count(name) > 1:
            raise UserError(f"{path} has {names.count(name)} columns of the name {name!r}", "Rename all but one.")
    try:
        batches = file.iter_batches(ROWS, row_groups=list(range(start, stop)), columns=column and [column])
        for batch in batches:
            yield from _values(batch.to_struct_array() if column is None else batch.column(column))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", AGAIN) from error


def no_column(name: object, column: str, names: list[str]) -> UserError:
    better = better_kind("text", names)
    return UserError(
        f"{name}: no field {column!r}, only {', '.join(map(repr, names)) or 'none'}",
        "Set text_key to the field that holds the text." if better is None else f"Set {better}.",
    )


def _values(array: Any) -> Iterator[Any]:
    try:
        yield from array.to_pylist()
    except (ValueError, OverflowError):  # text that is no UTF-8, dates beyond Python's
        for value in array:
            try:
                yield value.as_py()
            except UnicodeDecodeError as error:
                yield UserError(f"not UTF-8 ({error.reason})", "Store text as UTF-8.")
            except (ValueError, OverflowError) as error:
                yield UserError(f"no value that Python has ({error})", "Store it as text, or leave it out.")


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing(path, "pyarrow", error) from error
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file, or is damaged ({error})", AGAIN) from error


# Hugging Face data sets -----------------------------------------------------------------


def is_dataset(folder: Path) -> bool:
    """Whether a folder is what save_to_disk of a data set writes, or one with several splits."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def dataset_ranges(name: str) -> list[tuple[int, int]]:
    """Ranges of rows, [start, stop) each, of about BLOCK bytes; raises UserError where there is no such data set."""
    rows = open_dataset(name)
    if not len(rows):
        return []
    size = math.ceil(len(rows) * BLOCK / max(rows.data.nbytes, 1))
    return [(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]


def dataset_rows(name: str, start: int, stop: int, column: str | None) -> Iterator[Any]:
    """Rows [start, stop), or a column of them; raises UserError where there is no such column."""
    rows = open_dataset(name)
    if column is not None:
        if column not in rows.column_names:
            raise no_column(name, column, rows.column_names)
        rows = rows.select_columns([column])
    for first in range(start, stop, ROWS):
        table = rows[first : min(first + ROWS, stop)]
        yield from _values(table.to_struct_array() if column is None else table.column(column))


def dataset_files(name: str) -> list[Path]:
    """The files that hold its rows."""
    return sorted({Path(file["filename"]) for file in open_dataset(name).cache_files})


def open_dataset(name: str) -> Any:
    """The data set of a folder, or of hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT."""
    state = Path(name).absolute() / "state.json"
    return _loaded(name, state, state.stat().st_mtime_ns if state.is_file() else 0)


@functools.lru_cache(4)  # a process reads many ranges of it
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
    except Exception as error:  # the library raises errors of many others
        raise UserError(f"{name} cannot be loaded: {error}", _advice(name)) from error
    if isinstance(found, datasets.DatasetDict):
        splits = [str(split) for split in found]
        raise UserError(f"{name} has several splits: {', '.join(splits)}", f"Name one, say {Path(name) / splits[0]}.")
    # The library's own rows have pictures and sounds unpacked, with more libraries.
    return found.with_format("arrow")


def _advice(name: str) -> str:
    if name.startswith(HUB):
        return "Write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, as the Hub has them."
    return "Save it again with save_to_disk."


def _missing(name: object, library: str, error: ImportError) -> UserError:
    return UserError(f"{name} needs {library}: {error}", install_hint("data"))
