"""Training state from the step and AdamW's moments of a checkpoint: a train state of EasyLM, or the folder of a run."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from camelid.api import load_params
from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.state import saved_state
from camelid.checkpoint.tensors import Tensor
from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.model.params import named
from camelid.train.config import LossScaleConfig
from camelid.train.counters import start_counters
from camelid.train.state import TrainState


def import_adamw(
    source: Checkpoint,
    target: TrainState,
    compute: ComputeConfig,
    mesh: Mesh,
    loss_scale: LossScaleConfig | None = None,
) -> TrainState:
    """The state with the parameters, the step and the moments of `source`, whose `training` must not be None.

    `target` holds shapes, dtypes and shardings. Its optimizer is optax.adamw, possibly with transformations whose state
    consists of counts, which are set to the step. The part of each device is read for that device. Counters and the
    moving average of the parameters, if `target` has one, are as before the first step.

    Of a parameter that `target` does not train, no moments are read. Raises UserError if `source` has none of a
    parameter that it trains.
    """
    assert source.training is not None
    step, mu, nu = source.training.step, source.training.mu, source.training.nu

    def moments(tensors: Mapping[str, Tensor], like: Any) -> Any:
        targets = named(like)
        for path in targets:
            entry = source.table.entries[path]
            if entry.name(entry.layers()[0]) not in tensors:
                raise UserError(
                    f"init_optimizer = true: init has no moments of {path}, which it did not train",
                    "Add it to train.freeze, or leave out init_optimizer.",
                )
        arrays = saved_state.load(source.table, tensors, targets)
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in targets])

    def imported(part: Any) -> Any:
        if isinstance(part, optax.ScaleByAdamState):
            return optax.ScaleByAdamState(imported(part.count), moments(mu, part.mu), moments(nu, part.nu))
        assert part.shape == (), "apart from its moments, the state of AdamW holds counts of the same steps"
        return jax.device_put(np.asarray(step, part.dtype), part.sharding)

    opt_state = jax.tree.map(imported, target.opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState))
    params = load_params(source, compute, mesh)
    ema = None if target.ema is None else jax.tree.map(lambda p: jnp.copy(p.astype(jnp.float32)), params)
    counters = {
        name: jax.device_put(np.asarray(value), target.counters[name].sharding)
        for name, value in start_counters(loss_scale).items()
    }
    return TrainState(imported(target.step), params, opt_state, ema, counters)
