"""The folder of a training run as a checkpoint, during training or later: config.json, and Orbax's steps.

    runs/x                  the last complete step in checkpoints/; without one, model/
    runs/x/checkpoints/500  step 500

Tensors have our parameter paths and axes, with all layers of a parameter in one array, and so do AdamW's moments.
"""

from pathlib import Path

from camelid.checkpoint.checkpoint import AdamState, Checkpoint
from camelid.checkpoint.folder import complete_replacement
from camelid.checkpoint.formats import hf
from camelid.checkpoint.formats.config_source import find_config
from camelid.checkpoint.layout import Table, TensorRule, check_tensors, make_table
from camelid.checkpoint.state import saved_state
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

RECIPE, STEPS, MODEL = "recipe.toml", "checkpoints", "model"


def table_of(config: ModelConfig) -> Table:
    """The table in which every tensor is a parameter, under the parameter's path."""
    specs = named(declare_decoder(config))
    return make_table(
        [TensorRule(path, path, " ".join(spec.axes)) for path, spec in specs.items()], specs, config.axis_sizes
    )


def matches(path: Path) -> bool:
    """Whether a folder is that of a run, or of one of its steps."""
    path = path.absolute()
    return (path / RECIPE).is_file() or (_is_step(path) and (path.parent.parent / RECIPE).is_file())


def open_checkpoint(path: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens a run at its last complete step, or a given step; `config` takes precedence over its config.json."""
    run = path.absolute()
    step = int(run.name) if _is_step(run) else None
    if step is not None:
        run = run.parent.parent
    if not (run / RECIPE).is_file():
        raise UserError(f"{path} is not the folder of a run", "Give the folder that holds recipe.toml.")
    steps = run / STEPS
    if step is None:
        step = saved_state.newest(steps)
    if step is None:
        complete_replacement(run / MODEL)
        if not hf.matches(run / MODEL):
            raise UserError(
                f"{run} has no complete checkpoint yet", "Its recipe sets after how many steps one is written."
            )
        return hf.open_checkpoint(run / MODEL, config)
    source = find_config(config, run)
    if source is None:
        raise UserError(
            f"{run} has no config.json, so it was started by an older version of camelid",
            "Start the same command again, which writes it, or open its model/.",
        )
    config, described_by = source
    arrays = saved_state.open_step(steps, step)
    rows = table_of(config)
    params, mu, nu = (
        {name.removeprefix(below): array for name, array in arrays.items() if name.startswith(below)}
        for below in ("params.", "opt_state.0.mu.", "opt_state.0.nu.")
    )
    check_tensors(rows, params, "", described_by)
    if not (mu and nu):  # of another optimizer than AdamW
        return Checkpoint("run", run, config, params, rows)
    for moments in (mu, nu):
        check_tensors(rows, moments, "", described_by)
    return Checkpoint("run", run, config, params, rows, training=AdamState(step, mu, nu))


def _is_step(path: Path) -> bool:
    return path.parent.name == STEPS and saved_state.is_step(path.name)
