"""Services that follow a run: each is an extra, imported where a recipe asks for it."""

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camelid.disk.atomic import write_atomically
from camelid.errors import UserError
from camelid.extras import install_hint

WANDB_ID = "wandb_id.txt"  # in the folder of a run

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_installed(name: str) -> None:
    """Raises UserError where the extra of a tracker is not installed."""
    try:
        importlib.import_module(MODULES[name])
    except ImportError as error:
        raise UserError(f"train.trackers asks for {name}: {error}", install_hint(name)) from error


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
    """A run of that service, resumed by the id that its folder keeps; WANDB_MODE and its like are honored."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(
            project="camelid",
            id=_run_id(folder),
            name=folder.name,
            dir=str(folder),
            config=dict(recipe),
            resume="allow",
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path) -> str:
    """The id of a run in Weights & Biases, drawn once and kept in the run's folder.

    Ids are shared by a whole project, so the name of the folder would be the id of everybody with the same recipe.
    """
    kept = folder / WANDB_ID
    if not kept.is_file():
        # Runs of earlier versions, which have files of the service but no id, were known by the names of their folders.
        drawn = folder.name if (folder / "wandb").is_dir() else secrets.token_hex(8)
        write_atomically(kept, drawn + "\n")
    return kept.read_text("utf-8").strip()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}
