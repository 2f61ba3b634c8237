"""The folder of a training run as a checkpoint, during training or later: config.json, and Orbax's steps.

    runs/x                  the last complete step in checkpoints/; without one, model/ or adapter/
    runs/x/checkpoints/500  step 500

Tensors have our parameter paths and axes, with all layers of a parameter in one array, and so do AdamW's moments. The
steps of a run that trains an adapter hold the adapter alone; they are opened with the base that lora.json names.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from camelid.checkpoint.adapters import peft
from camelid.checkpoint.adapters.lora import AdaptedCheckpoint
from camelid.checkpoint.adapters.trained import RunAdapter, read_run_adapter, to_adapter
from camelid.checkpoint.checkpoint import AdamState, Checkpoint
from camelid.checkpoint.folder import complete_replacement
from camelid.checkpoint.formats import hf
from camelid.checkpoint.formats.config_source import find_config
from camelid.checkpoint.layout import Table, TensorRule, check_tensors, make_table
from camelid.checkpoint.state import saved_state
from camelid.checkpoint.tensors import Tensor
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

RECIPE, STEPS, MODEL, ADAPTER = "recipe.toml", "checkpoints", "model", "adapter"
OPTIMIZER, MASKED = "opt_state.0.", "opt_state.inner_state.0."
"""below which a step has its moments; the second, of `optax.masked`, where entire parameters are not trained"""

OpenBase = Callable[..., Checkpoint]
"""`registry.open_checkpoint`, which opens a checkpoint of any format"""


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


def open_checkpoint(path: Path, config: ModelConfig | None, open_base: OpenBase) -> Checkpoint:
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
    adapter = read_run_adapter(run)
    if step is None:
        complete_replacement(run / MODEL)
        complete_replacement(run / ADAPTER)
        if adapter is not None and not hf.matches(run / MODEL) and peft.matches(run / ADAPTER):
            base = _open_base(adapter, run, config, open_base)
            return peft.on_base(peft.open_adapter(run / ADAPTER, base.config), base, run / ADAPTER)
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
    if adapter is not None:
        return _with_base(adapter, arrays, run, step, _open_base(adapter, run, config, open_base))
    rows = table_of(config)
    masked = any(name.startswith(MASKED) for name in arrays)
    optimizer = MASKED if masked else OPTIMIZER
    params, mu, nu = (
        {name.removeprefix(below): array for name, array in arrays.items() if name.startswith(below)}
        for below in ("params.", f"{optimizer}mu.", f"{optimizer}nu.")
    )
    check_tensors(rows, params, "", described_by)
    if not (mu and nu):  # of another optimizer than AdamW
        return Checkpoint("run", run, config, params, rows)
    trained = rows
    if masked:
        trained = Table({path: entry for path, entry in rows.entries.items() if path in mu.keys() | nu.keys()})
    for moments in (mu, nu):
        check_tensors(trained, moments, "", described_by)
    return Checkpoint("run", run, config, params, rows, training=AdamState(step, mu, nu))


def _open_base(about: RunAdapter, run: Path, config: ModelConfig | None, open_base: OpenBase) -> Checkpoint:
    """The base of a run's adapter, with the model that the config.json of the run describes."""
    source = find_config(config, run)
    try:
        return open_base(about.base, config=source and source.config, ignore=about.ignore)
    except UserError as error:
        raise UserError(
            f"the base of {run} cannot be opened: {error.problem}",
            "The checkpoints of the run hold an adapter only: put the base back where lora.json names it.",
        ) from error


def _with_base(
    about: RunAdapter, arrays: Mapping[str, Tensor], run: Path, step: int, base: Checkpoint
) -> AdaptedCheckpoint:
    """A step of a run that trains an adapter."""
    factors = {
        name.removeprefix("params."): array.read(tuple(slice(0, n) for n in array.shape), array.dtype)
        for name, array in arrays.items()
        if name.startswith("params.")
    }
    adapter = to_adapter(about.plan, factors, base.config, about.base, about.dropout)
    place = run / STEPS / str(step)
    return replace(peft.on_base(adapter, base, run, "run", [place]), step=place)


def _is_step(path: Path) -> bool:
    return path.parent.name == STEPS and saved_state.is_step(path.name)
