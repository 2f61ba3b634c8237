"""Services that follow a run: each is an extra, imported where a recipe asks for it."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camelid.errors import UserError

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_installed(name: str) -> None:
    """Raises UserError where the extra of a tracker is not installed."""
    try:
        importlib.import_module(MODULES[name])
    except ImportError as error:
        raise UserError(f"train.trackers asks for {name}: {error}", f"pip install 'camelid[{name}]'") from error


def make_tracker(name: str, folder: Path, recipe: Mapping[str, Any]) -> "TensorBoard | WeightsAndBiases":
    """The tracker of that name."""
    return {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}[name](folder, recipe)


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of that service, resumed under the name of its folder; its own variables (WANDB_MODE, …) are honoured."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(
            project="camelid", id=folder.name, name=folder.name, dir=str(folder), config=dict(recipe), resume="allow"
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}
