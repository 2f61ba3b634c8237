"""The folder of a run: one process trains in it at a time, and only by the recipe that began it."""

import contextlib
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from camelid.checkpoint.state.stored import steps_in
from camelid.disk.atomic import write_atomically
from camelid.disk.locks import LOCK, locked, no_empty_folders
from camelid.errors import UserError
from camelid.parallel.hosts import broadcast_from_main, is_main, wait_for_all
from camelid.runs.recipe import Recipe, completed, structure, write_recipe

FREE = {
    f"train.{name}"
    for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "evaluate_every", "trackers")
} | {"run", "data.workers", "data.prepare_workers", "data.cache", "optimizer.decay_steps"}
"""The fields that may change when a run goes on, beside the mesh. A folder may have been moved since."""


STEPS = "checkpoints"
"""The folder of the checkpoints."""
MODEL = "model"
"""the folder of the finished model"""
DATA = "data.json"
"""The file that describes what the batches were made of."""
FILES = "files"
"""Its entry, beside those of the splits, of the files of text."""


def has_begun(folder: Path) -> bool:
    """Whether a run has checkpoints to go on from."""
    return bool(steps_in(folder / STEPS))


def kept_recipe(folder: Path) -> Recipe | None:
    """The recipe of a run that has checkpoints; None for a run that has none yet. Every process calls this."""
    text = broadcast_from_main(lambda: _kept_text(folder))
    return None if text is None else structure(tomllib.loads(text))


def _kept_text(folder: Path) -> str | None:
    kept = folder / "recipe.toml"
    return kept.read_text("utf-8") if kept.is_file() and has_begun(folder) else None


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder of something else, and a run that has begun with another recipe, which must be `completed`."""
    kept = folder / "recipe.toml"
    if not _is_utf8(str(folder)):
        raise UserError(f"{str(folder)!a} is not UTF-8, as the names in recipe.toml are", "Choose another --run.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "Choose another folder with --run.")
    if not kept.is_file():
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise UserError(f"{folder} holds something else than a run", "Choose another folder with --run.")
        return
    if (text := _kept_text(folder)) is None:
        if (folder / MODEL).exists():
            raise UserError(
                f"{folder} holds the model of a run whose checkpoints are gone: training would begin again at step 0, "
                "and replace it",
                "Choose another --run, or move the model away if it is not needed.",
            )
        return
    before = structure(tomllib.loads(text))
    if changed := _changed(write_recipe(completed(before, None)), write_recipe(recipe)):
        raise UserError(
            f"{folder} holds a run with another recipe: {changed}",
            "Choose another --run, or start with the recipe that the folder keeps.",
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


Data = Mapping[str, Sequence[Mapping[str, Any]]]
"""By split: of each store that it is read from, its `folder`, `fingerprint`, and the hashes of its `sources`.

Under FILES: the path, size and time of each file of text."""


@contextlib.contextmanager
def claimed(folder: Path, recipe: Recipe, data: Data) -> Iterator[None]:
    """The run's folder, locked. Nothing else is written until `record` is called, and nothing is left if it never is.

    Raises UserError where another process has it, or the run has begun with another recipe or other data.
    """
    if not is_main():
        wait_for_all("run folder")
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_empty_folders(folder))
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError as error:
            raise UserError(f"another process trains in {folder}", "Wait for it, or choose another --run.") from error
        stack.callback(_remove_lock_alone, folder)
        check_folder(folder, recipe)
        if has_begun(folder) and (kept := kept_data(folder)) is not None:
            _check_data(folder, kept, data)
        wait_for_all("run folder")
        yield


def kept_data(folder: Path) -> Data | None:
    """What a run is trained on; None for a run of an older camelid, which did not write it."""
    return json.loads((folder / DATA).read_text("utf-8")) if (folder / DATA).is_file() else None


def new_aside(folder: Path) -> Path:
    """A new folder, set_aside_1 or the next one, in that of a run; it holds a copy of metrics.jsonl."""
    number = 1
    while (aside := folder / f"set_aside_{number}").exists():
        number += 1
    aside.mkdir()
    if (folder / "metrics.jsonl").exists():
        shutil.copyfile(folder / "metrics.jsonl", aside / "metrics.jsonl")
    return aside


def record(folder: Path, recipe: Recipe, files: Mapping[str, bytes], data: Data) -> None:
    """Writes what a run is into its folder, once nothing can refuse it any more.

    Files of a run that has begun are not written again: they are the same, or were changed by the user.
    """
    if not is_main():
        return
    kept = {name for name in files if has_begun(folder) and (folder / name).exists()}
    # The recipe first: it distinguishes the folder of a run from others.
    about = {"recipe.toml": write_recipe(recipe).encode(), DATA: (json.dumps(data, indent=1) + "\n").encode()}
    for name, content in {**about, **files}.items():
        if name not in kept:
            write_atomically(folder / name, content)


def _remove_lock_alone(folder: Path) -> None:
    """Removes the lock from a folder that has nothing else in it."""
    if [file.name for file in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()


def _check_data(folder: Path, before: Data, now: Data) -> None:
    """Raises UserError where what is trained on is not what it was: the batches of all steps would be others."""
    for split, stores in before.items():
        if split == FILES:
            continue  # only the tokens count
        for was, store in zip(stores, now.get(split, []), strict=False):
            if was["fingerprint"] != store["fingerprint"]:
                names = sorted({path for path, _ in was["sources"].items() ^ store["sources"].items()})
                raise UserError(
                    f"{names[0] if names else f'the tokens of the {split} text'} changed since {folder} began",
                    f"Bring back what was there, or begin another run: init = {str(folder)!r}, init_optimizer = true.",
                )


def _changed(kept: str, new: str) -> str | None:
    """The first field in which two recipes differ, other than those that may change."""
    old_fields, new_fields = (_flat(tomllib.loads(text)) for text in (kept, new))
    for field in sorted(old_fields.keys() | new_fields.keys()):
        before, now = old_fields.get(field), new_fields.get(field)
        if before != now and field.partition("[")[0] not in FREE and not field.startswith("mesh."):
            there, here = ("nothing" if value is None else repr(value) for value in (before, now))
            return f"{field} = {there} there, {here} here"
    return None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The values within a table by their places, say data.train[0].kind."""
    if isinstance(value, dict):
        inner = {f"{name}.{key}" if name else key: item for key, item in value.items()}
    elif isinstance(value, list):
        inner = {f"{name}[{number}]": item for number, item in enumerate(value)}
    else:
        return {name: value}
    return {place: leaf for key, item in inner.items() for place, leaf in _flat(item, key).items()}
