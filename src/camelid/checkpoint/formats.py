"""Every format by name: which paths look like it, how it is opened, how it is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from camelid.checkpoint import hf
from camelid.checkpoint.folder import new_folder
from camelid.checkpoint.hub import find
from camelid.checkpoint.opened import Checkpoint, Saving
from camelid.errors import UserError
from camelid.model.config import ModelConfig


@dataclass(frozen=True)
class Format:
    what: str
    looks: Callable[[Path], bool]
    """whether a file or a folder looks like it, from names and first bytes"""
    open: Callable[[Path, ModelConfig | None], Checkpoint]
    """opens it; the config is what the user says of a model whose files do not"""
    write: Callable[[Path, Saving], None]
    """writes into a folder that is new"""


FORMATS: Mapping[str, Format] = {
    "hf": Format("Hugging Face: config.json with safetensors or .bin", hf.looks, hf.open_folder, hf.write),
}
PREFIXES = {name: name for name in FORMATS}


def open_checkpoint(path: str | Path, format: str | None = None, config: ModelConfig | None = None) -> Checkpoint:
    """Opens a checkpoint of any format where it lies, or a repository of the Hugging Face Hub by its name.

    `format` None asks the files; `format::path` says it too. Raises UserError for what is damaged, incomplete,
    ambiguous or not understood.
    """
    prefix, colons, rest = str(path).partition("::")
    if colons and not Path(path).exists():
        if prefix not in PREFIXES:
            raise UserError(f"{prefix}:: names no format", f"The prefixes are {', '.join(PREFIXES)}.")
        format, path = PREFIXES[prefix], rest
    place = Path(path).expanduser()
    if not place.exists():
        place = find(path, hf.understood)
    format = format or detect(place)
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown", f"The formats are {', '.join(FORMATS)}.")
    return FORMATS[format].open(place, config)


def detect(place: Path) -> str:
    """The name of the one format that a path looks like."""
    found = [name for name, format in FORMATS.items() if format.looks(place)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{place} could be {' or '.join(found)}",
            f"Say which, for example as {found[0]}::{place}.",
        )
    if (place / "config.json").is_file():
        return "hf"  # whose reader can say what is missing
    kinds = "; ".join(format.what for format in FORMATS.values())
    raise UserError(f"{place} has no config.json, and nothing of other formats", f"camelid opens {kinds}.")


def write_checkpoint(destination: Path, saving: Saving, format: str = "hf", *, overwrite: bool = False) -> None:
    """Writes a folder under a temporary name until it is whole."""
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown", f"The formats are {', '.join(FORMATS)}.")
    with new_folder(destination, saving.total, overwrite) as folder:
        FORMATS[format].write(folder, saving)
