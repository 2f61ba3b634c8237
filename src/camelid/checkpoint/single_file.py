"""A checkpoint that is one file, which appears whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from camelid.checkpoint.files import MANIFEST
from camelid.checkpoint.folder import _check_room, _clear
from camelid.errors import UserError
from camelid.locks import locked


def manifest_of(file: Path) -> Path:
    """Where the checksums of a file's tensors are, if camelid wrote it as a file of its own."""
    return file.with_name(f"{file.name}.manifest.json")


@contextlib.contextmanager
def new_file(destination: Path, need_bytes: int, overwrite: bool = False, resume: str = "") -> Iterator[Path]:
    """A temporary folder in which a file of the destination's name is written, with its MANIFEST.

    When the block ends, both are moved to their places; when it fails, the folder is removed, unless it has the file
    `resume`. A link is written where it leads. Raises UserError where the destination exists and may not be replaced,
    where another process is writing it, or where the disk lacks `need_bytes`.
    """
    destination = Path(os.path.realpath(destination))
    temporary = destination.with_name(f".{destination.name}.incomplete")
    _check_free(destination, overwrite)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(temporary, wait=False))
        except BlockingIOError as error:
            raise UserError(f"another process writes {destination}", "Wait for it, or choose another place.") from error
        try:
            _check_free(destination, overwrite)  # once more, as nobody else can make it now
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
        manifest_of(destination).unlink(missing_ok=True)  # of the file that is replaced
        os.replace(temporary / destination.name, destination)
        os.replace(temporary / MANIFEST, manifest_of(destination))
        shutil.rmtree(temporary)


def _check_free(destination: Path, overwrite: bool) -> None:
    """Raises UserError where a destination is there and may not be replaced."""
    if destination.is_dir():
        raise UserError(f"{destination} is a folder", "Choose the name of a file, or remove the folder.")
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists already", "Choose another destination, or allow --overwrite.")
