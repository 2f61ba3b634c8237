"""Finds the files that the names and globs of a source match."""

import contextlib
import glob
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from camelid.data.preparation.store import is_store
from camelid.data.readers import tables
from camelid.data.readers.file_types import FILE_TYPES
from camelid.data.readers.mindrecord import NAME as MINDRECORD
from camelid.errors import UserError

ENDINGS = (
    ".txt, .jsonl, .ndjson, .json, .csv, .tsv (each also with .gz or .zst), .parquet, .mindrecord, "
    "or Megatron's .bin with .idx"
)


def list_files(patterns: Iterable[str]) -> list[Path]:
    """Lists the files, data sets and folders that names and globs match, in a fixed order.

    Raises UserError if one is missing, named twice, or of an unknown type.
    """
    found = []
    for pattern in patterns:
        with reading(Path(pattern)):
            found += _matching(pattern)
    for path in found:
        if not any(known.matches(path) for known in FILE_TYPES):
            raise UserError(f"{path} is of an unknown type", f"Rename it, or save it as one of {ENDINGS}.")
    refuse_repeated(found, "Name each file once.")
    return found


def refuse_repeated(files: Iterable[Path], advice: str) -> None:
    """Raises UserError if a file is listed twice, also under different names."""
    seen = set()
    for file in files:
        if (real := os.path.realpath(file)) in seen:
            raise UserError(f"{file} is named more than once", advice)
        seen.add(real)


def _matching(pattern: str) -> list[Path]:
    """The files and data sets that a name or glob matches."""
    if pattern.startswith(tables.HUB):
        return [Path(pattern)]
    # The name of a file may contain brackets, which have a meaning in a glob.
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
            raise UserError(f"{path} is not a file, but a pipe or a device", "Save its content as a file.")
        raise UserError(f"{path} is a broken link", "Fix the link, or remove it.")
    if not exact:
        paths = [path for path in paths if not (path.suffix == ".db" and MINDRECORD.search(path.stem))]
    if not paths:
        advice = "Check the path."
        if os.path.isdir(pattern):
            advice = f"For the files of a folder, write {os.path.join(pattern, '*')}."
        elif "," in pattern:
            names = ", ".join(f'"{name.strip()}"' for name in pattern.split(","))
            advice = f"Check the path; several files in a recipe are a list, [{names}]."
        raise UserError(f"{pattern} matches no file in {os.getcwd()}", advice)
    # The two files of Megatron are one data set.
    return list(dict.fromkeys(path.with_suffix("") if path.suffix in (".bin", ".idx") else path for path in paths))


def _escaped(pattern: str) -> str:
    """The pattern, with special characters escaped in the folders at its beginning, as far as these exist."""
    folder, rest = pattern, ""
    while folder and not (os.path.isdir(folder) and rest):
        shorter = os.path.dirname(folder)
        if shorter == folder:
            break
        folder, rest = shorter, pattern[len(shorter) :]
    return glob.escape(folder) + rest


def _globbed(pattern: str) -> list[str]:
    """What a pattern matches; if that is nothing, what it matches with brackets taken literally."""
    found = glob.glob(pattern, recursive=True)
    # A special character in brackets of its own is escaped already.
    literal = re.sub(r"\[[*?[]\]|\[", lambda match: match[0] if len(match[0]) > 1 else "[[]", pattern)
    return sorted(found or glob.glob(literal, recursive=True))


def _refuse_closed_folders(pattern: str) -> None:
    """Raises UserError for a folder that a glob would silently skip, because this user may not list it."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
        for folder in glob.glob(os.path.join(pattern, ""), recursive=True):
            if not os.access(folder, os.R_OK | os.X_OK):
                raise UserError(
                    f"{folder} cannot be listed", "Check its permissions, or name the files to read from it."
                )


def _is_data_folder(path: Path) -> bool:
    return path.is_dir() and (is_store(path) or tables.is_dataset(path))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the system, and of decompression, within this context become a UserError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}", "Check the file and its permissions.") from error
