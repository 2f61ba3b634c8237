"""Small files that appear whole under their name, or stay as they were."""

import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replaces a file, or makes it, with the permissions of a new file; text is encoded as UTF-8.

    If it fails, the temporary file is removed; if the process is killed, it stays. The disk is not waited for, so the
    file may be empty after a crash of the machine.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.incomplete")  # others may write the same file
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON; the file appears complete or not at all."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")
