"""Checksums of arrays, and counts of infinite and NaN values, on devices and on the host."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from camelid.checkpoint.tensors import INFINITY
from camelid.model.pytree import path_name

UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
SIGNED = {2: np.dtype(np.int16), 4: np.dtype(np.int32)}
"""by item size in bytes: the integer types to which the bits of values are reinterpreted"""


def checksum_arrays(tree: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The checksum of each array of a tree by path, and the number of infinite or NaN values of those that have any.

    A checksum is the sum of the bits of all values as unsigned integers, modulo 2**32. It does not depend on the
    sharding of an array, and `checksum` computes the same from slices. Every process calls this.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [path_name(path) for path, _ in leaves]
    sums, counts = jax.device_get(_checksum_arrays([leaf for _, leaf in leaves]))
    not_finite = {name: int(count) for name, count in zip(names, counts, strict=True) if count}
    return dict(zip(names, map(int, sums), strict=True)), not_finite


@jax.jit
def _checksum_arrays(arrays: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    arrays = [x.astype(np.uint8) if x.dtype == bool else x for x in arrays]
    bits = [jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]) for x in arrays]
    return (
        [jnp.sum(x, dtype=jnp.uint32) for x in bits],
        [jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32) for x in arrays],
    )


def checksum(values: np.ndarray) -> int:
    """The checksum of a contiguous array; the checksums of slices add up, modulo 2**32, to that of the array."""
    return int(np.sum(values.reshape(-1).view(UNSIGNED[values.dtype.itemsize]), dtype=np.uint32))


def count_not_finite(values: np.ndarray) -> int:
    """The number of infinite or NaN values in a contiguous array."""
    if values.dtype.kind in "biu":
        return 0
    size = values.dtype.itemsize
    infinity, sign = INFINITY.get(values.dtype, 0x7F800000), 1 << (8 * size - 1)
    # The bits of infinities and NaN are the largest integers of either sign; isfinite takes several times as long.
    if (
        values.view(SIGNED[size]).max(initial=0) < infinity
        and values.view(UNSIGNED[size]).max(initial=0) < infinity | sign
    ):
        return 0
    return int(np.count_nonzero(~np.isfinite(values)))


def describe_counts(counts: Mapping[str, int], most: int = 3) -> str:
    """Where infinite or NaN values were found, for messages: `embed (2), lm_head (5) and 3 more`."""
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:most])
    return shown + (f" and {len(counts) - most} more" if len(counts) > most else "")
