"""The folder of a run: one process trains in it at a time, and only by the recipe that began it."""

import contextlib
import fcntl
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from camelid.errors import UserError
from camelid.parallel.hosts import is_main, wait_for_all
from camelid.recipe import Recipe, structure, write_recipe

FREE = {
    f"train.{name}"
    for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "evaluate_every", "trackers")
} | {"data.workers", "data.prepare_workers", "data.cache"}
"""what may change when a run goes on; steps may only grow, and the mesh may be any"""


def has_begun(folder: Path) -> bool:
    """Whether a run has checkpoints to go on from."""
    return any(file.name.isdigit() for file in folder.glob("checkpoints/*"))


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder of something else, and a run that has begun with another recipe."""
    kept = folder / "recipe.toml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "Choose another folder with --run.")
    if not kept.is_file():
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise UserError(f"{folder} holds something else than a run", "Choose another folder with --run.")
        return
    if has_begun(folder) and (changed := _changed(kept.read_text("utf-8"), write_recipe(recipe))):
        raise UserError(
            f"{folder} holds a run with another recipe: {changed}",
            "Choose another --run, or start with the recipe that the folder keeps.",
        )


@contextlib.contextmanager
def claimed(folder: Path, recipe: Recipe, files: Mapping[str, bytes]) -> Iterator[None]:
    """The run's folder, locked, with this recipe and these files in it; UserError where another process has it."""
    if not is_main():
        wait_for_all("run folder")
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process trains in {folder}", "Wait for it, or choose another --run.") from error
        check_folder(folder, recipe)
        # The recipe first: it is what tells this folder from one of something else.
        for name, content in {"recipe.toml": write_recipe(recipe).encode(), **files}.items():
            _write(folder / name, content)
        wait_for_all("run folder")
        yield


def _write(path: Path, content: bytes) -> None:
    """A file that is there whole, or as it was before."""
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_bytes(content)
    temporary.rename(path)


def _changed(kept: str, new: str) -> str | None:
    """The first field in which two recipes differ, other than those that may change."""
    # Read and written again, the kept one has the fields that came to recipes after it.
    kept = write_recipe(structure(tomllib.loads(kept)))
    old_fields, new_fields = (_flat(tomllib.loads(text)) for text in (kept, new))
    for field in sorted(old_fields.keys() | new_fields.keys()):
        before, now = old_fields.get(field), new_fields.get(field)
        if before != now and field not in FREE and not field.startswith("mesh."):
            return f"{field} = {before!r} there, {now!r} here"
    return None


def _flat(table: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
