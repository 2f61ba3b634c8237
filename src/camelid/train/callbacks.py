"""Functions of users that are called in the course of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrainEvent:
    """What a callback of `camelid.Trainer` is called with."""

    kind: Literal["log", "evaluate", "save"]
    """"log": the metrics of a step were written, every `train.log_every` steps and for skipped updates and spikes;
    "evaluate": the validation losses were computed; "save": a checkpoint is being written, in the background"""
    step: int
    """number of updates so far"""
    metrics: Mapping[str, float]
    """the row of metrics.jsonl, without its step; empty for "save\""""
    folder: Path
    """the folder of the run"""


Callback = Callable[[TrainEvent], None]
"""Called in every process of a run, in step with the others. An exception that it raises ends the run."""
