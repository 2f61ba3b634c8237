"""Frozen dataclasses as JAX pytrees, and the names of their leaves."""

import dataclasses
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def register_pytree(cls: type[T]) -> type[T]:
    """Registers the dataclass `cls` as a pytree whose children are its fields, and returns it.

    Instances are rebuilt without `__init__`: a tree may hold specs, shardings or shapes where the annotations of the
    fields promise arrays.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))  # pyright: ignore[reportArgumentType]
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def values(tree: Any) -> tuple:
        return tuple(getattr(tree, name) for name in names)

    jax.tree_util.register_pytree_with_keys(
        cls,
        flatten_with_keys=lambda tree: (tuple(zip(keys, values(tree), strict=True)), None),
        flatten_func=lambda tree: (values(tree), None),
        unflatten_func=lambda _, leaves: from_fields(cls, dict(zip(names, leaves, strict=True))),
    )
    return cls


def from_fields(cls: type, values: dict[str, Any]) -> Any:
    """An instance of `cls` with these field values, created without `__init__`."""
    tree = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(tree, name, value)
    return tree


def path_name(path: Any) -> str:
    """A JAX key path as one dotted name, such as `layers.attn.q_proj`; the arrays of checkpoints have these names."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
