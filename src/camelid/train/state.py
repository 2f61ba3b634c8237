"""The state of training: what a step updates, and what a checkpoint of a run holds."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from camelid.model.pytree import path_name
from camelid.train.config import LossScaleConfig
from camelid.train.counters import start_counters


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step updates. The frozen base of adapters is passed separately.

    It is a pytree. The path of a leaf is the name of its array in the checkpoints of a run, so these names, which
    `SAVED_NAMES` holds, are a file format.
    """

    step: Any
    """number of updates so far, int32; in a tree of shapes or shardings, its shape or sharding"""
    trainable: Any
    """all parameters, of which the step masks those that `train.freeze` names; or adapters, and None in place of the
    base"""
    opt_state: Any
    """the state of the optax optimizer for `trainable`"""
    ema: Any = None
    """an exponential moving average of `trainable`, with the same structure, in float32; None if none is kept"""
    counters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """further scalars that later steps depend on, by name, as `start_counters` returns them"""


SAVED_NAMES = {"trainable": "params"}
"""fields of TrainState whose arrays have another name in checkpoints: `trainable.embed` is saved as `params.embed`"""

_FIELDS = tuple(field.name for field in dataclasses.fields(TrainState))
_KEYS = tuple(jax.tree_util.GetAttrKey(SAVED_NAMES.get(name, name)) for name in _FIELDS)

jax.tree_util.register_pytree_with_keys(
    TrainState,
    flatten_with_keys=lambda state: ([(key, getattr(state, f)) for key, f in zip(_KEYS, _FIELDS, strict=True)], None),
    flatten_func=lambda state: ([getattr(state, name) for name in _FIELDS], None),
    unflatten_func=lambda _, children: TrainState(*children),
)


def start_state(
    trainable: Any,
    optimizer: optax.GradientTransformation,
    averaged: bool = False,
    loss_scale: LossScaleConfig | None = None,
) -> TrainState:
    """The state before the first step; the optimizer's state is float32 whatever the dtype of the parameters.

    If `averaged`, it has a moving average of the parameters, which starts as a float32 copy of them.
    """
    masters = jax.tree.map(lambda p: p.astype(jnp.float32), trainable)
    # Copies, because the step donates the state: an array may be in it only once.
    ema = jax.tree.map(jnp.copy, masters) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(masters), ema, start_counters(loss_scale))


def is_schedule(node: Any) -> bool:
    """Whether a part of an optimizer's state counts the steps of a schedule, of the learning rate or weight decay.

    Optax does not export all of these classes; they have one field.
    """
    return getattr(node, "_fields", ()) == ("count",)


def with_new_optimizer_state(
    state: TrainState, optimizer: optax.GradientTransformation, target: TrainState
) -> TrainState:
    """`state`, which has none, with the first state of the optimizer, whose schedules are at the step of `state`.

    `target` has the shardings.
    """

    def started(trainable: Any, step: jax.Array) -> Any:
        new = start_state(trainable, optimizer).opt_state
        return jax.tree.map(
            lambda node: node._replace(count=step) if is_schedule(node) else node, new, is_leaf=is_schedule
        )

    places = jax.tree.map(lambda leaf: leaf.sharding, target.opt_state)
    opt_state = jax.jit(started, out_shardings=places)(state.trainable, state.step)
    return dataclasses.replace(state, opt_state=opt_state)


def abstract_state(trainable: Any, optimizer: optax.GradientTransformation, **options: Any) -> TrainState:
    """Shapes, dtypes and shardings of `start_state`, which has the same options; nothing is allocated.

    `trainable` holds a `jax.ShapeDtypeStruct` with a NamedSharding for each array. The optimizer's state is sharded as
    `sharded_like` describes.
    """
    state = jax.eval_shape(lambda p: start_state(p, optimizer, **options), trainable)
    state = dataclasses.replace(state, trainable=None)
    return dataclasses.replace(sharded_like(state, trainable), trainable=trainable)


def sharded_like(tree: Any, params: Any) -> Any:
    """`tree`, of shapes and dtypes, with a sharding for each leaf, found by its path and shape.

    A leaf whose path ends with the path of a parameter is sharded like it if it has its shape, as the moments of AdamW
    or Muon. If it has the parameter's shape without some of its axes, as the factored statistics of Adafactor, it is
    sharded like the axes that are left, unless their sizes leave open which these are. All other leaves, such as
    counts and placeholders, are replicated. Nothing is assumed about the optimizer: `optax.tree.map_params`
    raises an error for the state of Muon, and takes Adafactor's placeholders for parameters.
    """
    by_path = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    mesh = next(iter(by_path.values())).sharding.mesh

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        words = path_name(path).split(".")
        suffixes = (".".join(words[start:]) for start in range(len(words)))
        param = next((by_path[suffix] for suffix in suffixes if suffix in by_path), None)
        spec = PartitionSpec() if param is None else _spec_of_axes(leaf.shape, param)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map_with_path(place, tree)


def _spec_of_axes(shape: tuple[int, ...], param: jax.ShapeDtypeStruct) -> PartitionSpec:
    """How an array of this shape is sharded if its axes are some of a parameter's; replicated if that is unclear."""
    entries = (*param.sharding.spec, *[None] * len(param.shape))[: len(param.shape)]
    choices = itertools.combinations(range(len(param.shape)), len(shape))
    specs = {
        tuple(entries[axis] for axis in axes) for axes in choices if tuple(param.shape[axis] for axis in axes) == shape
    }
    return PartitionSpec(*specs.pop()) if len(specs) == 1 else PartitionSpec()
