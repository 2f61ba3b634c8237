"""Sharding rules: which axes of the mesh an axis name is sharded over, for stored parameters and for activations.

Parameters are stored sharded over `fsdp` and `tensor`; the compiler gathers the `fsdp` shards of one layer at a time.
Rows of the batch are sharded over `data` and `fsdp`, so that each device computes with its own rows.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from camelid.errors import UserError

Rules = Mapping[str, tuple[str, ...]]

STORE: Rules = MappingProxyType(
    {
        "vocab": ("tensor",),
        # The embedding table is sharded by rows only: sharded by columns too, a lookup would gather the entire table.
        "vocab_in": ("fsdp", "tensor"),
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        # Of adapters: the factors are small, and a sharded rank would add a collective to every product.
        "rank": (),
    }
)
COMPUTE: Rules = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "vocab": ("tensor",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
    }
)


def partition(axes: tuple[str, ...], rules: Rules, replicate: tuple[str, ...] = ()) -> PartitionSpec:
    """The PartitionSpec of an array with these axis names; names in `replicate` or without a rule are unsharded."""
    entries = [() if axis in replicate else rules.get(axis, ()) for axis in axes]
    used = [name for entry in entries for name in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} map to {entries}: a mesh axis can shard an array only once; change the rules")
    return PartitionSpec(*(entry or None for entry in entries))


def shard(x: jax.Array, axes: str, replicate: tuple[str, ...] = ()) -> jax.Array:
    """`x`, constrained to the sharding of the COMPUTE rules on the current mesh; `x` itself if there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(tuple(axes.split()), COMPUTE, replicate))


def placement(axes: tuple[str, ...], mesh: Mesh, replicate: tuple[str, ...] = ()) -> NamedSharding:
    """The sharding with which a parameter with these axis names is stored."""
    return NamedSharding(mesh, partition(axes, STORE, replicate))


def num_shards(axis: str, mesh: Mesh, replicate: tuple[str, ...] = ()) -> int:
    """The number of shards into which this axis of a stored parameter is divided."""
    return 1 if axis in replicate else _size(mesh, STORE.get(axis, ()))


def check_divides(sizes: Mapping[str, int], mesh: Mesh, replicate: tuple[str, ...] = ()) -> None:
    """Raises UserError if an axis of the model does not divide over its mesh axes, or `replicate` names no axis."""
    if unknown := [axis for axis in replicate if axis not in sizes]:
        raise UserError(f"compute.replicate names {unknown[0]!r}", f"The axes are {', '.join(sizes)}.")
    for rules in (STORE, COMPUTE):
        for axis, names in rules.items():
            shards = _size(mesh, names)
            if axis in sizes and axis not in replicate and sizes[axis] % shards:
                largest = max(n for n in range(1, shards + 1) if sizes[axis] % n == 0)
                raise UserError(
                    f"{axis} = {sizes[axis]} does not divide over {' x '.join(names)} = {shards}",
                    f"Use {' x '.join(names)} = {largest}, or leave the axis unsharded with "
                    f'compute.replicate = ["{axis}"].',
                )


def _size(mesh: Mesh, names: tuple[str, ...]) -> int:
    """The number of devices along these mesh axes."""
    return math.prod(mesh.shape[name] for name in names)
