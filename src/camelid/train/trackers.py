"""Services that track experiments. Each is an optional dependency, imported only if a recipe names it."""

import importlib
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from camelid.disk.atomic import write_atomically
from camelid.errors import UserError
from camelid.extras import install_hint

WANDB_ID = "wandb_id.txt"  # in the folder of a run

MLFLOW_ID = "mlflow_id.txt"

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}

GROUPS = {
    "gradient_norm": "train/grad_norm",
    "tokens_per_second": "perf/tokens_per_second",
    "mfu": "perf/mfu",
    "step_s": "perf/step_s",
    "data_s": "perf/data_s",
    "eta_s": "perf/eta_s",
}
"""Names of metrics in the services; others begin with `train/`, and those of the validation data with `eval/`."""


def check_installed(name: str) -> None:
    """Raises UserError if the optional dependency of a tracker is not installed."""
    try:
        importlib.import_module(MODULES[name])
    except ImportError as error:
        raise UserError(f"train.trackers requests {name}: {error}", install_hint(name)) from error


class Tracker(Protocol):
    """A service that receives the metrics of a run, and the samples that it generates."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None: ...
    def close(self) -> None: ...


def make_tracker(name: str, folder: Path, recipe: Mapping[str, Any]) -> Tracker:
    """The tracker with this name, for the run in `folder`."""
    return {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}[name](folder, recipe)


class TensorBoard:
    """Writes event files to the folder of the run, for `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        for number, sample in enumerate(samples):
            # TensorBoard shows Markdown, in which indented lines are shown as they are.
            text = f"{sample['prompt']}\n---\n{sample['completion']}"
            self._writer.add_text(f"samples/{number}", "".join(f"    {line}\n" for line in text.split("\n")), step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases. The folder of the run keeps its id, with which it is resumed; WANDB_MODE and similar
    environment variables apply."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "camelid"),
            id=_run_id(folder),
            name=folder.name,
            dir=str(folder),
            config=dict(recipe),
            resume="allow",
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        columns = ["step", "prompt", "completion"]
        table = wandb.Table(columns=columns, data=[[sample[name] for name in columns] for sample in samples])
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Logs to MLflow; MLFLOW_TRACKING_URI and similar environment variables apply. The folder of the run keeps its id,
    with which it is resumed."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        import mlflow

        self._mlflow, kept = mlflow, folder / MLFLOW_ID
        if kept.is_file():
            mlflow.start_run(run_id=kept.read_text("utf-8").strip())
            return
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment("camelid")
        started = mlflow.start_run(run_name=folder.name)
        mlflow.log_params(_flat(recipe))  # once: MLflow refuses other values later
        write_atomically(kept, started.info.run_id + "\n")

    def write(self, row: Mapping[str, Any]) -> None:
        self._mlflow.log_metrics(_numbers(row), step=row["step"])

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        text = "\n\n".join(f"{sample['prompt']}\n---\n{sample['completion']}" for sample in samples)
        self._mlflow.log_text(text + "\n", f"samples/step_{step}.txt")

    def close(self) -> None:
        self._mlflow.end_run()


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The values of nested tables by dotted name, as texts of at most 500 characters, which MLflow accepts."""
    flat: dict[str, str] = {}
    for name, value in table.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: str(value)[:500]}
    return flat


def _run_id(folder: Path) -> str:
    """The id of a run in Weights & Biases, which is generated once and kept in the folder of the run.

    Ids are unique within a project, so the name of the folder would collide between users of the same recipe.
    """
    kept = folder / WANDB_ID
    if not kept.is_file():
        # Runs of earlier versions have files of the service but no id file: their id was the name of the folder.
        drawn = folder.name if (folder / "wandb").is_dir() else secrets.token_hex(8)
        write_atomically(kept, drawn + "\n")
    return kept.read_text("utf-8").strip()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The values of a row by the names that services show in groups."""
    return {_grouped(name): value for name, value in row.items() if name != "step" and value is not None}


def _grouped(name: str) -> str:
    if name.startswith("validation_"):
        return f"eval/{name.removeprefix('validation_')}"
    return GROUPS.get(name, f"train/{name}")
