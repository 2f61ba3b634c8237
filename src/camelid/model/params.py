"""Parameters as declarations.

A parameter is declared by one line naming its axes, inputs to the left of the arrow and outputs to the right:

    q_proj: Array = param("embed -> heads head_dim")

Its shape, sharding, initial scale, LoRA factors, decay and checkpoint layout all follow from that line. It is stored
outputs first, (heads, head_dim, embed), as the field's checkpoint files are: most tensors are read without a transpose.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from camelid.model.config import ModelConfig
from camelid.parallel.rules import placement


@dataclasses.dataclass(frozen=True)
class Spec:
    """One parameter of one model: its named axes with their sizes, and how it starts."""

    stacked: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    init: str

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis words in the order in which the array is stored."""
        return self.stacked + self.outputs + self.inputs

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Matrices decay and take adapters; norms and biases do neither."""
        return bool(self.inputs)


def param(axes: str, *, init: str = "normal", when: Callable[[ModelConfig], bool] = lambda config: True) -> Any:
    """Declares an array field: "inputs -> outputs" for a matrix, plain axes otherwise; None when `when` says no."""
    return dataclasses.field(metadata={"axes": axes, "init": init, "when": when})


def child(cls: type, *, stack: str | None = None, when: Callable[[ModelConfig], bool] = lambda config: True) -> Any:
    """Declares a module field, None when `when` says no; `stack` puts that axis in front of each of its arrays."""
    return dataclasses.field(metadata={"child": cls, "stack": stack, "when": when})


@dataclass_transform(field_specifiers=(param, child), frozen_default=True)
def module(cls: type) -> type:
    """Makes `cls` a frozen dataclass whose fields are parameters or child modules, and a JAX pytree."""
    cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
    cls.__repr__ = _repr  # pyright: ignore[reportAttributeAccessIssue]
    names = tuple(field.name for field in dataclasses.fields(cls))
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)
    jax.tree_util.register_pytree_with_keys(
        cls,
        flatten_with_keys=lambda tree: (tuple(zip(keys, _fields(tree, names), strict=True)), None),
        flatten_func=lambda tree: (_fields(tree, names), None),
        unflatten_func=lambda _, leaves: _build(cls, dict(zip(names, leaves, strict=True))),
    )
    return cls


def _repr(tree: Any) -> str:
    """One line, where the arrays themselves would be thousands."""
    leaves = jax.tree.leaves(tree)
    return f"{type(tree).__name__}({len(leaves)} arrays, {sum(getattr(x, 'size', 0) for x in leaves):,} numbers)"


def _fields(tree: Any, names: tuple[str, ...]) -> tuple:
    return tuple(getattr(tree, name) for name in names)


def _build(cls: type, values: dict[str, Any]) -> Any:
    """An instance without __init__: a tree may hold specs or shardings where its annotations say arrays."""
    tree = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(tree, name, value)
    return tree


def declare(cls: type, config: ModelConfig, stacked: tuple[str, ...] = ()) -> Any:
    """The tree of `cls` for `config`, with a Spec in place of each array."""
    return _build(cls, {field.name: _declare(field, config, stacked) for field in dataclasses.fields(cls)})


def _declare(field: dataclasses.Field, config: ModelConfig, stacked: tuple[str, ...]) -> Any:
    meta = field.metadata
    if not meta["when"](config):
        return None
    if "child" in meta:
        return declare(meta["child"], config, stacked + ((meta["stack"],) if meta["stack"] else ()))
    inputs, _, outputs = (tuple(side.split()) for side in meta["axes"].rpartition("->"))
    shape = tuple(config.axis_sizes[axis] for axis in stacked + outputs + inputs)
    return Spec(stacked, outputs, inputs, shape, meta["init"])


def is_spec(x: Any) -> bool:
    return isinstance(x, Spec)


def map_specs(f: Callable, specs: Any, *rest: Any) -> Any:
    """jax.tree.map that stops at specs."""
    return jax.tree.map(f, specs, *rest, is_leaf=is_spec)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted path, say `layers.attn.q_proj`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def build(specs: Any, leaves: Iterable[Any]) -> Any:
    """A tree shaped as `specs` with these leaves, in the order of `named`."""
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), list(leaves))


def abstract(specs: Any, dtype: Any, mesh: Mesh, replicate: tuple[str, ...] = ()) -> Any:
    """Shapes, dtypes and shardings of the parameters, nothing allocated."""
    return map_specs(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=placement(spec.axes, mesh, replicate)), specs
    )


def initialize(specs: Any, config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Any:
    """Fresh parameters; the same on any mesh, and each the same whatever others the model has."""

    def leaf(path: str, spec: Spec) -> jax.Array:
        if spec.init in ("zeros", "norm"):
            return jnp.full(spec.shape, 0.0 if spec.init == "zeros" else 1.0 - config.norm_offset, dtype)
        # What adds to the residual stream starts smaller, so that depth does not widen it (GPT-2, section 2.3).
        std = config.init_std / math.sqrt(2 * config.num_layers) if spec.init == "residual" else config.init_std
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return (std * jax.random.normal(own, spec.shape, jnp.float32)).astype(dtype)

    return build(specs, [leaf(path, spec) for path, spec in named(specs).items()])
