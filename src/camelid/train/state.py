"""What training changes: the step, the parameters and the optimizer's moments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from camelid.model.config import Compute
from camelid.model.decoder import Decoder
from camelid.model.params import abstract


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: Any  # an array, or what stands for one in a tree of shapes or shardings
    """updates made so far"""
    params: Decoder
    opt_state: Any


def start_state(params: Decoder, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; moments are float32."""
    masters = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(masters))


def abstract_state(specs: Decoder, optimizer: optax.GradientTransformation, compute: Compute, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the whole state, nothing allocated; moments live where their parameters do."""
    params = abstract(specs, compute.param_dtype, mesh, compute.replicate)
    state = jax.eval_shape(lambda p: start_state(p, optimizer), params)
    whole = NamedSharding(mesh, PartitionSpec())

    def place(x: jax.ShapeDtypeStruct, like: jax.ShapeDtypeStruct | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole if like is None else like.sharding)

    opt_state = optax.tree.map_params(optimizer, place, state.opt_state, params, transform_non_params=place)
    return dataclasses.replace(state, step=place(state.step), params=params, opt_state=opt_state)
