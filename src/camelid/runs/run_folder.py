"""The folder of a run: one process at a time trains in it, with the recipe and the text that the run started with."""

import contextlib
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from camelid.checkpoint.adapters.peft_config import NAME as CONFIG
from camelid.checkpoint.adapters.trained import NAME as LORA
from camelid.checkpoint.state.saved_state import steps_in
from camelid.disk.atomic import write_atomically
from camelid.disk.locks import LOCK, locked, no_empty_folders
from camelid.errors import UserError
from camelid.parallel.hosts import broadcast_from_main, is_main, wait_for_all
from camelid.runs.file_names import (
    ADAPTER,
    ADAPTER_EMA,
    DATA,
    FILES,
    FINISHED,
    INPUTS,
    METRICS,
    MODEL,
    MODEL_EMA,
    RECIPE,
    SAMPLES,
    STEPS,
)
from camelid.runs.recipe import Recipe, completed, structure, write_recipe
from camelid.runs.recipe_differences import recipe_differences
from camelid.runs.renamed import with_new_names
from camelid.train.config import CheckpointConfig, SamplesConfig

FREE = {
    f"train.{name}"
    for name in (
        "steps",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "checkpoint_minutes",
        "milestones_every",
        "keep_best",
        "evaluate_every",
        "trackers",
        "metrics",
        "max_skipped",
        "spike_sigma",
    )
} | {
    "run",
    "lora.merge",
    "profile",
    "samples",
    *(f"samples.{field.name}" for field in fields(SamplesConfig)),
    *(f"checkpoint.{field.name}" for field in fields(CheckpointConfig)),
    "data.workers",
    "data.prepare_workers",
    "data.cache",
    "optimizer.decay_steps",
    "profile.first_step",
    "profile.steps",
}
"""Recipe fields that may change when a run is resumed, apart from the mesh; `run`, because a folder may be moved."""


def has_started(folder: Path) -> bool:
    """Whether a run has checkpoints to resume from."""
    return bool(steps_in(folder / STEPS))


def is_finished(folder: Path, step: int, written: Sequence[str]) -> bool:
    """Whether the folders `written` in that of a run exist and are those after `step`; every process calls this."""
    return is_written(folder, written) and broadcast_from_main(lambda: _step(folder) == step)


def is_written(place: Path, names: Sequence[str]) -> bool:
    """Whether `place` has the models and adapters of these names; every process calls this."""

    def exists(name: str) -> bool:
        return (place / name / (CONFIG if name in (ADAPTER, ADAPTER_EMA) else "config.json")).is_file()

    return broadcast_from_main(lambda: all(map(exists, names)))


def _step(folder: Path) -> int | None:
    """The step of the model in the folder of a run, if it is finished."""
    return json.loads(file.read_text("utf-8"))["step"] if (file := folder / FINISHED).is_file() else None


def mark_finished(folder: Path, step: int) -> None:
    """Records that the model in the folder of a run is that after `step`."""
    if is_main():
        write_atomically(folder / FINISHED, f"{json.dumps({'step': step})}\n".encode())


def mark_unfinished(folder: Path) -> None:
    """Records that the run continues; its model, if there is one, is that of an earlier step."""
    if is_main():
        (folder / FINISHED).unlink(missing_ok=True)


def kept_recipe(folder: Path) -> Recipe | None:
    """The recipe of a run that has checkpoints, and None for any other; every process calls this."""
    text = broadcast_from_main(lambda: _kept_text(folder))
    return None if text is None else _structured(text)


def _structured(kept: str) -> Recipe:
    """A recipe that a run has kept, perhaps one that an older camelid started."""
    return structure(with_new_names(tomllib.loads(kept)))


def _kept_text(folder: Path) -> str | None:
    kept = folder / RECIPE
    return kept.read_text("utf-8") if kept.is_file() and has_started(folder) else None


def check_is_own(folder: Path) -> None:
    """Raises UserError if the folder exists and is neither that of a run nor empty."""
    if not _is_utf8(str(folder)):
        raise UserError(f"{str(folder)!a} is not UTF-8, as the names in recipe.toml are", "Choose another --run.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "Choose another folder with --run.")
    files = [] if (folder / RECIPE).is_file() or not folder.exists() else folder.iterdir()
    if any(not file.name.startswith(".") and file.name != INPUTS for file in files):
        raise UserError(f"{folder} has files and is not the folder of a run", "Choose another folder with --run.")


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Raises UserError if the folder is not that of a run, or of a run that was started with another recipe.

    `recipe` is one that `completed` returned.
    """
    check_is_own(folder)
    if not (folder / RECIPE).is_file():
        return
    if (text := _kept_text(folder)) is None:
        for name in (MODEL, ADAPTER, MODEL_EMA, ADAPTER_EMA):
            if (folder / name).exists():
                raise UserError(
                    f"{folder} has the {name} of a run without checkpoints: training would start again at step 0 and "
                    "replace it",
                    f"Choose another --run, or move the {name} away if it is not needed.",
                )
        return
    before = _structured(text)
    if before.lora is not None and recipe.lora is not None:
        before = replace(before, init=recipe.init)  # a base may be moved: its checksums are compared
    differences = recipe_differences(write_recipe(completed(before, None)), write_recipe(recipe))
    if changed := [text for name, text in differences.items() if name not in FREE and not name.startswith("mesh.")]:
        raise UserError(
            f"{folder} has a run with another recipe: {'; '.join(changed)}",
            "Choose another --run, or use the recipe in the folder.",
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


Data = Mapping[str, Sequence[Mapping[str, Any]]]
"""For each split, of each store that it is read from: its `folder`, its `fingerprint`, the hashes of its `sources`, and
the `row_order` of its rows (see Mixture.row_orders). Under FILES: path, size and time of each text file."""


@contextlib.contextmanager
def claimed(folder: Path, recipe: Recipe, data: Data) -> Iterator[None]:
    """Locks the folder of a run for the block. If `record` is not called in the block, nothing is left in the folder.

    Raises UserError if another process has locked it, or if the run was started with another recipe or other data.
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
            raise UserError(
                f"another process is training in {folder}", "Wait for it, or choose another --run."
            ) from error
        stack.callback(_remove_lock_alone, folder)
        check_folder(folder, recipe)
        check_data(folder, data)
        wait_for_all("run folder")
        yield


def check_data(folder: Path, data: Data) -> None:
    """Raises UserError if a run has been trained on other data than `data`, or on its rows in another order."""
    if has_started(folder):
        kept = kept_data(folder) or {}
        _check_tokens(folder, kept, data)
        _check_row_orders(folder, kept, data)


def kept_data(folder: Path) -> Data | None:
    """The data that a run is trained on; None if the run was started by an older camelid, which did not write it."""
    return json.loads((folder / DATA).read_text("utf-8")) if (folder / DATA).is_file() else None


def new_aside(folder: Path) -> Path:
    """Creates the folder set_aside_1, or the next free number, in that of a run.

    It has copies of metrics.jsonl and samples.jsonl.
    """
    number = 1
    while (aside := folder / f"set_aside_{number}").exists():
        number += 1
    aside.mkdir()
    for file in (folder / METRICS, folder / SAMPLES):
        if file.exists():
            shutil.copyfile(file, aside / file.name)
    return aside


def record(folder: Path, recipe: Recipe, files: Mapping[str, bytes], data: Data) -> None:
    """Writes the recipe, the data and `files` into the folder of a run, when all checks have passed.

    Of a run that has started, existing files are not replaced: they are the same, or the user has changed them.
    """
    if not is_main():
        return
    kept = {name for name in files if has_started(folder) and (folder / name).exists()} - {LORA}
    # The recipe first: it distinguishes the folder of a run from others.
    about = {RECIPE: write_recipe(recipe).encode(), DATA: (json.dumps(data, indent=1) + "\n").encode()}
    for name, content in {**about, **files}.items():
        if name not in kept:
            write_atomically(folder / name, content)
    if LORA not in files:  # of an earlier start with another recipe, before its first checkpoint
        (folder / LORA).unlink(missing_ok=True)


def _remove_lock_alone(folder: Path) -> None:
    """Removes the lock if there is nothing else in the folder."""
    if [file.name for file in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()


def _check_tokens(folder: Path, before: Data, now: Data) -> None:
    """Raises UserError if the prepared text has changed, so that the batches of all steps would be different."""
    for split, stores in before.items():
        if split == FILES:
            continue  # only the tokens matter
        for was, store in zip(stores, now.get(split, []), strict=False):
            if was["fingerprint"] != store["fingerprint"]:
                names = sorted({path for path, _ in was["sources"].items() ^ store["sources"].items()})
                raise UserError(
                    f"{names[0] if names else f'the tokens of the {split} text'} changed since {folder} was started",
                    f"Restore it, or start another run: init = {str(folder)!r}, init_optimizer = true.",
                )


def _check_row_orders(folder: Path, before: Data, now: Data) -> None:
    """Raises UserError if the rows of the same text would be read in another order than when the run was started."""
    recorded = [store.get("row_order") for store in before.get("train", [])]
    for number, store in enumerate(now["train"]):
        # Runs that an earlier release of camelid started recorded no order.
        if (order := store["row_order"]) not in recorded[number : number + 1] and order is not None:
            raise UserError(
                f"the run in {folder} was started by an earlier release of camelid, which read the rows of large "
                f"sources ({store['folder']}) in another order: the remaining batches would not be those of the run",
                "Finish it with the release that started it, or start another run from its checkpoint: "
                f"init = {str(folder)!r}, init_optimizer = true.",
            )
