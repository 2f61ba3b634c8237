"""The folder of prepared stores that recipes share: what is in it, and what is not needed any more."""

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
"""endings of what a killed process may have left, after a leading dot"""


@dataclass(frozen=True)
class Cached:
    """A prepared store, the row plans of one that lies elsewhere, or what a killed process has left."""

    folder: Path
    kind: str
    """store, plans or unfinished"""
    bytes: int
    sources: tuple[str, ...]
    """the files that a store was prepared from"""
    used: float
    """when it was last opened or written, in seconds since the epoch"""


def list_cached(root: Path) -> list[Cached]:
    """What lies in a cache, the most recently used first; whatever else is in the folder is left out."""
    folders = [*_folders(root), *_folders(root / "plans")]
    found = [entry for folder in folders if (entry := _describe(folder)) is not None]
    return sorted(found, key=lambda entry: -entry.used)


def in_use(entry: Cached) -> bool:
    """Whether a process has it open, or may have: that cannot be determined for files that may not be opened."""
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
    """Those that were not used since a time, in seconds since the epoch."""
    return [entry for entry in entries if entry.used < time]


def beyond(entries: Iterable[Cached], bytes: int) -> list[Cached]:
    """Those to remove so that the others, the most recently used, are no more than so many bytes."""
    ordered = sorted(entries, key=lambda entry: -entry.used)
    sizes = itertools.accumulate(entry.bytes for entry in ordered)
    return [entry for entry, size in zip(ordered, sizes, strict=True) if size > bytes]


def _remove(entry: Cached) -> bool:
    """Whether an entry could be removed; one of which this user may not remove everything is left as it is."""
    inside = [os.path.join(folder, name) for folder, names, _ in os.walk(entry.folder) for name in names]
    if not all(
        os.access(folder, os.R_OK | os.W_OK | os.X_OK) for folder in (entry.folder.parent, entry.folder, *inside)
    ):
        return False
    # Renamed first: whoever looks for it now finds nothing, and prepares it again.
    doomed = entry.folder.with_name(f".{entry.folder.name}.pruned")
    try:
        if entry.kind != "unfinished":
            entry.folder.rename(doomed)
    except OSError:  # the folder of the cache has the sticky bit, or another process was faster
        return False
    shutil.rmtree(doomed if doomed.exists() else entry.folder)
    return True


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def _describe(folder: Path) -> Cached | None:
    sources: tuple[str, ...] = ()
    if folder.name.startswith(".") and folder.name.endswith(UNFINISHED):
        kind = "unfinished"
    elif is_store(folder):
        kind = "store"
        with contextlib.suppress(UserError, OSError, LookupError, TypeError):
            groups = read_manifest(folder)["prepared"]["files"]
            sources = tuple(file["path"] for group in groups for file in group)
    elif folder.parent.name == "plans":
        kind = "plans"
    else:
        return None
    try:
        return Cached(folder, kind, _size(folder), sources, folder.stat().st_mtime)
    except FileNotFoundError:  # another process has removed it
        return None


def _size(folder: Path) -> int:
    """The bytes of the files in a folder; those that vanish meanwhile are not counted."""
    size = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(inner, name)).st_size
    return size


def _claimed(entry: Cached, stack: contextlib.ExitStack) -> bool:
    """Whether nobody else has it; then it is this process's until the stack ends.

    Who prepares a store holds its folder's lock, who reads one locks what it maps (see store.map_array). A file system
    without locks does not say who has it, so everything there counts as in use; so do files of another user that this
    one may not open.
    """
    try:
        if (entry.folder / LOCK).exists():
            stack.enter_context(locked(entry.folder, wait=False))
        for file in entry.folder.rglob("*.bin"):
            fcntl.flock(stack.enter_context(_opened(file)), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _opened(file: Path) -> IO[bytes]:
    try:
        return file.open("r+b")  # NFS locks a file for one process only if it is open for writing
    except PermissionError:
        return file.open("rb")
