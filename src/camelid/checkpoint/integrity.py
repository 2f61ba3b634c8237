"""Whether numbers are the ones that were saved, and whether they are finite: on devices, and of what is read back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from camelid.checkpoint.tensors import INFINITY

UNSIGNED = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
SIGNED = {2: np.dtype(np.int16), 4: np.dtype(np.int32)}
"""by bytes: the integers that have a number's bits"""


def checksum_arrays(tree: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Checksums of the arrays of a tree by path, and how many infinite or NaN values those hold that have any.

    A checksum is the sum of the bits of all numbers, as unsigned integers, modulo 2**32. It does not depend on how an
    array is sharded, and `checksum` computes the same from slices. Every process calls this.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [path_name(path) for path, _ in leaves]
    sums, counts = jax.device_get(_survey([leaf for _, leaf in leaves]))
    found = {name: int(count) for name, count in zip(names, counts, strict=True) if count}
    return dict(zip(names, map(int, sums), strict=True)), found


@jax.jit
def _survey(arrays: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    bits = [jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]) for x in arrays]
    return (
        [jnp.sum(x, dtype=jnp.uint32) for x in bits],
        [jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32) for x in arrays],
    )


def checksum(values: np.ndarray) -> int:
    """The sum of the bits of contiguous numbers, modulo 2**32; those of slices add up to that of the whole."""
    return int(np.sum(values.reshape(-1).view(UNSIGNED[values.dtype.itemsize]), dtype=np.uint32))


def count_not_finite(values: np.ndarray) -> int:
    """How many of some numbers are infinite or NaN."""
    if np.issubdtype(values.dtype, np.integer):
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


def path_name(path: Any) -> str:
    """A path of JAX's within a tree, as checkpoints name it: params.layers.attn.q_proj."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
