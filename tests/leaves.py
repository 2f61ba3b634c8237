"""Adapted and quantized weights for tests, from the spec of a parameter and its dense values."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from camelid.model.params import Spec
from camelid.model.weights import Adapted, Quantized


def adapted(
    spec: Spec, base: jax.Array | Quantized, ranks: Sequence[int], *, magnitude: bool = False, seed: int = 0
) -> Adapted:
    """Random factors that change the products of `base` about as much as it does.

    `ranks` has the rank of each layer, or one rank for a parameter that is not stacked.
    """
    draw, stacked = np.random.default_rng(seed), spec.shape[: len(spec.stacked)]
    outputs = spec.shape[len(stacked) : len(stacked) + len(spec.outputs)]
    inputs = spec.shape[len(stacked) + len(spec.outputs) :]
    used = (np.arange(max(ranks)) < np.reshape(ranks, (*stacked, 1))).astype(np.float32)
    a = draw.standard_normal((*stacked, max(ranks), *inputs), np.float32) / 4
    b = draw.standard_normal((*stacked, *outputs, max(ranks)), np.float32) / 4
    a = a * used.reshape(*used.shape, *(1 for _ in inputs))
    b = b * used.reshape(*stacked, *(1 for _ in outputs), -1)
    scale = np.reshape(np.float32([0.3 + 0.1 * i for i in range(len(ranks))]), stacked)
    length = 1 + draw.random((*stacked, *outputs), np.float32)
    return Adapted(base, *map(jnp.asarray, (a, b, scale)), jnp.asarray(length) if magnitude else None)


def quantized(spec: Spec, values: jax.Array, groups: int, dtype: str = "int8") -> Quantized:
    """`values` rounded to the nearest code, with scales by the largest value of each group."""
    lead = spec.shape[: len(spec.stacked + spec.outputs)]
    grouped = np.asarray(values).reshape(*lead, groups, -1)
    scale = np.abs(grouped).max(-1) / (127 if dtype == "int8" else 7)
    codes = np.rint(grouped / scale[..., None]).reshape(values.shape)
    return Quantized(jnp.asarray(codes, jnp.dtype(dtype)), jnp.asarray(scale, jnp.float32))
