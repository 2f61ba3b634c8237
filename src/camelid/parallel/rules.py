"""Rules: which mesh axes cut an axis word. One table stores parameters, another computes with activations.

Parameters are stored cut over `fsdp` and `tensor`; the compiler gathers their `fsdp` pieces for the layer at work.
Rows of the batch are cut over `data` and `fsdp`, so each device computes with its own rows.
"""

from collections.abc import Mapping
from types import MappingProxyType

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from camelid.errors import UserError

Rules = Mapping[str, tuple[str, ...]]

STORE: Rules = MappingProxyType(
    {
        "vocab": ("tensor",),
        # The lookup table is cut by rows only: cut by columns too, the lookup gathers the whole table.
        "vocab_in": ("fsdp", "tensor"),
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
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
    """The mesh axes of an array with these axis words; words without a rule, or in `replicate`, stay whole."""
    cuts = [() if axis in replicate else rules.get(axis, ()) for axis in axes]
    used = [name for cut in cuts for name in cut]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} map to {cuts}: a mesh axis can cut an array only once; change the rules")
    return PartitionSpec(*(cut or None for cut in cuts))


def shard(x: jax.Array, axes: str, replicate: tuple[str, ...] = ()) -> jax.Array:
    """`x`, cut over the current mesh by the COMPUTE rules; outside a mesh there is one device and nothing to cut."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(tuple(axes.split()), COMPUTE, replicate))


def placement(axes: tuple[str, ...], mesh: Mesh, replicate: tuple[str, ...] = ()) -> NamedSharding:
    """Where a stored parameter with these axis words lives."""
    return NamedSharding(mesh, partition(axes, STORE, replicate))


def check_divides(sizes: Mapping[str, int], mesh: Mesh, replicate: tuple[str, ...] = ()) -> None:
    """Raises UserError where an axis of the model does not divide over its mesh axes, or `replicate` names no axis."""
    if unknown := [axis for axis in replicate if axis not in sizes]:
        raise UserError(f"compute.replicate names {unknown[0]!r}", f"The axes are {', '.join(sizes)}.")
    for rules in (STORE, COMPUTE):
        for axis, cut in rules.items():
            ways = _product(mesh, cut)
            if axis in sizes and axis not in replicate and sizes[axis] % ways:
                largest = max(n for n in range(1, ways + 1) if sizes[axis] % n == 0)
                raise UserError(
                    f"{axis} = {sizes[axis]} does not divide over {' x '.join(cut)} = {ways}",
                    f'Use {" x ".join(cut)} = {largest}, or keep the axis whole with compute.replicate = ["{axis}"].',
                )


def _product(mesh: Mesh, cut: tuple[str, ...]) -> int:
    ways = 1
    for name in cut:
        ways *= mesh.shape[name]
    return ways
