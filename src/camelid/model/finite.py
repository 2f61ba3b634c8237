"""What is wrong with a model whose results are NaN or infinite."""

import jax
import jax.numpy as jnp
import numpy as np

from camelid.errors import UserError
from camelid.model.config import Compute
from camelid.model.decoder import Decoder
from camelid.model.params import named
from camelid.parallel.hosts import to_host


def not_finite(params: Decoder, compute: Compute, what: str) -> UserError:
    """The error that says that `what` is not finite, and which weight is the reason; every process calls this."""
    if (name := _weight_that_is_not_finite(params)) is not None:
        return UserError(
            f"{what} not finite, because weights are NaN or infinite: {name}",
            "The checkpoint is damaged, or its training diverged: use an earlier one.",
        )
    if compute.dtype == "float16":
        return UserError(
            f"{what} not finite, although all weights are: numbers above 65,504 overflow float16",
            "Use --dtype bfloat16 or --dtype float32.",
        )
    return UserError(
        f"{what} not finite, although all weights are: the activations overflow {compute.dtype}",
        "The weights are too large; check that the checkpoint was read in the right format.",
    )


def _weight_that_is_not_finite(params: Decoder) -> str | None:
    """The first parameter that holds NaN or infinity, with its layer."""
    for path, weight in named(params).items():
        for leaf in jax.tree.leaves(weight):
            layers = np.atleast_1d(to_host(_finite(leaf, path.startswith("layers."))))
            if not layers.all():
                return f"{path} of layer {layers.argmin()}" if len(layers) > 1 else path
    return None


def _finite(leaf: jax.Array, stacked: bool) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf), axis=tuple(range(int(stacked), leaf.ndim)))
