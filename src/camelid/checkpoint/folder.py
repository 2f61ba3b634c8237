"""A folder that appears whole or not at all, and the JSON in it."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from camelid.errors import UserError


@contextmanager
def new_folder(destination: Path, need_bytes: int, overwrite: bool = False, resume: str = "") -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name when the block ends, and is removed when it fails.

    With `resume`, the name of a file, it stays when it fails; so does what an earlier process left that holds the file.
    Raises UserError where the destination exists and may not be replaced, or the disk lacks `need_bytes`.
    """
    destination = destination.absolute()
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists already", "Choose another destination, or allow --overwrite.")
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file", "Choose a folder as destination.")
    if destination.exists() and (destination / "recipe.toml").is_file():
        raise UserError(f"{destination} is the folder of a run", "Choose another destination.")
    if destination.exists() and any(destination.iterdir()) and not (destination / "config.json").is_file():
        raise UserError(f"{destination} holds something else than a checkpoint", "Choose another destination.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.parent / f".{destination.name}.incomplete"
    if not (resume and (temporary / resume).is_file()):
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    need_bytes -= sum(512 * file.stat().st_blocks for file in temporary.rglob("*"))
    if (free := shutil.disk_usage(destination.parent).free) < need_bytes:
        raise UserError(
            f"{destination.parent} has {free / 1e9:.1f} GB free, and {need_bytes / 1e9:.1f} GB are needed",
            "Free some space, or choose another destination.",
        )
    temporary.mkdir(exist_ok=True)
    try:
        yield temporary
    except BaseException as error:
        if not resume:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk of {destination} is full", "Free some space and run it again.") from error
        raise
    if destination.exists():
        old = destination.parent / f".{destination.name}.replaced"
        shutil.rmtree(old, ignore_errors=True)
        destination.rename(old)
        temporary.rename(destination)
        shutil.rmtree(old)
    else:
        temporary.rename(destination)


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
