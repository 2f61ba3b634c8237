"""A folder that appears whole or not at all, and the JSON in it."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camelid.errors import UserError
from camelid.interrupts import cleaned_up
from camelid.locks import LOCK, locked


@contextlib.contextmanager
def new_folder(destination: Path, need_bytes: int, overwrite: bool = False, resume: str = "") -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name when the block ends, and is removed when it fails.

    With `resume`, the name of a file, it stays when it fails; so does what an earlier process left that holds the file.
    A link is written where it leads. Raises UserError where the destination exists and may not be replaced, where
    another process is writing it, or where the disk lacks `need_bytes`.
    """
    destination = Path(os.path.realpath(destination))
    temporary, old = (destination.parent / f".{destination.name}.{word}" for word in ("incomplete", "replaced"))
    _check_free(destination, overwrite)  # before anything is made; and once more when nobody else can make it
    with cleaned_up(), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(temporary, wait=False))
        except BlockingIOError as error:
            raise UserError(f"another process writes {destination}", "Wait for it, or choose another place.") from error
        try:
            if old.exists() and not destination.exists():
                old.rename(destination)  # its process was killed just before the new one took its place
            _check_free(destination, overwrite)
            if not (resume and (temporary / resume).is_file()):
                _clear(temporary)  # left by a process that was killed
            _check_room(temporary, need_bytes)
            yield temporary
        except BaseException as error:
            if not (resume and (temporary / resume).is_file()):
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"the disk of {destination} is full", "Free some space and run it again.") from error
            raise
        (temporary / LOCK).unlink()
        if destination.exists():
            shutil.rmtree(old, ignore_errors=True)
            destination.rename(old)
        temporary.rename(destination)
        shutil.rmtree(old, ignore_errors=True)


def _check_free(destination: Path, overwrite: bool) -> None:
    """Raises UserError where a destination is there and may not be replaced."""
    if not destination.exists():
        return
    if not overwrite:
        raise UserError(f"{destination} exists already", "Choose another destination, or allow --overwrite.")
    if not destination.is_dir():
        raise UserError(f"{destination} is a file", "Choose a folder as destination.")
    if (destination / "recipe.toml").is_file():
        raise UserError(f"{destination} is the folder of a run", "Choose another destination.")
    if any(destination.iterdir()) and not (destination / "config.json").is_file():
        raise UserError(f"{destination} holds something else than a checkpoint", "Choose another destination.")


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
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
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
