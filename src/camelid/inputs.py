"""Paths and text files from the user, and detection of downloads that are not the file itself."""

import codecs
import os
import re
from pathlib import Path

from camelid.errors import UserError

HOME = re.compile(r"(?P<format>[\w-]+::)?(?P<path>~.*)", re.DOTALL)
"""A path in a home folder, optionally after the prefix of a checkpoint format."""

MARKS = (
    # The mark of little-endian UTF-32 starts with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
"""Byte-order marks, and the codecs that decode the data and remove the mark."""


def expand_home(path: str | Path) -> str:
    """A path with a leading `~` or `~user` replaced by the home folder; `format::~/path` keeps its prefix.

    A shell expands `~` only at the start of an unquoted word, neither in `--out=~/x` nor in recipes. A path that starts
    with `~` but does not name a user is returned unchanged.
    """
    found = HOME.fullmatch(str(path))
    return str(path) if found is None else (found["format"] or "") + os.path.expanduser(found["path"])


def named_path(path: str | Path) -> Path:
    """The path that a user gave, with `~` expanded.

    Raises UserError if it is empty: probably a variable was not set, and the current folder is not intended.
    """
    if not str(path):
        raise UserError("a path is empty", "Give one; . is the current folder.")
    return Path(expand_home(path))


def encoding_of(beginning: bytes) -> str:
    """The encoding that a byte-order mark declares; UTF-8 without one."""
    return next((encoding for mark, encoding in MARKS if beginning.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """Decodes UTF-8, UTF-16 or UTF-32 by the byte-order mark; line breaks become `\\n`. Raises UnicodeError."""
    return data.decode(encoding_of(data)).replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path, what: str = "a text file") -> str:
    """The text of a file, decoded by `decode`; raises UserError if it is not text. `what` is the expected file."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", f"Give the path of {what}.") from error
    except UnicodeError as error:
        at = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"{path} is not {encoding_of(path.read_bytes())}{at}", "Save the file as UTF-8.") from error


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = re.compile(rb"\s*<(!doctype\s+html|html|head|\?xml)\b", re.IGNORECASE)

WEB_PAGES = (".html", ".htm", ".xhtml", ".xml", ".svg")


def refuse_stand_in(path: Path) -> None:
    """Raises UserError if a file is a Git LFS pointer, or a web page that was saved instead of a download.

    Only for file types that cannot start like these. Files that cannot be read are left to their own reader.
    """
    refuse_pointer(path)
    if path.suffix.lower() not in WEB_PAGES and WEB_PAGE.match(_beginning(path)):
        raise UserError(
            f"{path} is a web page (HTML or XML), not the file that its name suggests",
            "Download it again; on the Hugging Face Hub, use the link of the file itself (/resolve/, not /blob/).",
        )


def refuse_pointer(path: Path) -> None:
    """Raises UserError if a file is a Git LFS pointer."""
    if _beginning(path).startswith(LFS_POINTER):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself",
            "Run `git lfs install` and `git lfs pull` in its repository, or download the file again.",
        )


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(256).removeprefix(codecs.BOM_UTF8)
    except OSError:
        return b""
