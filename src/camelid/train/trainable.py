"""Which parameters are trained: a tree is split into its trainable and its frozen arrays, and joined again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from camelid.model.pytree import path_name


def partition(params: Any, predicate: Callable[[str, Any], bool]) -> tuple[Any, Any]:
    """Splits `params` into the arrays for which `predicate(path, array)` holds, and all others.

    Both results have the structure of `params`, with None in place of each array that the other one holds;
    `combine(*partition(params, predicate))` is `params` again. The path of an array is that of its parameter, and
    continues inside a parameter that consists of several arrays: `layers.attn.q_proj.a`.
    """
    chosen = jax.tree.map_with_path(lambda path, leaf: bool(predicate(path_name(path), leaf)), params)
    trainable = jax.tree.map(lambda keep, leaf: leaf if keep else None, chosen, params)
    frozen = jax.tree.map(lambda keep, leaf: None if keep else leaf, chosen, params)
    return trainable, frozen


def combine(trainable: Any, frozen: Any) -> Any:
    """The tree that `partition` has split; `frozen` is None if everything is trained."""
    if frozen is None:
        return trainable
    return jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None)


def mask_layers(tree: Any, trained: tuple[bool, ...]) -> Any:
    """`tree`, gradients or updates, with zeros for the layers that are not trained.

    `trained` has one value per layer, that is per index of the first axis of each array below `layers`, wherever in the
    tree that is.
    """

    def mask(path: Any, leaf: jax.Array) -> jax.Array:
        if "layers" not in path_name(path).split("."):
            return leaf
        return jnp.where(jnp.array(trained).reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map_with_path(mask, tree)
