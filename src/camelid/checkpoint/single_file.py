"""A checkpoint that is a single file, which is written completely or not at all."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from camelid.checkpoint.containers.gguf_file import MAGIC
from camelid.checkpoint.files import MANIFEST
from camelid.disk.atomic import remove_locked, temporary_folder
from camelid.disk.json_files import read_json_or_empty
from camelid.errors import UserError
from camelid.inputs import named_path


def manifest_of(file: Path) -> Path:
    """The path of the manifest with the checksums of a file's tensors, if camelid wrote it as a single file."""
    return file.with_name(f"{file.name}.manifest.json")


@contextlib.contextmanager
def new_file(destination: Path, need_bytes: int, overwrite: bool = False, resume: str = "") -> Iterator[Path]:
    """Yields a temporary folder, in which the block writes a file of the destination's name and its MANIFEST.

    When the block ends, both are moved to their places; if it fails, the folder is removed, unless it has the file
    `resume`. If the destination is a symbolic link, the file that it points to is written. Raises UserError if the
    destination exists and may not be replaced, if another process is writing it, or if the disk lacks `need_bytes`.
    """
    destination = Path(os.path.realpath(named_path(destination)))
    check = partial(_check_free, destination, overwrite)
    check()  # before anything is created
    with temporary_folder(destination, need_bytes, resume, check) as temporary:
        yield temporary
        manifest_of(destination).unlink(missing_ok=True)  # of the file that is replaced
        os.replace(temporary / destination.name, destination)
        os.replace(temporary / MANIFEST, manifest_of(destination))
        remove_locked(temporary)


def _check_free(destination: Path, overwrite: bool) -> None:
    """Raises UserError if a destination exists and may not be replaced."""
    if destination.is_dir():
        raise UserError(f"{destination} is a folder", "Choose the name of a file, or remove the folder.")
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists already", "Choose another destination, or add --overwrite.")
    if destination.exists() and not _begins(destination, MAGIC):
        raise UserError(f"{destination} is not a GGUF file, and would be lost", "Choose another destination.")
    if manifest_of(destination).exists() and not isinstance(
        read_json_or_empty(manifest_of(destination)).get("files"), dict
    ):
        raise UserError(f"{manifest_of(destination)} was not written by camelid, and would be lost", "Move it away.")


def _begins(file: Path, magic: bytes) -> bool:
    with file.open("rb") as held:
        return held.read(len(magic)) == magic
