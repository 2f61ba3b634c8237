"""The program of a training step, before it is compiled."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.stages import Traced

from camelid.data.rows.batch import Batch
from camelid.parallel.rules import COMPUTE, partition
from camelid.runs.recipe import Recipe
from camelid.runs.start import shardings
from camelid.train.state import TrainState
from camelid.train.step import TrainStep


def trace_step(step: TrainStep, state: TrainState, frozen: Any, batch: Mapping[str, Any]) -> Traced:
    """The program of `step(state, batch, frozen)`, which reuses the memory of the state that it is given.

    All three may hold shapes, dtypes and shardings in place of arrays: the program is the same, and nothing is
    allocated.
    """
    # The state keeps its shardings, whatever the compiler would choose for the updates of an optimizer.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), None))
    return jitted.trace(state, batch, frozen)


def abstract_batch(recipe: Recipe, mesh: Mesh, kind: type[Batch] = Batch) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the arrays of a batch."""
    shape = (recipe.data.batch_size, recipe.data.sequence_length)
    sharding = NamedSharding(mesh, partition(("batch", "seq"), COMPUTE))
    floats = ("weights", "reference")
    dtypes = {field.name: jnp.float32 if field.name in floats else jnp.int32 for field in fields(kind)}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
