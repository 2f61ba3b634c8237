"""The state that training starts from: a checkpoint of the run, the checkpoint `init`, or new parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from camelid.api import load_params
from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.integrity import checksum_arrays
from camelid.checkpoint.state import saved_state
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.errors import UserError
from camelid.model.adapters import LoRAPlan, declare_adapters
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import abstract, initialize
from camelid.parallel.hosts import broadcast_from_main, is_main, wait_for_all
from camelid.runs.adamw_import import import_adamw
from camelid.runs.components import Components
from camelid.runs.file_names import MILESTONES, STEPS
from camelid.runs.lora import Base, first_state, load_base, not_finite_error
from camelid.runs.recipe import Recipe
from camelid.runs.run_folder import new_aside
from camelid.train.counters import start_counters
from camelid.train.state import TrainState, abstract_state, start_state, with_new_optimizer_state


@dataclass(frozen=True)
class Start:
    """Where training starts."""

    state: TrainState
    resumed: int | None
    """the step of the run's own checkpoint that is resumed; None for a new run"""
    previous: Recipe | None
    """the recipe of the run so far; None for a new run"""
    base: Base | None
    """the frozen parameters of a run that trains an adapter"""
    aside: Path | None
    """the folder to which checkpoints of later steps were moved"""

    @property
    def frozen(self) -> Any:
        """What the step receives beside the state; None if all parameters are trained."""
        return None if self.base is None else self.base.frozen


def find_start(
    recipe: Recipe,
    previous: Recipe | None,
    from_step: int | None,
    components: Components,
    checkpoints: RunCheckpoints,
    mesh: Mesh,
) -> Start:
    """Reads or creates the state that training starts from; every process calls this.

    `previous` is the recipe of a run that has checkpoints. With `from_step`, its checkpoints of later steps are moved
    aside. Raises UserError if the step is missing or damaged, or if parameters are infinite or NaN.
    """
    folder = Path(recipe.run).resolve()
    resumed = step_to_resume(folder, recipe, previous is not None, from_step)
    target = abstract_first_state(recipe, components, mesh)
    create = partial(start_state, optimizer=components.step.optimizer, **_options(recipe))
    base = None
    if components.lora is not None:
        assert components.source is not None, "an adapter has a base"
        base = load_base(recipe, components.source, components.lora, mesh)
    if resumed is not None:
        # Checkpoints of an older camelid have no counters.
        counters = {f"counters.{name}": value for name, value in start_counters(recipe.loss_scale).items()}
        if restarts_optimizer(recipe, checkpoints, resumed):
            saved = checkpoints.restore(resumed, replace(target, opt_state=None), counters)
            state = with_new_optimizer_state(saved, components.step.optimizer, target)
        else:
            state = checkpoints.restore(resumed, target, counters)
    elif base is not None:
        state = first_state(recipe, base, create, target)
    elif components.source is not None:
        state = _from_init(recipe, components.source, create, target, mesh)
    else:
        state = _from_scratch(recipe, components.config, create, target)
    if resumed is None and components.source is not None and (not_finite := checksum_arrays(state)[1]):
        raise not_finite_error(recipe, not_finite)
    aside = None if from_step is None else _move_later_aside(folder, from_step)
    return Start(state, resumed, previous, base, aside)


def abstract_first_state(recipe: Recipe, components: Components, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state that a run starts from; nothing is read or allocated."""
    optimizer, compute = components.step.optimizer, recipe.compute
    return abstract_start(components.config, optimizer, compute, mesh, components.lora, **_options(recipe))


def _options(recipe: Recipe) -> dict[str, Any]:
    """Those of `start_state`."""
    return {"averaged": recipe.ema is not None, "loss_scale": recipe.loss_scale}


def abstract_start(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    compute: ComputeConfig,
    mesh: Mesh,
    lora: LoRAPlan | None = None,
    **options: Any,
) -> TrainState:
    """Shapes, dtypes and shardings of `start_state` for a run that trains all parameters, or adapters of them."""
    trained = declare_decoder(config) if lora is None else declare_adapters(lora, config)
    return abstract_state(abstract(trained, compute.param_dtype, mesh, compute.replicate), optimizer, **options)


def _from_init(
    recipe: Recipe, source: Checkpoint, create: Callable[[Any], TrainState], target: TrainState, mesh: Mesh
) -> TrainState:
    if recipe.init_optimizer:
        return import_adamw(source, target, recipe.compute, mesh, recipe.loss_scale)
    return jax.jit(create, out_shardings=shardings(target))(load_params(source, recipe.compute, mesh))


def _from_scratch(
    recipe: Recipe, config: ModelConfig, create: Callable[[Any], TrainState], target: TrainState
) -> TrainState:
    """New parameters; each array is created on the devices that hold it."""

    def initialized(key: jax.Array) -> TrainState:
        return create(initialize(declare_decoder(config), config, key, jnp.dtype(recipe.compute.param_dtype)))

    return jax.jit(initialized, out_shardings=shardings(target))(jax.random.key(recipe.train.seed))


def shardings(tree: Any) -> Any:
    """The sharding of each leaf of a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def step_to_resume(folder: Path, recipe: Recipe, started: bool, from_step: int | None) -> int | None:
    """The step of the checkpoint to resume from; None for a new run. Every process calls this.

    Raises UserError if there are checkpoints now and there were none before, or the reverse; `started` is what was
    found before.
    """
    return broadcast_from_main(lambda: _step_to_resume(folder, recipe, started, from_step))


def _step_to_resume(folder: Path, recipe: Recipe, started: bool, from_step: int | None) -> int | None:
    steps = saved_state.steps_in(folder / STEPS)
    if bool(steps) != started:
        changed = "were removed" if started else "were created"
        raise UserError(
            f"the checkpoints in {folder / STEPS} {changed} while this process started",
            "Run the same command again when nothing else changes them.",
        )
    if from_step is not None and from_step not in steps:
        have = f"It has checkpoints of steps {', '.join(map(str, steps))}." if steps else "It has no checkpoints yet."
        raise UserError(f"{folder} has no checkpoint of step {from_step}", have)
    if not steps:
        return None
    step = steps[-1] if from_step is None else from_step
    if step > recipe.train.steps:
        raise UserError(
            f"the run has already made {step} steps, and the recipe sets train.steps = {recipe.train.steps}",
            f"Set train.steps to {step} or more.",
        )
    return step


def restarts_optimizer(recipe: Recipe, checkpoints: RunCheckpoints, step: int) -> bool:
    """Whether the checkpoint of a step lacks the state of the optimizer; every process calls this.

    Raises UserError if it does, and the recipe does not say that the optimizer restarts.
    """
    if checkpoints.holds(step, "opt_state"):
        return False
    if not recipe.checkpoint.restart_optimizer:
        folder = Path(recipe.run).resolve()
        raise UserError(
            f"the checkpoint of step {step} in {folder / STEPS} has no state of the optimizer "
            "(checkpoint.optimizer = false), so the run cannot be resumed exactly",
            "Set checkpoint.restart_optimizer = true to go on with new moments, at this step and its learning rate; or "
            f"start another run with init = {str(folder / STEPS / str(step))!r}.",
        )
    return True


def _move_later_aside(folder: Path, step: int) -> Path | None:
    """Moves the checkpoints and milestones of later steps to a new folder, and returns it; every process calls this."""
    found, aside = [], None
    if is_main():
        names = (MILESTONES, STEPS)
        found = [(name, other) for name in names for other in saved_state.steps_in(folder / name) if other > step]
        aside = new_aside(folder) if found else None
    for name, other in reversed(found):  # the latest checkpoint first
        assert aside is not None
        place = aside if name == STEPS else aside / name
        place.mkdir(exist_ok=True)
        (folder / name / str(other)).rename(place / str(other))
    wait_for_all("later checkpoints are moved aside")
    return aside
