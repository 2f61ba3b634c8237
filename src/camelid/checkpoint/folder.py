"""A folder that is written completely or not at all, and the JSON in it."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from camelid.checkpoint.replacing import (
    REPLACEMENT_FILE,
    add_to_manifest,
    complete,
    files_in,
    read_replacement,
    refuse_foreign,
    replace_files,
)
from camelid.disk.locks import LOCK, locked, no_empty_folders, unfinished
from camelid.errors import UserError
from camelid.inputs import named_path, refuse_stand_in
from camelid.interrupts import cleaned_up


@contextlib.contextmanager
def new_folder(
    destination: Path,
    need_bytes: int,
    overwrite: bool = False,
    resume: str = "",
    expected: Mapping[str, Path | None] | None = None,
) -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name when the block ends, and is removed when it fails.

    With `overwrite`, its files replace those of a checkpoint in `destination`, and all other files there are left
    alone; `expected` has the names of files that will be written, and their contents where these exist, so that what
    is in the way is found early. With `resume`, the name of a file, the temporary folder stays when the block fails,
    and is used again if the file is in it. If the destination is a symbolic link, the folder that it points to is
    written. Raises UserError if the destination exists and may not be replaced, if another process is writing it, or
    if the disk lacks `need_bytes`.
    """
    destination = Path(os.path.realpath(named_path(destination)))
    check = partial(check_destination, destination, overwrite, expected or {})

    def ready() -> None:
        _complete(unfinished(destination), destination)
        check()

    check()  # before anything is made
    with temporary_folder(destination, need_bytes, resume, ready) as temporary:
        yield temporary
        if destination.exists():
            check_destination(destination, overwrite, {})  # another program may have made it meanwhile
            replace_files(temporary, destination)
            remove_locked(temporary)
        else:
            add_to_manifest(temporary, files_in(temporary))
            temporary.rename(destination)
            # Not before: a process that finds no lock makes one, and removes the new files as those of a killed one.
            (destination / LOCK).unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(destination: Path, need_bytes: int, resume: str, ready: Callable[[], None]) -> Iterator[Path]:
    """A locked folder beside `destination` in which its contents are made; the block moves them to their place.

    `ready` is called first, once no other process can write the destination. If the block fails, the folder is removed,
    unless it holds the file `resume`, or a replacement of the destination's files that has begun.
    """
    temporary = _unfinished(destination)
    with cleaned_up(), contextlib.ExitStack() as stack:
        stack.enter_context(no_empty_folders(temporary.parent))
        try:
            stack.enter_context(locked(temporary, wait=False))
        except BlockingIOError as error:
            raise UserError(f"another process writes {destination}", "Wait for it, or choose another place.") from error
        try:
            ready()
            if not (resume and (temporary / resume).is_file()):
                _clear(temporary)  # left by a process that was killed
            _check_room(temporary, need_bytes)
            yield temporary
        except BaseException as error:
            if not (resume and (temporary / resume).is_file()) and not (destination / REPLACEMENT_FILE).is_file():
                with contextlib.suppress(OSError):
                    remove_locked(temporary)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"the disk of {destination} is full", "Free some space and run it again.") from error
            raise


def check_destination(destination: Path, overwrite: bool, expected: Mapping[str, Path | None]) -> None:
    """Raises UserError if a destination exists and may not be replaced by files of the `expected` names."""
    if not destination.exists():
        return
    if not destination.name:
        raise UserError(f"{destination} is the root of the file system", "Choose a folder as destination.")
    if not overwrite:
        raise UserError(f"{destination} exists already", "Choose another destination, or allow --overwrite.")
    if not destination.is_dir():
        raise UserError(f"{destination} is a file", "Choose a folder as destination.")
    if (destination / "recipe.toml").is_file():
        raise UserError(f"{destination} is the folder of a run", "Choose another destination.")
    refuse_foreign(destination, expected)


def complete_replacement(folder: Path) -> None:
    """Completes what a process that was killed left of replacing the files of a folder, if there is anything.

    Raises UserError where another process is doing it, the new files are gone, or the record may not be followed.
    """
    if not (folder / REPLACEMENT_FILE).is_file():
        return
    folder = Path(os.path.realpath(folder))
    read_replacement(folder)  # refused before anything is made
    temporary = _unfinished(folder)
    if not temporary.is_dir():
        return complete(temporary, folder)
    try:
        with locked(temporary, wait=False):
            if (folder / REPLACEMENT_FILE).is_file():  # no other process has done it meanwhile
                complete(temporary, folder)
            remove_locked(temporary)
    except BlockingIOError as error:
        raise UserError(f"another process is replacing the files of {folder}", "Wait for it.") from error


def _unfinished(destination: Path) -> Path:
    """The folder in which new files are made; raises UserError for a link, which would lead to files of others."""
    if (temporary := unfinished(destination)).is_symlink():
        raise UserError(f"{temporary} is a link, and camelid makes a folder of this name", "Remove it.")
    return temporary


def _complete(temporary: Path, destination: Path) -> None:
    """The same, where what cannot be completed is about to be replaced anyway."""
    if (destination / REPLACEMENT_FILE).is_file():
        with contextlib.suppress(UserError):
            complete(temporary, destination)


def remove_locked(folder: Path) -> None:
    """Removes a folder whose lock this process holds, the lock last: from then on, others may make the folder anew."""
    _clear(folder)
    (folder / LOCK).unlink()
    with contextlib.suppress(OSError):  # somebody else's lock is in it already
        folder.rmdir()


def _clear(folder: Path) -> None:
    """Removes what is in a folder, but for its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _check_room(folder: Path, need_bytes: int) -> None:
    """Raises UserError where the disk lacks room for so many bytes, of which some may be in the folder already."""
    need = need_bytes - sum(512 * file.stat().st_blocks for file in folder.rglob("*"))
    if (free := shutil.disk_usage(folder).free) < need:
        raise UserError(
            f"{folder.parent} has {in_units(free)} free, and {in_units(need)} are needed",
            "Free some space, or choose another destination.",
        )


def in_units(count: int) -> str:
    """A number of bytes, for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError with the place of the fault."""
    try:
        value = json.loads(path.read_bytes())  # whatever its encoding, and with or without a byte-order mark
    except (ValueError, RecursionError) as error:
        refuse_stand_in(path)
        raise UserError(f"{path} is not JSON: {error}", "Download or copy the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", "Download or copy the file again.")
    return value


def json_text(value: Any) -> str:
    """JSON as Hugging Face writes it."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes a file of it."""
    path.write_text(json_text(value), "utf-8")
