"""Which parameters are trained: a tree is split into its trainable and its frozen arrays, and joined again."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from camelid.errors import UserError
from camelid.model.pytree import path_name
from camelid.train.patterns import per_layer, select, specs_by_path


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


def trained_parameters(freeze: Sequence[str], specs: Any) -> dict[str, np.ndarray]:
    """Which parameters are trained, by path: booleans of shape (), or of shape (layers,).

    Raises UserError if a pattern of `freeze` matches no parameter, or if nothing is left to train.
    """
    trained = {path: ~mask for path, mask in select(freeze, specs, "train.freeze").items()}
    if not any(mask.any() for mask in trained.values()):
        raise UserError(
            f"train.freeze = {list(freeze)} freezes every parameter", "Leave at least one parameter to train."
        )
    return trained


def count_trained(freeze: Sequence[str], specs: Any) -> int:
    """The number of parameters that are trained."""
    trained = trained_parameters(freeze, specs)
    return sum(
        spec.size // trained[path].size * int(trained[path].sum()) for path, spec in specs_by_path(specs).items()
    )


def make_mask(freeze: Sequence[str], specs: Any) -> Callable[[Any], Any] | None:
    """A function that sets gradients or updates of frozen parameters and layers to zero; None if nothing is frozen."""
    if not freeze:
        return None
    trained = jax.tree.unflatten(jax.tree.structure(specs), list(trained_parameters(freeze, specs).values()))

    def masked(mask: np.ndarray, leaf: jax.Array) -> jax.Array:
        return leaf if mask.all() else jnp.where(per_layer(mask, leaf), leaf, jnp.zeros_like(leaf))

    return lambda tree: jax.tree.map(
        lambda mask, part: jax.tree.map(lambda leaf: masked(mask, leaf), part), trained, tree
    )
