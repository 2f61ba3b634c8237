"""Folders that only one process at a time may use, and the names of temporary folders."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOCK = ".lock"
LONGEST_NAME = 255  # bytes, on all usual file systems


def unfinished(folder: Path) -> Path:
    """The hidden folder next to `folder` in which its contents are written until they are complete."""
    name = f".{folder.name}.incomplete"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(folder.name)).hexdigest()}.incomplete"
    return folder.with_name(name)


@contextlib.contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """At the end, removes a folder and its parents if they did not exist at the beginning and are empty."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for place in missing:
                place.rmdir()


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Creates a folder and locks it against the other processes of this machine; the block may remove it.

    Raises BlockingIOError if another process has locked it, unless this one is to `wait`. On a file system without
    locks, other processes are not excluded.
    """
    with _lock(folder, wait):
        yield


def _lock(folder: Path, wait: bool) -> IO:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        with contextlib.suppress(FileNotFoundError):
            file = path.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise
            except OSError:
                return file
            # The previous holder may have removed the folder, and another process may have created it again.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()


def is_locked(folder: Path) -> bool:
    """Whether a process of this machine has locked a folder; creates nothing."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or the file system has none
        return False
    return False
