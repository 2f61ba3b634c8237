"""The runs below a folder and their progress, read from their files without JAX."""

import json
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from camelid.disk.locks import is_locked
from camelid.runs.file_names import FINISHED, METRICS, RECIPE, STEPS

State = Literal["running", "finished", "stopped", "no checkpoint"]


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run."""

    folder: Path
    state: State
    """`running`: a process of this machine trains it; `finished`: the model of its last step was saved; `stopped`: its
    command resumes it from a checkpoint; `no checkpoint`: it ended before the first one"""
    step: int
    """the last step in metrics.jsonl, or of the newest checkpoint"""
    steps: int | None
    """train.steps; None if recipe.toml cannot be read"""
    loss: float | None
    """the last one that was written"""
    validation_loss: float | None
    changed: float
    """time of the last line of metrics.jsonl, or that of the recipe, in seconds since 1970"""


def find_runs(root: Path) -> Iterator[Path]:
    """The folders of runs at or below `root`, by path; folders in that of a run and hidden ones are left out."""
    for place, folders, files in os.walk(root):
        folders[:] = [] if RECIPE in files else sorted(name for name in folders if not name.startswith("."))
        if RECIPE in files:
            yield Path(place)


def read_status(folder: Path) -> RunStatus:
    """The progress of the run in a folder."""
    places = (folder / STEPS).iterdir() if (folder / STEPS).is_dir() else ()
    saved = max((int(place.name) for place in places if place.name.isascii() and place.name.isdigit()), default=0)
    last, loss, validation_loss = _last_metrics(folder / METRICS)
    if is_locked(folder):
        state: State = "running"
    elif (folder / FINISHED).is_file():
        state = "finished"
    else:
        state = "stopped" if saved else "no checkpoint"
    written = next(file for file in (folder / METRICS, folder / RECIPE) if file.exists())
    return RunStatus(folder, state, max(last, saved), _steps(folder), loss, validation_loss, written.stat().st_mtime)


def _last_metrics(path: Path) -> tuple[int, float | None, float | None]:
    """The last step, its loss, and the last validation loss."""
    last, found = 0, {}
    for line in reversed(path.read_bytes().splitlines() if path.is_file() else []):
        if len(found) == 2:
            break
        # Parsing every line of a long run would take seconds.
        name = "validation_loss" if b'"validation_loss"' in line else "loss"
        if name in found:
            continue
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:  # a line that is being written, or that a kill cut short
            continue
        last = max(last, row["step"])
        found[name] = row.get(name)
    return last, found.get("loss"), found.get("validation_loss")


def _steps(folder: Path) -> int | None:
    try:
        return tomllib.loads((folder / RECIPE).read_text("utf-8"))["train"]["steps"]
    except (ValueError, KeyError, TypeError):
        return None
