"""Diagnosis of a model whose results are NaN or infinite."""

import jax
import jax.numpy as jnp
import numpy as np

from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder
from camelid.model.params import named
from camelid.parallel.hosts import to_host


def not_finite(params: Decoder, compute: ComputeConfig, what: str) -> UserError:
    """The error to raise if `what`, for example "the logits are", not finite. It names the first weight that is not.

    In a multi-process run, every process must call this: it reads sharded parameters.
    """
    if (name := _first_not_finite(params)) is not None:
        return UserError(
            f"{what} not finite, because weights are NaN or infinite: {name}",
            "The checkpoint is damaged, or its training diverged: use an earlier one.",
        )
    if compute.dtype == "float16":
        return UserError(
            f"{what} not finite, although all weights are: values above 65,504 overflow float16",
            "Use --dtype bfloat16 or --dtype float32.",
        )
    return UserError(
        f"{what} not finite, although all weights are: the activations overflow {compute.dtype}",
        "The weights are too large; check that the checkpoint was read in the right format.",
    )


def _first_not_finite(params: Decoder) -> str | None:
    """The path, and the layer if it is stacked, of the first parameter that has a NaN or infinite element."""
    for path, weight in named(params).items():
        for leaf in jax.tree.leaves(weight):
            layers = np.atleast_1d(to_host(_finite(leaf, path.startswith("layers."))))
            if not layers.all():
                return f"{path} of layer {layers.argmin()}" if len(layers) > 1 else path
    return None


def _finite(leaf: jax.Array, stacked: bool) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf), axis=tuple(range(int(stacked), leaf.ndim)))
