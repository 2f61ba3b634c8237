"""A checkpoint's folder, which is written completely or not at all."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from camelid.checkpoint.replacing import (
    REPLACEMENT_FILE,
    add_to_manifest,
    complete,
    files_in,
    read_replacement,
    refuse_foreign,
    replace_files,
)
from camelid.disk.atomic import remove_locked, temporary_folder, temporary_folder_of
from camelid.disk.locks import LOCK, locked, unfinished
from camelid.errors import UserError
from camelid.inputs import named_path


@contextlib.contextmanager
def new_folder(
    destination: Path,
    need_bytes: int,
    overwrite: bool = False,
    resume: str = "",
    expected: Mapping[str, Path | None] | None = None,
) -> Iterator[Path]:
    """A temporary folder next to `destination`, which is renamed when the block ends, and removed if the block fails.

    With `overwrite`, its files replace those of a checkpoint in `destination`, and all other files there are left
    alone; `expected` maps the names of the files that will be written to files with the same contents, or to None, so
    that conflicts are found early. With `resume`, the name of a file, the temporary folder remains if the block fails,
    and is used again if it holds that file. If the destination is a symbolic link, the folder that it points to is
    written. Raises UserError if the destination exists and may not be replaced, if another process is writing it, or
    if the disk lacks `need_bytes`.
    """
    destination = Path(os.path.realpath(named_path(destination)))
    check = partial(check_destination, destination, overwrite, expected or {})
    replacement_started = (destination / REPLACEMENT_FILE).is_file

    def ready() -> None:
        _complete(unfinished(destination), destination)
        check()

    check()  # before anything is created
    with temporary_folder(destination, need_bytes, resume, ready, replacement_started) as temporary:
        yield temporary
        if destination.exists():
            check_destination(destination, overwrite, {})  # another program may have created it meanwhile
            replace_files(temporary, destination)
            remove_locked(temporary)
        else:
            add_to_manifest(temporary, files_in(temporary))
            temporary.rename(destination)
            # Not before: a process that finds no lock creates one, and removes the files as those of a killed process.
            (destination / LOCK).unlink(missing_ok=True)


def check_destination(destination: Path, overwrite: bool, expected: Mapping[str, Path | None]) -> None:
    """Raises UserError if a destination exists and may not be replaced by files of the `expected` names."""
    if not destination.exists():
        return
    if not destination.name:
        raise UserError(f"{destination} is the root of the file system", "Choose a folder as destination.")
    if not overwrite:
        raise UserError(f"{destination} exists already", "Choose another destination, or add --overwrite.")
    if not destination.is_dir():
        raise UserError(f"{destination} is a file", "Choose a folder as destination.")
    if (destination / "recipe.toml").is_file():
        raise UserError(f"{destination} is the folder of a run", "Choose another destination.")
    refuse_foreign(destination, expected)


def complete_replacement(folder: Path) -> None:
    """Completes the replacement of a folder's files that a killed process started, if there is one.

    Raises UserError if another process is doing so, if the new files are gone, or if the record of the replacement
    cannot be trusted.
    """
    if not (folder / REPLACEMENT_FILE).is_file():
        return
    folder = Path(os.path.realpath(folder))
    read_replacement(folder)  # refused before anything is created
    temporary = temporary_folder_of(folder)
    if not temporary.is_dir():
        return complete(temporary, folder)
    try:
        with locked(temporary, wait=False):
            if (folder / REPLACEMENT_FILE).is_file():  # no other process has completed it meanwhile
                complete(temporary, folder)
            remove_locked(temporary)
    except BlockingIOError as error:
        raise UserError(f"another process is replacing the files of {folder}", "Wait for it.") from error


def _complete(temporary: Path, destination: Path) -> None:
    """Completes a started replacement, or leaves it if it cannot be completed: its files are replaced anyway."""
    if (destination / REPLACEMENT_FILE).is_file():
        with contextlib.suppress(UserError):
            complete(temporary, destination)
