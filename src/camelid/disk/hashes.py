"""SHA-256 of files, cached for files that have not changed since they were read."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from camelid.disk.atomic import write_json
from camelid.disk.paths import cache_folder

SETTLED_S = 3.0  # longer than the resolution of any file system's clock, which is up to two seconds


def hash_file(
    path: Path, stopped: Callable[[], bool] = lambda: False, read: Callable[[int], None] = lambda size: None
) -> str:
    """SHA-256 of a file, or of a part if `stopped` returns True; `read` is called with the size of each block."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while not stopped() and (data := file.read(2**20)):
            sha.update(data)
            read(len(data))
    return sha.hexdigest()


def content_hash(
    path: Path, stopped: Callable[[], bool] = lambda: False, read: Callable[[int], None] = lambda size: None
) -> str:
    """SHA-256 of a file, or of a part if `stopped` returns True; hashes of complete files are cached.

    A file is read again only if its inode, size, or time of change differs from the last time. The time of change
    (ctime) is set by the kernel and cannot be reset, unlike the time of modification. It does not show a change within
    the resolution of the file system's clock, so the hash of a file that changed shortly before it was read is not
    cached. `read` is called with the size of each block that is read, or of the file if its hash is cached.
    """
    known = cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()}.json"
    stamp = _stamp(path)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        remembered = json.loads(known.read_bytes())
        if remembered["stamp"] == stamp:
            read(stamp["bytes"])
            return remembered["sha256"]
    began = time.time()
    found = hash_file(path, stopped, read)
    settled = began - max(stamp["mtime_ns"], stamp["ctime_ns"]) / 1e9 > SETTLED_S
    if settled and not stopped() and _stamp(path) == stamp:
        with contextlib.suppress(OSError):  # without a cache, files are read each time
            known.parent.mkdir(parents=True, exist_ok=True)
            write_json(known, {"path": os.fsencode(path).decode(errors="replace"), "stamp": stamp, "sha256": found})
    return found


def _stamp(path: Path) -> dict[str, int]:
    found = path.stat()
    return {
        "inode": found.st_ino,
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }
