"""The cache of prepared stores that recipes share: lists its entries, and removes those that are not needed."""

import contextlib
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from camelid.data.preparation.store import is_store, read_manifest
from camelid.disk.locks import LOCK, locked
from camelid.errors import UserError

UNFINISHED = (".incomplete", ".pruned")
"""Suffixes of folders that a killed process may have left; their names start with a dot."""


@dataclass(frozen=True)
class Cached:
    """A prepared store, or the unfinished folder that a killed process has left."""

    folder: Path
    kind: str
    """`store` or `unfinished`."""
    bytes: int
    sources: tuple[str, ...]
    """Files that a store was prepared from."""
    used: float
    """Time at which it was last opened or written, in seconds since the epoch."""


def list_cached(root: Path) -> list[Cached]:
    """Lists the entries of a cache, the most recently used first; other files in the folder are ignored."""
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    found = [entry for folder in folders if (entry := _describe(folder)) is not None]
    return sorted(found, key=lambda entry: -entry.used)


def in_use(entry: Cached) -> bool:
    """Whether a process has it open, or may have: for files that this user may not open, that is unknown."""
    with contextlib.ExitStack() as stack:
        return not _claimed(entry, stack)


def prune(entries: Iterable[Cached], keep: Callable[[Cached], None] = lambda entry: None) -> Iterator[Cached]:
    """Removes entries and yields each one that was removed.

    `keep` is called with the others: those in use, and those that this user is not permitted to remove.
    """
    for entry in entries:
        with contextlib.ExitStack() as stack:
            if _claimed(entry, stack) and _remove(entry):
                yield entry
            else:
                keep(entry)


def unused_since(entries: Iterable[Cached], time: float) -> list[Cached]:
    """Returns the entries that were not used since a time, in seconds since the epoch."""
    return [entry for entry in entries if entry.used < time]


def beyond(entries: Iterable[Cached], bytes: int) -> list[Cached]:
    """Returns the entries to remove so that the others, the most recently used, take at most this many bytes."""
    ordered = sorted(entries, key=lambda entry: -entry.used)
    sizes = itertools.accumulate(entry.bytes for entry in ordered)
    return [entry for entry, size in zip(ordered, sizes, strict=True) if size > bytes]


def _remove(entry: Cached) -> bool:
    """Removes an entry and returns whether it could; it is not touched if this user may not remove all of its files."""
    inside = [os.path.join(folder, name) for folder, names, _ in os.walk(entry.folder) for name in names]
    if not all(
        os.access(folder, os.R_OK | os.W_OK | os.X_OK) for folder in (entry.folder.parent, entry.folder, *inside)
    ):
        return False
    # Renamed first: a process that looks for it now finds nothing, and prepares it again.
    doomed = entry.folder.with_name(f".{entry.folder.name}.pruned")
    try:
        if entry.kind != "unfinished":
            entry.folder.rename(doomed)
    except OSError:  # the folder of the cache has the sticky bit, or another process was faster
        return False
    shutil.rmtree(doomed if doomed.exists() else entry.folder)
    return True


def _describe(folder: Path) -> Cached | None:
    sources: tuple[str, ...] = ()
    if folder.name.startswith(".") and folder.name.endswith(UNFINISHED):
        kind = "unfinished"
    elif is_store(folder):
        kind = "store"
        with contextlib.suppress(UserError, OSError, LookupError, TypeError):
            groups = read_manifest(folder)["prepared"]["files"]
            sources = tuple(file["path"] for group in groups for file in group)
    else:
        return None
    try:
        return Cached(folder, kind, _size(folder), sources, folder.stat().st_mtime)
    except FileNotFoundError:  # another process has removed it
        return None


def _size(folder: Path) -> int:
    """The size of the files in a folder in bytes; files that are removed meanwhile are not counted."""
    size = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(inner, name)).st_size
    return size


def _claimed(entry: Cached, stack: contextlib.ExitStack) -> bool:
    """Whether no other process uses it; then it is locked for this process until the stack is closed.

    A process that prepares a store holds the lock of its folder, and one that reads a store locks the files that it
    maps (see store.map_array). Everything on a file system without locks counts as in use, and so do files that this
    user may not open.
    """
    try:
        if (entry.folder / LOCK).exists():
            stack.enter_context(locked(entry.folder, wait=False))
        for file in entry.folder.rglob("*.bin"):
            fcntl.flock(stack.enter_context(_open(file)), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _open(file: Path) -> IO[bytes]:
    try:
        return file.open("r+b")  # NFS gives an exclusive lock only for a file that is open for writing
    except PermissionError:
        return file.open("rb")
