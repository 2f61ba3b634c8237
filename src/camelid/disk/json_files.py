"""JSON objects in the files of checkpoints."""

import json
from pathlib import Path
from typing import Any

from camelid.errors import UserError
from camelid.inputs import refuse_stand_in


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object in any Unicode encoding, with or without a byte-order mark.

    Raises UserError with the position of the fault if the file is not JSON, or holds another value than an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        refuse_stand_in(path)
        raise UserError(f"{path} is not JSON: {error}", "Download or copy the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object", "Download or copy the file again.")
    return value


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Reads a JSON object; returns an empty one if the file does not exist or holds anything else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def hf_json(value: Any) -> str:
    """The text of a JSON file, formatted as Hugging Face's libraries format it."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_hf_json(path: Path, value: Any) -> None:
    """Writes a JSON file as Hugging Face's libraries do; not atomic, for folders that are not in their place yet."""
    path.write_text(hf_json(value), "utf-8")
