"""Files and folders that appear under their name completely, or stay as they were."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from camelid.disk.locks import LOCK, locked, no_empty_folders, unfinished
from camelid.disk.space import check_free_space
from camelid.errors import UserError
from camelid.interrupts import cleaned_up

# Small files ------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes | str) -> None:
    """Creates or replaces a file, with the permissions of a new file; text is encoded as UTF-8.

    If writing fails, the temporary file is removed; if the process is killed, it remains. The data is not flushed to
    the disk, so the file may be empty after a crash of the machine.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.incomplete")  # others may write the same file
    try:
        with naming(path):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names `path` in errors of writing to it, of which some name no file: that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Folders ----------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_folder(
    destination: Path,
    need_bytes: int,
    resume: str = "",
    ready: Callable[[], None] = lambda: None,
    in_use: Callable[[], bool] = lambda: False,
) -> Iterator[Path]:
    """Yields a locked folder next to `destination` for its new contents, which the block moves to their place.

    `ready` is called first, once no other process can write the destination. If the block fails, the folder is removed,
    unless it holds the file named `resume`, or `in_use` returns True. A folder that a killed process left is emptied
    first, unless it holds the file `resume`. Raises UserError if another process is writing the destination, or if the
    disk is full or lacks `need_bytes`.
    """
    temporary = temporary_folder_of(destination)
    with cleaned_up(), contextlib.ExitStack() as stack:
        stack.enter_context(no_empty_folders(temporary.parent))
        try:
            stack.enter_context(locked(temporary, wait=False))
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing {destination}", "Wait for it, or choose another one."
            ) from error
        try:
            ready()
            if not (resume and (temporary / resume).is_file()):
                _empty(temporary)
            check_free_space(temporary, need_bytes)
            yield temporary
        except BaseException as error:
            if not (resume and (temporary / resume).is_file()) and not in_use():
                with contextlib.suppress(OSError):
                    remove_locked(temporary)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"the disk of {destination} is full", "Free some space and run it again.") from error
            raise


def temporary_folder_of(destination: Path) -> Path:
    """The path of the temporary folder of `destination`; raises UserError if it is a symbolic link."""
    if (temporary := unfinished(destination)).is_symlink():  # it would lead to files of others
        raise UserError(f"{temporary} is a symbolic link, and camelid creates a folder of this name", "Remove it.")
    return temporary


def remove_locked(folder: Path) -> None:
    """Removes a folder whose lock this process holds, and the lock last: other processes may then create it again."""
    _empty(folder)
    (folder / LOCK).unlink()
    with contextlib.suppress(OSError):  # another process has created its lock already
        folder.rmdir()


def _empty(folder: Path) -> None:
    """Removes everything in a folder except for its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
