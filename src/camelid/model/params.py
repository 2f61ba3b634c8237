"""Declarations of parameters.

A parameter is declared by one line that names its axes, inputs to the left of the arrow and outputs to the right:

    q_proj: Weight = param("embed -> heads head_dim")

Its shape, sharding, initialization, weight decay, adapters and checkpoint layout follow from that line. It is stored
outputs first, (heads, head_dim, embed), as in most checkpoint files, so that most tensors are read without a transpose.

Whatever a declared parameter holds, an array or another type of weight (model/weights.py), it is one entry of `named`.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from camelid.model.config import ModelConfig
from camelid.model.pytree import from_fields, path_name, register_pytree
from camelid.model.weights import NF4, Adapted, Quantized
from camelid.parallel.rules import num_shards, placement


@dataclasses.dataclass(frozen=True)
class Spec:
    """A declared parameter of a model: its named axes with their sizes, and its initialization."""

    stacked: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    init: str

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names in the order in which the array is stored."""
        return self.stacked + self.outputs + self.inputs

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix. Weight decay and adapters are for matrices, not for norms and biases."""
        return bool(self.inputs)


def param(axes: str, *, init: str = "normal", when: Callable[[ModelConfig], bool] = lambda config: True) -> Any:
    """Declares a parameter: "inputs -> outputs" for a matrix, plain axes otherwise; None if `when` is false."""
    return dataclasses.field(metadata={"axes": axes, "init": init, "when": when})


def child(cls: type, *, stack: str | None = None, when: Callable[[ModelConfig], bool] = lambda config: True) -> Any:
    """Declares a child module, None if `when` is false; `stack` is an axis in front of each of its arrays."""
    return dataclasses.field(metadata={"child": cls, "stack": stack, "when": when})


@dataclass_transform(field_specifiers=(param, child), frozen_default=True)
def module(cls: type) -> type:
    """Makes `cls` a frozen dataclass whose fields are parameters or child modules, and a JAX pytree."""
    cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
    cls.__repr__ = _repr  # pyright: ignore[reportAttributeAccessIssue]
    return register_pytree(cls)


def _repr(tree: Any) -> str:
    """One line instead of every element of every array."""
    leaves = jax.tree.leaves(tree)
    return f"{type(tree).__name__}({len(leaves)} arrays, {sum(getattr(x, 'size', 0) for x in leaves):,} elements)"


def declare(cls: type, config: ModelConfig, stacked: tuple[str, ...] = ()) -> Any:
    """The tree of `cls` for `config`, with a Spec in place of each parameter."""
    return from_fields(cls, {field.name: _declare(field, config, stacked) for field in dataclasses.fields(cls)})


def _declare(field: dataclasses.Field, config: ModelConfig, stacked: tuple[str, ...]) -> Any:
    meta = field.metadata
    if not meta["when"](config):
        return None
    if "child" in meta:
        return declare(meta["child"], config, stacked + ((meta["stack"],) if meta["stack"] else ()))
    inputs, _, outputs = (tuple(side.split()) for side in meta["axes"].rpartition("->"))
    shape = tuple(config.axis_sizes[axis] for axis in stacked + outputs + inputs)
    return Spec(stacked, outputs, inputs, shape, meta["init"])


def is_entry(x: Any) -> bool:
    """Whether `x` represents a declared parameter without being an array: a Spec, or a weight of another type."""
    return isinstance(x, Spec | Adapted | Quantized | NF4)


def map_specs(f: Callable, specs: Any, *rest: Any) -> Any:
    """`jax.tree.map` over the declared parameters: `f` receives a Spec, and from each other tree what is there."""
    return jax.tree.map(f, specs, *rest, is_leaf=is_entry)


def named(tree: Any) -> dict[str, Any]:
    """The declared parameters of a tree by dotted path, for example `layers.attn.q_proj`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_entry)
    return {path_name(path): leaf for path, leaf in flat}


def build(specs: Any, leaves: Iterable[Any]) -> Any:
    """The tree with the structure of `specs` and these leaves, in the order of `named`."""
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_entry), list(leaves))


def abstract(specs: Any, dtype: Any, mesh: Mesh, replicate: tuple[str, ...] = ()) -> Any:
    """Shapes, dtypes and shardings of the array that each Spec of a tree describes; nothing is allocated."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=placement(spec.axes, mesh, replicate)), specs
    )


def shardings(specs: Any, params: Any, mesh: Mesh, replicate: tuple[str, ...] = ()) -> Any:
    """The sharding of every array of `params`, whatever the types of its weights, as a tree of the same structure.

    An adapter's factors are sharded like the inputs and outputs of its weight, with the rank unsharded. The scales of a
    quantized weight are sharded like its outputs, and their groups like the first axis of the inputs if they divide.
    The last axis of NF4 codes, which holds two elements per byte, is sharded if that number of bytes divides.

    Args:
      specs: The declared parameters; see `decoder.specs_of`.
      params: Arrays, or their shapes.
      mesh: The mesh.
      replicate: Axis names that are not sharded.
    """

    def place(*axes: str) -> NamedSharding:
        return placement(axes, mesh, replicate)

    def divided(axis: str, length: int, otherwise: str) -> str:
        """`axis` if `length` divides over the devices that it is sharded over, and `otherwise`, which has no rule."""
        return axis if length % num_shards(axis, mesh, replicate) == 0 else otherwise

    def one(spec: Spec, leaf: Any) -> Any:
        match leaf:
            case None:
                return None
            case Quantized(scale=scale):
                groups = divided(spec.inputs[0], scale.shape[-1], "groups")
                scale = place(*spec.stacked, *spec.outputs, groups)
                return from_fields(Quantized, {"codes": place(*spec.axes), "scale": scale})
            case NF4(codes=codes, absmax=absmax):
                fields = {
                    "codes": place(*spec.axes[:-1], divided(spec.inputs[-1], codes.shape[-1], "bytes")),
                    "absmax": place(*spec.stacked, *spec.outputs, divided(spec.inputs[0], absmax.shape[-1], "groups")),
                    "absmax_scale": place(*spec.stacked, "groups"),
                    "absmax_offset": place(*spec.stacked),
                }
                return from_fields(NF4, fields)
            case Adapted(base=base, scale=scale, magnitude=magnitude):
                lead = spec.stacked if scale.ndim == len(spec.stacked) else (*spec.stacked, "adapters")
                fields = {
                    "base": one(spec, base),
                    "a": place(*lead, "rank", *spec.inputs),
                    "b": place(*lead, *spec.outputs, "rank"),
                    "scale": place(*lead),
                    "magnitude": None if magnitude is None else place(*lead, *spec.outputs),
                }
                return from_fields(Adapted, fields)
        return place(*spec.axes)

    return map_specs(one, specs, params)


def initialize(specs: Any, config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Any:
    """Newly initialized parameters. They do not depend on the mesh, and none depends on which others the model has."""

    def leaf(path: str, spec: Spec) -> jax.Array:
        if spec.init in ("zeros", "norm"):
            return jnp.full(spec.shape, 0.0 if spec.init == "zeros" else 1.0 - config.norm_offset, dtype)
        # Projections into the residual stream start smaller, so that its variance does not grow with the number of
        # layers (GPT-2, section 2.3).
        std = config.init_std / math.sqrt(2 * config.num_layers) if spec.init == "residual" else config.init_std
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return (std * jax.random.normal(own, spec.shape, jnp.float32)).astype(dtype)

    return build(specs, [leaf(path, spec) for path, spec in named(specs).items()])
