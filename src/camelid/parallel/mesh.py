"""The mesh of devices, and its axes, over which arrays are sharded."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from camelid.errors import UserError
from camelid.parallel.backend import prepare_backend

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; -1 takes all remaining devices.

    The names `context` and `pipeline` are reserved for axes that shard sequences and layers.
    """

    data: int = 1
    """replicas of the parameters (data parallelism); each processes different rows of the batch"""
    fsdp: int = -1
    """shards of parameters and optimizer state (FSDP), and of the rows of the batch"""
    tensor: int = 1
    """shards of heads, MLP and vocabulary (tensor parallelism)"""

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of each axis, with a product of `devices`; raises UserError if there is no solution."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1 or any(type(size) is not int or size == 0 or size < -1 for size in sizes.values()):
            raise UserError(f"mesh {sizes} is not a mesh", "Give every axis a size of 1 or more; one axis may be -1.")
        known = math.prod(size for size in sizes.values() if size != -1)
        if known > devices:
            available = f"{devices} is available" if devices == 1 else f"{devices} are available"
            raise UserError(
                f"mesh {shown} needs {known} devices; {available}",
                f"Choose sizes whose product is {devices}, or start on more devices.",
            )
        if free and devices % known == 0:
            sizes[free[0]] = devices // known
        elif free or known != devices:
            raise UserError(
                f"mesh {shown} does not fill {devices} devices",
                f"Choose sizes whose product is {devices}; -1 takes all remaining devices.",
            )
        return sizes


def make_mesh(config: MeshConfig) -> "jax.sharding.Mesh":
    """A mesh of all devices of all processes."""
    import jax

    devices = _found(jax.devices)
    return _mesh(config.sizes(len(devices)), devices)


def one_device() -> "jax.sharding.Mesh":
    """A mesh of the first device of this process."""
    import jax

    return _mesh(MeshConfig().sizes(1), _found(jax.local_devices)[:1])


def device_memory(device: Any) -> int | None:
    """The memory of a device in bytes, None if it is not known; devices of the CPU share that of the machine."""
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(device.client.devices())
        except (ValueError, OSError, AttributeError):
            return None
    return (device.memory_stats() or {}).get("bytes_limit")


def _found(devices: Callable[[], list]) -> list:
    """The devices; raises UserError if JAX cannot use the requested platform, for example without a driver."""
    try:
        prepare_backend()
        return devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that one of the platforms can be used
        reason = " ".join(str(error).split())[:300] or "it is not installed, or there is no such device"
        raise UserError(
            f"JAX cannot use JAX_PLATFORMS = {os.environ.get('JAX_PLATFORMS', '')!r}: {reason}",
            "Check the driver and the installation (for example jax[cuda13]), or set JAX_PLATFORMS=cpu.",
        ) from error


def _mesh(sizes: dict[str, int], devices: list) -> "jax.sharding.Mesh":
    import jax

    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)
