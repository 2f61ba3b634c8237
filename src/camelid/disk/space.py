"""Free space on the disk."""

import shutil
from pathlib import Path

from camelid.errors import UserError


def check_free_space(folder: Path, need_bytes: int) -> None:
    """Raises UserError if the disk lacks `need_bytes` for the contents of a folder.

    The disk blocks that files in the folder already take are counted as part of `need_bytes`.
    """
    need = need_bytes - sum(512 * file.stat().st_blocks for file in folder.rglob("*"))
    if (free := shutil.disk_usage(folder).free) < need:
        raise UserError(
            f"{folder.parent} has {format_bytes(free)} free, and {format_bytes(need)} are needed",
            "Free some space, or choose another destination.",
        )


def format_bytes(count: int) -> str:
    """A number of bytes in decimal units, such as `1.5 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
