"""The recipes that are installed with camelid, by name; each begins with comments that say what it is."""

import difflib
from pathlib import Path

from camelid.errors import UserError

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of the recipes, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def path_of(name: str) -> Path:
    """The file of a recipe; raises UserError with the nearest names if there is none."""
    if name not in names():
        raise UserError(f"there is no recipe {name!r}", _nearest(name))
    return FOLDER / f"{name}.toml"


def summary(name: str) -> str:
    """What a recipe is, from its first line."""
    return path_of(name).read_text("utf-8").splitlines()[0].removeprefix("# ")


def find(path: Path) -> Path:
    """`path` if it is there or names a file, and otherwise the recipe with this name.

    Raises UserError if it is neither.
    """
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path
    if path.name not in names():
        raise UserError(f"{path} is neither a file nor the name of a recipe", _nearest(path.name))
    return path_of(path.name)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, names(), 3)
    listed = " or ".join(map(repr, near))
    return f"Did you mean {listed}?" if near else "`camelid recipes` lists them."
