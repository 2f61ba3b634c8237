"""Sharding of the rows of a batch over the devices of a mesh."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from camelid.errors import UserError
from camelid.parallel.rules import COMPUTE, partition


def data_parallel_size(mesh: Mesh) -> int:
    """The number of groups of devices that each compute with their own rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in COMPUTE["batch"])


@dataclass(frozen=True)
class BatchSharding:
    """The division of a batch of `rows` rows over `mesh`.

    Raises UserError if the number of rows is not a multiple of the data-parallel size.
    """

    rows: int
    mesh: Mesh

    def __post_init__(self) -> None:
        if self.rows % (size := data_parallel_size(self.mesh)):
            raise UserError(
                f"{self.rows} rows do not divide over {' x '.join(COMPUTE['batch'])} = {size} devices",
                f"Use a multiple of {size} rows for each batch (and each of its microbatches).",
            )

    @cached_property
    def own(self) -> slice:
        """The rows that the devices of this process hold."""
        indices = self._sharding.addressable_devices_indices_map((self.rows, 1)).values()
        bounds = [index[0].indices(self.rows) for index in indices if index is not None]
        return slice(min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds))

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays from arrays of all rows, the same in every process."""
        return self.place_own({name: x[self.own] for name, x in batch.items()})

    def place_own(self, own: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays from arrays that hold the rows `own` alone."""
        return {name: self._global(x) for name, x in own.items()}

    def _global(self, x: np.ndarray) -> jax.Array:
        def on_device(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(self.rows)
            return x[start - self.own.start : stop - self.own.start]

        return jax.make_array_from_callback((self.rows, *x.shape[1:]), self._sharding, on_device)

    @property
    def _sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, partition(("batch", "seq"), COMPUTE))
