"""The cache folder, for files that camelid can create again."""

import os
from pathlib import Path

from camelid.errors import UserError
from camelid.inputs import expand_home


def cache_folder() -> Path:
    """The folder in CAMELID_CACHE, or camelid's folder in the user's cache folder (XDG_CACHE_HOME or ~/.cache)."""
    chosen = os.environ.get("CAMELID_CACHE")
    return Path(expand_home(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "camelid"))


def make_writable(folder: Path, other_choice: str = "") -> None:
    """Creates a folder of the cache; raises UserError if it cannot be created or written.

    The advice names CAMELID_CACHE and `other_choice`, another setting that determines the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "it is read-only for this user"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise UserError(
            f"the cache {folder} cannot be written: {reason}",
            f"Set the environment variable CAMELID_CACHE{other_choice} to a folder that you may write.",
        )
