"""The checkpoint with the lowest validation loss, which is kept beside the newest ones."""

import json
import math
from pathlib import Path
from typing import Any

from camelid import interrupts
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.checkpoint.state.saved_state import steps_in
from camelid.disk.atomic import write_atomically
from camelid.parallel.hosts import broadcast_from_main, is_main
from camelid.runs.file_names import BEST, METRICS, STEPS
from camelid.train.loggers import read_metrics


class BestCheckpoint:
    """Saves and keeps the step with the lowest validation loss; best.json in the folder of the run names it.

    Every process calls all methods. The best step so far is found in metrics.jsonl and among the checkpoints, so that
    it is right after a resume from any step.
    """

    def __init__(self, folder: Path, checkpoints: RunCheckpoints):
        self._file, self._checkpoints = folder / BEST, checkpoints
        self._loss, step = broadcast_from_main(lambda: _lowest(folder))
        self._keep(step)

    def offer(self, step: int, loss: float, state: Any) -> None:
        """Saves the state after a step if its validation loss is the lowest and its checkpoint is not saved already."""
        if loss < self._loss:
            self._checkpoints.save(step, state)
            interrupts.set_advice(interrupts.RESUME)
            self._loss = loss
            self._keep(step)

    def _keep(self, step: int | None) -> None:
        self._checkpoints.best = step
        if not is_main():
            return
        if step is None:
            self._file.unlink(missing_ok=True)
        else:
            write_atomically(self._file, json.dumps({"step": step, "validation_loss": self._loss}) + "\n")


def _lowest(folder: Path) -> tuple[float, int | None]:
    """The lowest validation loss of the steps that have a checkpoint, and the first step with this loss."""
    saved = steps_in(folder / STEPS)
    losses = ((row["step"], row.get("validation_loss")) for row in read_metrics(folder / METRICS))
    found = [(loss, step) for step, loss in losses if loss is not None and step in saved]
    return min(found, default=(math.inf, None))
