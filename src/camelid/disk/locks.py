"""Folders that one process holds at a time, and where they are while they are made."""

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
    """The hidden folder beside another one in which its contents are made."""
    name = f".{folder.name}.incomplete"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(folder.name)).hexdigest()}.incomplete"
    return folder.with_name(name)


@contextlib.contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Removes this folder and those above it at the end, if they did not exist at the beginning and are empty."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for place in missing:
                place.rmdir()


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Makes a folder, and holds it alone among the processes of this machine; whoever holds it may remove it.

    Raises BlockingIOError where another process has it and this one is not to `wait`. A file system without locks keeps
    nobody out.
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
            # Who held it before may have removed the folder, and somebody else have made it again.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()
